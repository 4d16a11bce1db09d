"""Tables of measurements: printed, and appended with date, device and versions to `benchmarks/results/NAME.md`.

Also what every script needs: the description of the machine, and error handling (a user error is one line, status 2).
"""

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bardling.distributed.device import device_name
from bardling.errors import UserError

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Table:
    """Measurements, one row per case. Cells are strings; notes explain them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in Markdown with aligned columns, also readable in a terminal; numbers are right-aligned."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: a row has {len(row)} cells for {len(self.columns)} columns: {row}")
        cells = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(3, *(len(row[place]) for row in cells)) for place in range(len(self.columns))]
        right = [place > 0 and all(_is_figure(row[place]) for row in cells[1:]) for place in range(len(self.columns))]
        rule = "|".join("-" * (width + 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True))
        lines = [
            "| "
            + " | ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            )
            + " |"
            for row in cells
        ]
        return "\n".join(
            [f"### {self.title}", "", lines[0], f"|{rule}|", *lines[1:], "", *(f"- {note}" for note in self.notes)]
        )


def publish(name: str, tables: Sequence[Table], *, device: torch.device, command: Sequence[str], folder: Path | None) -> Path:
    """Print the tables and append them to NAME.md in `folder` (default: `benchmarks/results/`); returns the file.

    Args:
        command: the command line arguments, to repeat the measurement.

    Raises:
        UserError: the file cannot be written; the tables have been printed.
    """
    path = (folder or RESULTS) / f"{name}.md"
    facts = machine_facts(device)
    head = [f"## {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}", ""]
    head += [f"- {key}: {value}" for key, value in facts.items()]
    head += [f"- command: `{' '.join(['python', f'benchmarks/{name}.py', *command])}`", ""]
    text = "\n".join(head) + "\n" + "\n\n".join(table.markdown().rstrip() for table in tables) + "\n\n"
    print("\n" + text, end="", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.exists()
        with path.open("a", encoding="utf-8") as file:  # one write, so that a kill leaves the old file or a complete entry
            file.write(text if begun else f"# Results of benchmarks/{name}.py\n\nNewest last.\n\n{text}")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the tables are only printed above") from None
    print(f"appended to {path}", file=sys.stderr)
    return path


def machine_facts(device: torch.device) -> dict[str, str]:
    """What the results depend on: device, cores, load, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"device": device_name(device), "cores": f"{cores}, {torch.get_num_threads()} threads used by PyTorch"}
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f} processes on average over the last minute, including these measurements"
    versions = {"bardling": _bardling(), "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    facts["versions"] = ", ".join(f"{key} {value}" for key, value in versions.items())
    return facts


def _bardling() -> str:
    """The package version, and the commit if run from a checkout."""
    version = importlib.metadata.version("bardling")
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return version  # no git, or not a checkout
    return f"{version} ({answer.stdout.strip()})"


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median with smallest and largest, such as '1.83 (1.79-1.90)'."""
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least}-{most})"


def megabytes(size: float) -> str:
    """Bytes as MB (10^6)."""
    return rounded(size / 1e6)


def rounded(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def say(message: str) -> None:
    """Print progress to standard error."""
    print(message, file=sys.stderr, flush=True)


def script(main: Callable[[Sequence[str]], None]) -> None:
    """Run a benchmark's `main` on the command line; user errors are one line and status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).stem}: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-+" or cell in ("", "n/a")
