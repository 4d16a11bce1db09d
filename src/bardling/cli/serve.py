"""`bardling serve MODEL ...`: an HTTP server with OpenAI's interface for one or several models."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bardling.cli.parse import note, parse
from bardling.errors import UserError
from bardling.files.paths import shell_path

if TYPE_CHECKING:
    from bardling.serve.models import Models
    from bardling.serve.server import Running

_RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL [MODEL ...]")]] = ()
    """Runs, each with all its checkpoints; checkpoints, model folders, gpt2 or USER/REPO on the hub. The first one is the
    default."""
    host: str = "127.0.0.1"
    """Address to listen on; other machines reach 0.0.0.0, which needs a key."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
    api_key: str | None = None
    """Key that clients must send. Other users of this machine see it here: better set BARDLING_API_KEY."""
    allow_origin: str = ""
    """Origin of other web pages that may use the server, such as https://example.org; default: none."""
    insecure: bool = False
    """Listen on an address that other machines reach, without a key."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Dtype of the weights in memory."""
    best: bool = False
    """Under a run's name, serve the checkpoint with the lowest validation loss instead of the latest."""
    slots: int = 16
    """Completions that a model generates at the same time."""
    queue: int = 64
    """Completions that may wait for a slot; further ones are refused with status 429."""
    memory_gb: float | None = None
    """Memory for all loaded models (10^9 bytes); idle ones are unloaded to stay below. Default: 70% of what is free."""
    max_body: int = 1 << 20
    """Largest body of a request (bytes)."""
    max_tokens: int | None = None
    """Most tokens generated per completion; default: what the model's context allows."""
    timeout: float = 300.0
    """Longest time for one request (seconds)."""
    drain: float = 30.0
    """Time for running requests to finish when the server is stopped (seconds)."""


def run(argv: Sequence[str]) -> None:
    options = parse(ServeOptions, argv, prog="bardling serve", description="Serve models over HTTP, with OpenAI's interface.")
    if not options.models:
        raise UserError(f"name a model to serve: {_existing_runs()}")
    try:
        from bardling.serve.server import serve
        from bardling.serve.settings import Settings
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "sse_starlette"):
            raise
        raise UserError(f"serving needs the package {error.name}: pip install 'bardling[serve]'") from None
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}
    names, memory = given.pop("models"), given.pop("memory_gb")
    if options.api_key is None:
        given["api_key"] = os.environ.get("BARDLING_API_KEY", "")
    settings = Settings(**given, memory=memory and int(memory * 1e9))

    def ready(running: "Running") -> None:
        _print_start(running.url, running.models, settings.api_key != "")

    serve(names, settings, ready=ready, note=note)


def _existing_runs() -> str:
    """What can be served: the runs in this folder."""
    files = sorted(_RUNS.glob("*/config.toml"), key=lambda file: file.stat().st_mtime, reverse=True)
    runs = [file.parent for file in files]
    if not runs:
        return "a run (there is none in runs/; `bardling train quickstart --out runs/first` makes one), or gpt2"
    shown = ", ".join(shell_path(path) for path in runs[:10])
    more = f" and {len(runs) - 10} more" if len(runs) > 10 else ""
    return f"`bardling serve {shell_path(runs[0])}`; runs here: {shown}{more}"


def _print_start(url: str, models: "Models", has_key: bool) -> None:
    from bardling.cli.tables import print_rows
    from bardling.monitor.format import size_bytes

    listed = models.catalog.models()
    first = listed[0].id
    limit = "" if models.limit is None else f" of {size_bytes(models.limit)}"
    rows = [
        ("address", url),
        ("models", ", ".join(model.id for model in listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")),
        ("memory", f"{size_bytes(models.size)}{limit} on {models.device}"),
        ("key", "needed" if has_key else "none needed"),
    ]
    print_rows(rows)
    key = ' -H "Authorization: Bearer $BARDLING_API_KEY"' if has_key else ""
    body = f'{{"model": "{first}", "prompt": "The", "max_tokens": 40}}'
    print(f"\ncurl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'\n")
    print(f"Next: open {url}/ in a browser, or run the command above; Ctrl-C stops the server.", flush=True)
