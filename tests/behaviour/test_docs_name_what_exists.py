"""Recipes, models, commands, options, files and tests that the documentation names exist."""

import ast
import re
from pathlib import Path

import pytest

from bardling.cli.main import COMMANDS
from bardling.config.recipes import recipe_names
from bardling.interop.pretrained import GPT2_NAMES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/trl/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pages
def test_recipes_and_commands(page):
    for command, subject in re.findall(r"bardling ([a-z]+)(?: +([a-z][\w./-]*))?", page.read_text()):
        if command in COMMANDS and subject and command in ("train", "plan", "bench", "verify"):
            assert subject in recipe_names() or subject.endswith((".toml", ".py")), f"bardling {command} {subject}"
    for commands in re.findall(r"^(?:\$ )?bardling ([a-z]+)", page.read_text(), re.MULTILINE):
        assert commands in COMMANDS


@pages
def test_files_links_and_tests(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / path).is_file(), path
        defined = {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}
        assert not name or name in defined, f"{path}::{name}"
    for path in re.findall(r"`((?:benchmarks|examples)/[\w./-]+)`", text):
        assert (ROOT / path.rstrip("/")).exists(), path
    for path in re.findall(
        r"`((?:data|model|training|planning|evaluate|checkpoint|interop|generation|files)/[\w/]+\.py)`", text
    ):
        nanogpt = path.endswith("/prepare.py") and page.name == "migrate.md"
        assert nanogpt or (ROOT / "src" / "bardling" / path).is_file(), path


def test_the_presets_of_nano_gpt_are_what_the_page_says():
    (row,) = re.findall(r"^\| presets (.*?) \| (.*)$", (ROOT / "docs" / "migrate.md").read_text(), re.MULTILINE)
    presets = re.findall(r"`([\w-]+)`", row[0])
    assert presets[0] == "gpt2"
    assert "`gpt2-124m` for `gpt2`" in row[1]
    assert {"gpt2-124m", *presets[1:]} <= set(recipe_names())
    assert "gpt2" in GPT2_NAMES
