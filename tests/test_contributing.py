"""CONTRIBUTING.md describes the package as it is: its folders, and the functions on the way from text to checkpoint."""

import re
import sys
import threading
from pathlib import Path

import bardling
from bardling.training.run import train

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGE = Path(bardling.__file__).parent


def section(title):
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_map_has_every_folder_with_modules_and_no_other():
    listed = re.findall(r"^\| `([\w/]+)` \| [^|]+ \| [^|]+ \|$", section("Map of the package"), re.MULTILINE)
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert set(listed) == folders - {"."}
    assert len(listed) == len(set(listed))


def test_the_map_is_in_the_order_of_the_layers():
    contract = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.findall(r"bardling\.(\w+)", contract.split("layers = [")[1].split("]")[0])
    listed = re.findall(r"^\| `(\w+)", section("Map of the package"), re.MULTILINE)
    order = list(dict.fromkeys(listed))
    assert order == [layer for layer in layers if layer in order]


def test_the_tour_names_the_functions_in_the_order_of_their_calls(tiny, change, tmp_path):
    tour = re.findall(r"^\d+\. `([\w/]+\.py): (\w+)`", section("From text to checkpoint"), re.MULTILINE)
    assert len(tour) == 10
    first: dict[tuple[str, str], int] = {}

    def note(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            first.setdefault((Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_name), len(first))

    config = change(tiny, data={"cache": str(tmp_path / "cache")}, train={"steps": 6}, optim={"warmup_steps": 2})
    threading.setprofile(note)  # checkpoints are written in a thread
    sys.setprofile(note)
    try:
        train(config, tmp_path / "run", quiet=True)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert [entry for entry in tour if entry not in first] == [], "every function is called"
    assert [first[entry] for entry in tour] == sorted(first[entry] for entry in tour), "and in this order"
