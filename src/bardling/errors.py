"""The one exception for what a user can cause and put right.

The command line prints its message as one line and exits with status 2; a library user sees an ordinary `ValueError`.
A good message names the file or key, the value that was found, and the remedy.
"""


class UserError(ValueError):
    """Something in a configuration, a file or the environment that the user can change."""


def closest(word: str, names: list[str]) -> str:
    """Return ` (did you mean 'x'?)` for the entry of `names` most like `word`, or nothing when none is close.

    Case does not count, and what follows the first dash of a name may be missing: H1000 is more like H100-SXM than like A100.
    """
    import difflib  # here, because most runs never make this mistake

    matcher = difflib.SequenceMatcher(b=word.lower())

    def likeness(text: str) -> float:
        matcher.set_seq1(text.lower())
        return matcher.ratio()

    ratios = [(max(likeness(name), likeness(name.split("-")[0])), likeness(name), -place) for place, name in enumerate(names)]
    ratio, _, place = max(ratios, default=(0.0, 0.0, 0))
    return f" (did you mean {names[-place]!r}?)" if ratio >= 0.6 else ""


class JobLost(RuntimeError):  # noqa: N818  what happened, not what is wrong
    """Another process of the run has died or hangs; the message names it, and the run can be resumed."""


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C has asked the command to end; `status` is what it exits with: 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number
