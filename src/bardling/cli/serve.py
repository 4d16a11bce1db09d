"""`bardling serve MODEL ...`: an HTTP server with OpenAI's interface for one or several models."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bardling.cli.parse import note, parse
from bardling.errors import UserError
from bardling.files.paths import shell_path
from bardling.serve.settings import Settings

if TYPE_CHECKING:
    from bardling.serve.server import Running

_MOST_SHOWN = 8


@dataclass(frozen=True)
class ServeOptions(Settings):
    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL [MODEL ...]")]] = ()
    """Runs, each with all its checkpoints; checkpoints, model folders, gpt2 or USER/REPO on the hub. The first one is the
    default."""


def run(argv: Sequence[str]) -> None:
    options = parse(ServeOptions, argv, prog="bardling serve", description="Serve models over HTTP, with OpenAI's interface.")
    if options.api_key is None:
        options = replace(options, api_key=os.environ.get("BARDLING_API_KEY", ""))
    if not options.models:
        raise UserError(f"no model to serve: {_existing_runs()}")
    try:
        from bardling.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "sse_starlette"):
            raise
        raise UserError(f"serving needs the package {error.name}: pip install 'bardling[serve]'") from None
    serve(options.models, options, ready=lambda running: _print_start(running, bool(options.api_key)), note=note)


def _existing_runs() -> str:
    """What can be served: the runs in this folder."""
    files = sorted(Path("runs").glob("*/config.toml"), key=lambda file: file.stat().st_mtime, reverse=True)
    runs = [shell_path(file.parent) for file in files]
    if not runs:
        return "make a run with `bardling train quickstart --out runs/first`, or name another model, such as gpt2"
    return f"name a run, as in `bardling serve {runs[0]}`, or a checkpoint, RUN@step-N; runs here: {_listed(runs)}"


def _print_start(running: "Running", has_key: bool) -> None:
    from bardling.cli.tables import print_rows
    from bardling.monitor.format import size_bytes

    url, models = running.url, running.models
    names = [model.id for model in models.catalog.models()]
    limit = "" if models.limit is None else f" of {size_bytes(models.limit)}"
    print_rows(
        [
            ("address", url),
            ("models", _listed(names)),
            ("memory", f"{size_bytes(models.size)}{limit} on {models.device}"),
            ("key", "needed" if has_key else "none needed"),
        ]
    )
    key = ' -H "Authorization: Bearer $BARDLING_API_KEY"' if has_key else ""
    body = f'{{"model": "{names[0]}", "prompt": "The", "max_tokens": 40}}'
    print(f"\ncurl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'\n")
    print(f"Next: open {url}/ in a browser, or run the command above; Ctrl-C stops the server.", flush=True)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return f"{', '.join(names[:_MOST_SHOWN])}{more}"
