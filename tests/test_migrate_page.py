"""The page for people who come from nanoGPT or nano-gpt names every key, and nothing here that does not exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from bardling.config import RunConfig
from bardling.interop.nanogpt_keys import BENCH_KEYS, SAMPLE_KEYS, TRAIN_KEYS

PAGE = (Path(__file__).parents[1] / "docs" / "migrate.md").read_text()

# nano-gpt's flags and the fields of its configurations.
FLAGS = (
    "debug pretrained model checkpoint device sequence-length seed compile no-compile sample-num-sequences sample-max-length "
    "sample-seed total-batch-size streaming max-steps eval-steps checkpoint-steps checkpoint-dir log-file validation-steps "
    "hellaswag-samples dataset dataset-dir micro-batch-size splits tokens-per-shard num-procs export-dir"
)
FIELDS = (
    "block_size vocab_size n_layer n_head n_embd dataset_dir dataset_name micro_batch_size sequence_length "
    "num_return_sequences max_length text seed validation_steps hellaswag_samples step total_batch_size max_lr min_lr_ratio "
    "warmup_steps max_steps eval_steps checkpoint_steps checkpoint_dir log_file"
)


def section(title: str) -> str:
    """The text from a paragraph that begins with `title` to the next heading or table's end."""
    start = PAGE.index(title)
    table = re.search(r"(?:^\|.*\n)+", PAGE[start:], re.MULTILINE)
    assert table is not None
    return table[0]


@pytest.mark.parametrize(
    ("title", "keys"),
    [
        ("Training (`bardling train`)", TRAIN_KEYS),
        ("Sampling (`bardling sample`)", SAMPLE_KEYS),
        ("Benchmark (`bardling bench`)", BENCH_KEYS),
    ],
)
def test_every_key_of_nanogpt_has_one_row(title, keys):
    rows = re.findall(r"^\| `(\w+)` \|", section(title), re.MULTILINE)
    assert sorted(rows) == sorted(keys)


def test_every_flag_and_field_of_nano_gpt_is_there():
    first_columns = " ".join(re.findall(r"^\| ([^|]+) \|", section("## nano-gpt, flag by flag"), re.MULTILINE))
    assert sorted(re.findall(r"`--([\w-]+)`", first_columns)) == sorted(FLAGS.split())
    first_columns = " ".join(re.findall(r"^\| ([^|]+) \|", section("Configuration fields."), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first_columns)) == set(FIELDS.split())


def test_every_setting_that_is_named_exists():
    config = RunConfig()
    named = set(re.findall(r"(?<![\w/.])(model|data|optim|train|eval|sample|checkpoint|monitor)\.([a-z_]+)(?![\w.]*\.)", PAGE))
    files = {("eval", "py"), ("train", "py"), ("sample", "py"), ("train", "bin"), ("model", "safetensors")}
    assert len(named) > 40
    for part, name in named - files:
        assert name in {item.name for item in dataclasses.fields(getattr(config, part))}, f"{part}.{name}"
