"""Reads nano-gpt's checkpoints, `checkpoint_NNNNNN.bin`: weights, AdamW state and settings.

A file is a dict with `model_state_dict`, `config` (sizes), `step`, `val_loss_accum`, `optimizer_state_dict` and the settings by
section. The models are GPT-2s with biases and the tanh GELU, without dropout. Limits: nano-gpt takes its last checkpoint before
the last optimizer step, so its step is one below the length of the run.
"""

from pathlib import Path

from bardling.config import CheckpointConfig, EvalConfig, OptimConfig, RunConfig, SampleConfig, TrainConfig
from bardling.errors import UserError
from bardling.interop.imported import (
    ImportedCheckpoint,
    import_checkpoint,
    model_config_from_sizes,
    plain_values,
    read_content,
    string_keyed,
)

_SECTIONS = ("train_config", "dataset_config", "eval_config", "sample_config")


def read_nano_gpt_checkpoint(path: Path) -> ImportedCheckpoint:
    """Read the nano-gpt checkpoint at `path`; `settings` holds its `train_config` and the other sections as dicts."""
    content = read_content(path, "nano-gpt", ("model_state_dict", "config"))
    config = model_config_from_sizes(path, string_keyed(path, content["config"], "config"), bias=True, dropout=0.0, gelu="tanh")
    sections = {name: string_keyed(path, content[name], name) for name in _SECTIONS if content.get(name) is not None}
    settings = {name: plain_values(section) for name, section in sections.items()}
    keys = ("model_state_dict", "optimizer_state_dict", "step", "val_loss_accum")
    return import_checkpoint(path, "nano-gpt", content, config, settings, *keys)


def run_config_from_nano_gpt(imported: ImportedCheckpoint) -> RunConfig:
    """The configuration of the run that a nano-gpt checkpoint comes from; settings it does not store take our defaults.

    Our defaults equal nano-gpt's constants: AdamW with weight decay 0.1, betas 0.9 and 0.95, gradient clipping at 1.
    """
    train, evaluation, sample = (imported.settings.get(f"{name}_config", {}) for name in ("train", "eval", "sample"))
    try:
        lr, steps = float(train.get("max_lr", 6e-4)), int(train.get("max_steps", 19073))
        micro = int(train.get("micro_batch_size", 16))
        # nano-gpt trains on sequences of sequence_length tokens, which may be below the model's block_size.
        length = int(train.get("sequence_length", imported.config.block_size))
        total = int(train.get("total_batch_size", length * 16))
        if length < 1 or total % length:
            raise UserError(f"total_batch_size = {total} is not a multiple of sequence_length = {length}")
        return RunConfig(
            seed=int(train.get("seed", 1337)),
            model=imported.config,
            optim=OptimConfig(
                lr=lr,
                min_lr=lr * float(train.get("min_lr_ratio", 0.1)),
                warmup_steps=int(train.get("warmup_steps", 715)),
            ),
            train=TrainConfig(steps=steps, batch_size=total // length, micro_batch=micro, log_every=1),
            eval=EvalConfig(
                every=int(train.get("eval_steps", 250)), windows=int(evaluation.get("validation_steps") or 20) * micro
            ),
            checkpoint=CheckpointConfig(every=int(train.get("checkpoint_steps", 5000))),
            sample=SampleConfig(prompt=str(sample.get("text", "")), num_samples=int(sample.get("num_return_sequences", 5))),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"nano-gpt's settings are not a valid run: {error}") from None
