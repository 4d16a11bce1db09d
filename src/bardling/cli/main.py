"""`bardling COMMAND ...`: runs a command and turns errors into one line and an exit status.

Exit status: 0 success; 2 user errors; 129, 130, 138 and 143 stopped by SIGHUP, SIGINT, SIGUSR1 and SIGTERM; 1 anything else. A
command's module is imported only when it runs, so that `--help` does not import torch.
"""

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import bardling
from bardling.distributed.huge_pages import use_huge_pages
from bardling.distributed.openmp_spin import limit_spinning
from bardling.errors import ONE_REQUEST, JobLost, Terminated, UserError, closest, out_of_memory
from bardling.files.streams import open_standard_streams, tell

COMMANDS = {
    "train": "train a model from a recipe",
    "resume": "continue a run exactly where it stopped",
    "plan": "estimate parameters, FLOPs, memory, disk and time before a run",
    "bench": "measure training speed on this machine",
    "verify": "check on this machine that training is exact when resumed, split or compiled",
    "sample": "generate text with a trained model",
    "chat": "talk with a model in the terminal",
    "serve": "serve models over HTTP, with OpenAI's interface and a page",
    "eval": "evaluate a model on validation text and tasks",
    "export": "write a model in a format that other software loads",
    "prepare": "tokenize text into a dataset folder",
    "data": "check training data, and show what the model sees",
    "migrate": "translate a nanoGPT configuration into a recipe",
    "report": "draw training curves",
    "info": "describe a run, checkpoint or dataset, and verify checksums",
}

# Operating system errors that are user errors (status 2); any other is reported in the system's words (status 1).
_USER_ERRNOS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder you can write to",
    errno.EPERM: "permission denied: choose a folder you can write to",
    errno.ENOENT: "no such file or folder",
    errno.ENAMETOOLONG: "the name is too long: check the path",
    errno.ENOTDIR: "a component of this path is a file, not a folder",
    errno.EISDIR: "is a folder, not a file",
}


def usage() -> str:
    from bardling.config.recipes import recipe_names

    commands = "\n".join(f"  {command:<9} {summary}" for command, summary in COMMANDS.items())
    return (
        "usage: bardling COMMAND ... [--debug]\n\n"
        "Train GPTs: from raw text to a model that loads in standard tools.\n\n"
        f"commands:\n{commands}\n\n"
        f"recipes: {', '.join(recipe_names())}\n\n"
        "Get started:  bardling train quickstart --out runs/first\n"
        "              bardling sample runs/first\n\n"
        "`bardling COMMAND --help` lists a command's options; --debug shows the traceback of an error."
    )


def _fail(message: str, status: int) -> NoReturn:
    """Print one line and exit. Of several processes that refuse for the same reason, one prints it."""
    line = " ".join(map(str.strip, message.splitlines()))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if status == 2 and _several_processes():
        from bardling.distributed.refusals import one_voice

        with one_voice(line) as first:
            if first:
                tell(line)
    else:
        tell(line)
    sys.exit(status)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Raise `Terminated` on Ctrl-C and on schedulers' signals, so that cleanup runs; exit immediately on a later second signal.

    A signal during an import is delivered again after it: PyTorch imports NumPy from C, where an exception would be lost and
    leave a half-initialised module. During training, `training/recovery/signals.py` handles signals instead.
    """
    received, postponed = list[float](), list[int]()  # times (s), signals

    def receive(number: int, frame: FrameType | None) -> None:
        if number in postponed:
            postponed.remove(number)
        else:
            received.append(time.monotonic())
            if received[-1] - received[0] > ONE_REQUEST:
                os._exit(128 + number)
            if len(received) > 1:
                return
        if any(caller.f_code.co_filename.startswith("<frozen importlib") for caller, _ in traceback.walk_stack(frame)):
            postponed.append(number)
            timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            return
        raise Terminated(number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1 and no SIGHUP
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command: returns on success, else raises `SystemExit`. As a program (`argv` is None), it exits the process under
    torchrun and after a signal."""
    if argv is not None:
        _run(argv)
        return
    open_standard_streams()
    status = 0
    try:
        _run(None)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status < 128 and not _several_processes():
            raise
    if status >= 128 or _several_processes():
        # PyTorch's communication threads do not always survive normal interpreter shutdown: one process in some hundreds
        # aborted there after saving all its work, and torchrun considered the job failed. Its compiler, stopped by a signal,
        # would wait several seconds there for processes that it has just started.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _several_processes() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _run(argv: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        try:
            _command(arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        status = error.status if isinstance(error, Terminated) else 130
        if argv is None:  # running as a program, not called from Python
            # Threads of libraries may still be running, and some crash during normal interpreter shutdown.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            tell("interrupted")
            os._exit(status)
        _fail("interrupted", status)
    except Exception as error:
        lost = getattr(sys.stdout, "failure", None)
        if isinstance(lost or error, BrokenPipeError):  # the reader (`| head`) has exited
            sys.exit(1)
        if debug:
            raise
        _fail(*_describe(lost or error))


def _command(arguments: Sequence[str]) -> None:
    """Run the command that the arguments name."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"bardling {bardling.__version__}")
        return
    command = arguments[0]
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{closest(command, list(COMMANDS))}; choose from {', '.join(COMMANDS)}")
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            encoding = sys.getfilesystemencoding()
            remedy = "rename the file, or type the text again" if encoding == "utf-8" else "set PYTHONUTF8=1"
            raise UserError(f"argument {argument!a}: contains bytes that are not {encoding.upper()}: {remedy}")
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the working directory has been deleted: change to one that exists with cd") from None
    limit_spinning()
    use_huge_pages()
    with _signals():
        importlib.import_module(f"bardling.cli.{command}").run(arguments[1:])


def _describe(error: Exception) -> tuple[str, int]:
    """The message and the exit status for an error that ends a command."""
    match error:
        case UserError():
            return str(error), 2
        case JobLost():
            return str(error), 1
        case OSError():
            reason = _USER_ERRNOS.get(error.errno or 0)
            subject = f"{error.filename}: " if error.filename else ""
            return f"{subject}{reason or error.strerror or error}", 2 if reason else 1
    if out_of_memory(error):
        return "out of memory: lower the sizes of the model or the batch; `bardling plan RECIPE` shows what they need", 2
    return f"internal error: {type(error).__name__}: {error} (rerun with --debug for the traceback)", 1


if __name__ == "__main__":
    main()
