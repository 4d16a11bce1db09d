"""A few hundred changed files of the kinds that other people write; `benchmarks/fuzz.py --cases 20000` runs many more."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer measures by /proc")

TARGETS = ("tokenizer, metaspace", "tokenizer, bytelevel", "model with generation_config.json", "recipe (TOML), encodings",
           "prompt file", "text file", "text folder", "JSON Lines", "task file",
           "source, rows.parquet", "source, rows.arrow", "source, all.tar", "source, all.zip", "source, rows.csv")  # fmt: skip


def test_changed_texts_and_tokenizers_raise_our_error_and_do_nothing_else():
    command = [sys.executable, str(BENCHMARKS / "fuzz.py"), "--cases", "400", "--seed", "7", "--kind", "text"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in TARGETS:
        (cases,) = re.findall(rf"^{re.escape(name)}: (\d+) cases, 0 violations$", done.stdout, re.MULTILINE)
        assert int(cases) > 5
