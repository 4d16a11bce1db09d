"""`bardling VERB ...`: finds the verb, runs it, and turns errors into one line and an exit status.

Exit status: 0 done; 2 something the user can put right; 130, 138 and 143 stopped by SIGINT, SIGUSR1 and SIGTERM; 1 anything
else. A verb's module is imported only when it is called, so that help answers without importing torch.
"""

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from bardling.distributed.waiting import sleep_sooner
from bardling.errors import JobLost, Terminated, UserError, closest

VERBS = {
    "train": "train a model by a recipe",
    "resume": "go on with a run, exactly where it stopped",
    "plan": "work out what a run will need, before it starts",
    "bench": "measure how fast a recipe trains on this machine",
    "verify": "show on this machine that a recipe trains exactly, however it is split or stopped",
    "sample": "let a trained model write",
    "eval": "measure a model on held-out text",
    "export": "write a model in the form that other software opens",
    "prepare": "turn text into a dataset of tokens",
    "migrate": "translate a nanoGPT configuration into a recipe",
    "report": "draw the training curve of runs",
    "info": "say what a run, a checkpoint or a dataset is",
}

# The user can do something about these; anything else that the system refuses is reported as it is.
_FIXABLE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "is a folder, not a file",
}


def usage() -> str:
    """The text of `bardling --help`."""
    from bardling.configfile import recipe_names

    verbs = "\n".join(f"  {verb:<9} {what}" for verb, what in VERBS.items())
    return (
        "usage: bardling VERB ... [--debug]\n\n"
        "Trains GPTs: from raw text to a model that other software opens.\n\n"
        f"verbs:\n{verbs}\n\n"
        f"recipes: {', '.join(recipe_names())}\n\n"
        "First steps:  bardling train quickstart --out runs/first\n"
        "              bardling sample runs/first\n\n"
        "`bardling VERB --help` explains a verb; --debug shows the traceback of an error."
    )


def _fail(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print(f"bardling: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """End by the usual way out, which tidies up, on Ctrl-C and on the signals of schedulers; a second one ends at once.

    A signal within an import is answered after it: PyTorch imports NumPy from C, where what is raised would be lost and leave
    half a module behind. While a run trains, `train/signals.py` answers them instead.
    """
    received, again = list[int](), list[int]()

    def receive(number: int, frame: FrameType | None) -> None:
        if number in again:
            again.remove(number)
        else:
            received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        if _imports(frame):
            again.append(number)
            waker = threading.Timer(0.05, os.kill, (os.getpid(), number))
            waker.daemon = True
            waker.start()
            return
        raise Terminated(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _imports(frame: FrameType | None) -> bool:
    """Whether an import is under way in `frame` or what called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; ends by returning (status 0) or by `SystemExit`; one of several processes ends at once."""
    if argv is not None or os.environ.get("WORLD_SIZE", "1") == "1":
        _command(argv)
        return
    status = 0
    try:
        _command(None)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    # PyTorch's threads between processes do not always survive Python's usual end: one process in some hundreds aborted there,
    # its work done and saved, and torchrun took the job for failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _command(argv: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"bardling {version('bardling')}")
        return
    verb = arguments[0]
    try:
        if verb not in VERBS:
            raise UserError(f"{verb!r} is no verb{closest(verb, list(VERBS))}; there are {', '.join(VERBS)}")
        sleep_sooner()
        with _signals():
            importlib.import_module(f"bardling.cli.{verb}").run(arguments[1:])
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except BrokenPipeError:
        # The reader (`| head`) has left; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as error:
        status = error.status if isinstance(error, Terminated) else 130
        if argv is None:  # a process of its own
            # A library's threads may be at work still, and Python's usual end, which they do not expect, would crash some.
            sys.stdout.flush()
            print("bardling: interrupted", file=sys.stderr, flush=True)
            os._exit(status)
        _fail("interrupted", status)
    except JobLost as error:
        if debug:
            raise
        _fail(str(error), 1)
    except OSError as error:
        if debug:
            raise
        reason = _FIXABLE.get(error.errno or 0)
        subject = f"{error.filename}: " if error.filename else ""
        _fail(f"{subject}{reason or error}", 2 if reason else 1)
    except Exception as error:  # the last line of defence: one line for the user, the traceback on request
        if debug:
            raise
        _fail(f"internal error: {type(error).__name__}: {error} (run again with --debug for the traceback)", 1)
