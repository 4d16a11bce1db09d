"""Checks the shape of the code: sizes of files and functions, import cycles, layers. Part of `make lint`.

    python scripts/house.py                     # a few figures; exits with 1 if a limit is exceeded
    python scripts/house.py --trace RECIPE ...  # which files a configuration passes through, from `train` to the first step

The trace runs `bardling.train` under `sys.monitoring` until the first training step and lists, in order, the files of all
functions that receive a `RunConfig` or a `ResolvedRun` as an argument. It counts the files and the returns to a file that was
left before. Further arguments override settings, as on the command line: `--trace quickstart --train.steps 2`.
"""

import argparse
import ast
import contextlib
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "bardling"
MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_SOURCE_LINES = 39_800


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; packages are named without `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports anywhere: at the top, in functions, and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import module` imports the module, not only the package.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return {target for target in found if target in known and target != name}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def layers() -> list[list[str]]:
    """Packages from top to bottom, as the contract in pyproject.toml has them; those of one list are on one level."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    return [re.split(r"\s*[|:]\s*", layer) for layer in contracts[0]["layers"]]


def layer_violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports that point up, or sideways between independent packages."""
    rank = {package: number for number, level in enumerate(layers()) for package in level}

    def home(module: str) -> str | None:
        return next(
            (package for package in sorted(rank, key=len, reverse=True) if f"{module}.".startswith(f"{package}.")), None
        )

    found = []
    for module, targets in graph.items():
        for target in targets:
            source, goal = home(module), home(target)
            if source is None or goal is None or source == goal:
                continue
            if rank[goal] <= rank[source]:
                found.append(f"{module} imports {target}")
    return sorted(found)


def long_functions(path: Path) -> Iterator[str]:
    """Functions that are too long, as 'file:line name (lines)'."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name} ({lines} lines)"


def check() -> int:
    """Print the figures; 1 if a limit is exceeded."""
    known = modules()
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in known.values()}
    graph = {name: imports(name, path, known) for name, path in known.items()}
    problems = [
        *(
            f"{path.relative_to(ROOT)} has {lines} lines (limit {MOST_FILE_LINES})"
            for path, lines in sizes.items()
            if lines > MOST_FILE_LINES
        ),
        *(f"{text}: limit {MOST_FUNCTION_LINES}" for path in known.values() for text in long_functions(path)),
        *(f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)),
        *(f"layers: {text}" for text in layer_violations(graph)),
    ]
    total, longest = sum(sizes.values()), max(sizes, key=lambda path: sizes[path])
    if total > MOST_SOURCE_LINES:
        problems.append(f"{total:,} lines of source (limit {MOST_SOURCE_LINES:,})")
    print(f"{len(sizes)} files, {total:,} lines; longest file {longest.relative_to(PACKAGE)} ({sizes[longest]} lines)")
    print(f"{len(problems)} problem{'' if len(problems) == 1 else 's'}", *problems, sep="\n  ")
    return 1 if problems else 0


class _FirstStep(Exception):  # noqa: N818  not an error
    """The run has reached its first step."""


@contextlib.contextmanager
def watching(enter: Callable[[CodeType, Any], None]) -> Iterator[None]:
    """Call `enter` with the code and the frame of every function of the package that starts; Python 3.11 lacks
    `sys.monitoring`."""
    if not hasattr(sys, "monitoring"):
        sys.setprofile(lambda frame, event, _: enter(frame.f_code, frame) if event == "call" and _ours(frame.f_code) else None)
        try:
            yield
        finally:
            sys.setprofile(None)
        return

    def started(code: CodeType, offset: int) -> Any:
        return enter(code, sys._getframe(1)) if _ours(code) else sys.monitoring.DISABLE

    tool, events = sys.monitoring.PROFILER_ID, sys.monitoring.events
    sys.monitoring.use_tool_id(tool, "house")
    sys.monitoring.register_callback(tool, events.PY_START, started)
    sys.monitoring.set_events(tool, events.PY_START)
    try:
        yield
    finally:
        sys.monitoring.set_events(tool, 0)
        sys.monitoring.free_tool_id(tool)


def _ours(code: CodeType) -> bool:
    return code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<")


def trace(argv: list[str]) -> int:
    """Run a recipe to its first step and list the files that its configuration passes through."""
    sys.path.insert(0, str(ROOT / "src"))
    from bardling.config import RunConfig
    from bardling.training import loop
    from bardling.training.resolve import ResolvedRun
    from bardling.training.run import train

    config = _recipe(argv)
    visited: list[str] = []

    def enter(code: CodeType, frame: Any) -> None:
        count = code.co_argcount + code.co_kwonlyargcount
        given = [frame.f_locals.get(name) for name in code.co_varnames[:count] if name != "self"]
        if any(isinstance(value, RunConfig | ResolvedRun) for value in given):
            file = str(Path(code.co_filename).relative_to(PACKAGE))
            if not visited or visited[-1] != file:
                visited.append(file)

    def stop(*_: object, **__: object) -> None:
        raise _FirstStep

    loop.train_step = stop  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder, watching(enter), contextlib.suppress(_FirstStep):
        train(config, Path(folder) / "run", quiet=True)
    for number, file in enumerate(visited, 1):
        print(f"{number:3} {file}{'  (again)' if file in visited[: number - 1] else ''}")
    print(f"{len(set(visited))} files, {len(visited) - len(set(visited))} returns to a file left before")
    return 0


def _recipe(argv: list[str]) -> Any:
    from bardling.cli.recipe import parse_recipe_command
    from bardling.cli.train import TrainOptions

    _, _, options = parse_recipe_command("train", TrainOptions, argv, "Trace a recipe.")
    return options.config


def main() -> int:
    """Check the code, or trace a recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trace", nargs=argparse.REMAINDER, metavar="RECIPE", help="trace a recipe to its first step")
    options = parser.parse_args()
    if options.trace is None:
        return check()
    from bardling.errors import UserError

    try:
        return trace(options.trace)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
