"""Every command of docs/scaling.md that this machine can run, runs, in the order of the page."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bardling.config.recipes import config_to_toml

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def commands():
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^(?:\| [^|]* \| `)?((?:torchrun|bardling) [^`\n]*)", text, re.MULTILINE)
    assert len(found) == 5
    return found


@pytest.mark.slow
def test_the_commands_of_the_page_run(tiny, change, tmp_path):
    config = change(tiny, train={"steps": 10, "batch_size": 8})
    (tmp_path / "my-recipe.toml").write_text(config_to_toml(config))
    tools = Path(sys.executable).parent
    for command in commands():
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [tools / program, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert len(list((tmp_path / "runs" / "b" / "checkpoints" / "step-000012").glob("model-*"))) == 2


def test_the_files_of_the_page_exist():
    for name in re.findall(r"(?:examples|tests)/[\w/.-]+", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parents[1] / name).exists(), name


def test_the_settings_of_the_page_exist():
    from bardling.config import ParallelConfig

    names = set(re.findall(r"--parallel\.(\w+)", PAGE.read_text(encoding="utf-8")))
    assert names == set(ParallelConfig.__dataclass_fields__)
