"""Exceptions shared by the whole package, and suggestions for misspelt names.

`UserError` is for everything a user can cause and fix: the command line prints its message as one line and exits with status
2; library users see a `ValueError`. A good message names the file or key, the value found and the remedy. Any function that
reads a file or checks a value may raise it; docstrings mention it only where the reason is not obvious.
"""


class UserError(ValueError):
    """A problem in a configuration, a file or the environment that the user can fix."""


def closest(word: str, names: list[str]) -> str:
    """Return ` (did you mean 'x'?)` for the name most similar to `word`, or an empty string if none is similar.

    Case is ignored, and so is what follows the first dash of a name: H1000 is closer to H100-SXM than to A100.
    """
    import difflib  # imported here because most runs never need it

    word = word[:200]  # a longer word is no misspelt name, and the search takes time proportional to the square of its length

    def similarity(name: str) -> tuple[float, float]:
        texts = (name.lower(), name.split("-")[0].lower())
        whole, start = (difflib.SequenceMatcher(None, text, word.lower()).ratio() for text in texts)
        return max(whole, start), whole

    nearest = max(names, key=similarity, default="")
    return f" (did you mean {nearest!r}?)" if names and similarity(nearest)[0] >= 0.6 else ""


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` reports that memory has run out, in the host or on a GPU.

    PyTorch raises a `RuntimeError`; its allocators for CPUs on Linux, for CPUs on Windows and for GPUs word it differently.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class JobLost(RuntimeError):  # noqa: N818  names the event, not an error
    """Another process of the run died or hangs; the message names it. The run can be resumed."""


ONE_REQUEST = 1.0
"""Seconds in which further signals belong to the first: launchers and shells pass on what processes also get themselves."""


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C ended the command; `status` is its exit status, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number
