"""Hostile files, a thousand of them, through every loader: `benchmarks/fuzz.py` with a seed of its own.

The script runs in a process of its own, since it forks and its audit hook stays for good.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer measures by /proc")


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "fuzz.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_thousand_hostile_files_raise_our_error_and_do_nothing_else():
    done = fuzz("--cases", "1000", "--seed", "1234")
    assert done.returncode == 0, done.stdout + done.stderr
    caught, self_tests = re.search(r"self-tests: (\d+) of (\d+) caught", done.stdout).groups()
    assert caught == self_tests != "0"
    cases, refused, loaded = (
        int(number.replace(",", "")) for number in re.search(r"\| all \| (.+?) \| (.+?) \| (.+?) \|", done.stdout).groups()
    )
    assert cases >= 1000
    assert refused + loaded == cases
    assert refused > 500, "the files must be malformed"
    assert loaded > 100, "and not so broken that no loader looks into them"
