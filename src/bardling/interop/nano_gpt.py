"""nano-gpt's checkpoints, `checkpoint_NNNNNN.bin`: read, weights, AdamW state and settings.

A file is what `torch.save` made of a dataclass turned into a dict: `model_state_dict`, `config` (sizes), `step`,
`val_loss_accum`, `optimizer_state_dict`, `train_config`, `dataset_config`, `eval_config`, `sample_config`, `name`. Its models
are GPT-2s with biases and the tanh GELU, without dropout; the embedding is stored twice, as embedding and head, and each layer
carries a causal mask, which is left out.

Limits: the last checkpoint of a nano-gpt run was taken before its last update, so its step is one below the run's length.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from bardling.config import CheckpointConfig, EvalConfig, OptimConfig, RunConfig, SampleConfig, TrainConfig
from bardling.errors import UserError
from bardling.interop.imported import (
    ImportedCheckpoint,
    adamw_state,
    described_model,
    loss_in,
    model_weights,
    text_keys,
    whole_in,
)
from bardling.interop.torchfile import load_torch_file

_SECTIONS = ("train_config", "dataset_config", "eval_config", "sample_config")


def read_nano_gpt_checkpoint(path: Path) -> ImportedCheckpoint:
    """Read nano-gpt's checkpoint at `path`; `settings` holds its `train_config` and the other sections, as tables.

    Raises:
        UserError: with the file's name, if it is damaged, holds anything executable, or does not fit its own description.
    """
    content = text_keys(path, load_torch_file(path), "content")
    missing = [key for key in ("model_state_dict", "config") if key not in content]
    if missing:
        raise UserError(f"{path}: lacks {missing[0]!r}: it is not a checkpoint of nano-gpt")
    config = described_model(path, text_keys(path, content["config"], "config"), bias=True, dropout=0.0, gelu="tanh")
    state = content.get("optimizer_state_dict")
    sections = {name: text_keys(path, content[name], name) for name in _SECTIONS if content.get(name) is not None}
    return ImportedCheckpoint(
        origin="nano-gpt",
        config=config,
        weights=model_weights(path, content["model_state_dict"], config),
        optimizer=None if state is None else adamw_state(path, state, config),
        step=whole_in(path, content, "step", 0) if content.get("step") is not None else 0,
        best_val_loss=loss_in(path, content, "val_loss_accum"),
        settings={name: _plain(section) for name, section in sections.items()},
    )


def run_config_from_nano_gpt(imported: ImportedCheckpoint) -> RunConfig:
    """The run that a nano-gpt checkpoint belongs to, as far as its settings tell; what they leave open takes our defaults.

    Its constants are filled in: AdamW with weight decay 0.1, betas 0.9 and 0.95, clipping at 1.
    """
    train = imported.settings.get("train_config", {})
    evaluation, sample = imported.settings.get("eval_config", {}), imported.settings.get("sample_config", {})
    try:
        lr, steps = float(train.get("max_lr", 6e-4)), int(train.get("max_steps", 19073))
        # nano-gpt trains on windows of sequence_length, which may be shorter than the model's context.
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
                # A run no longer than its warm-up never decayed in nano-gpt; here the warm-up must end before the run does.
                warmup_steps=min(int(train.get("warmup_steps", 715)), max(steps - 1, 0)),
            ),
            train=TrainConfig(
                steps=steps, batch_size=total // length, micro_batch=int(train.get("micro_batch_size", 16)), log_every=1
            ),
            eval=EvalConfig(
                every=int(train.get("eval_steps", 250)),
                windows=int(evaluation.get("validation_steps") or 20) * int(train.get("micro_batch_size", 16)),
            ),
            checkpoint=CheckpointConfig(every=int(train.get("checkpoint_steps", 5000))),
            sample=replace(
                SampleConfig(), prompt=str(sample.get("text", "")), num_samples=int(sample.get("num_return_sequences", 5))
            ),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"nano-gpt's settings do not make a run: {error}") from None


def _plain(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value is None or isinstance(value, bool | int | float | str)}
