"""The text of a completion as it is generated, up to a stop string."""

from collections.abc import Sequence

from bardling.data.tokens.stream_decoder import StreamDecoder
from bardling.data.tokens.tokenizer import Tokenizer

_CONTEXT = 32  # tokens of the prompt that the text follows: enough to complete a character, and to know what begins a word


class TextStream:
    """Decodes the tokens of a completion one at a time.

    Text that may begin a stop string is held back until the following text decides. `stopped` is true once a stop string has
    occurred; neither it nor what follows it is returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        for token in prompt[-_CONTEXT:]:
            self._decoder.push(token)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes."""
        return self._release(self._decoder.push(token), final=False)

    def finish(self) -> str:
        """The text held back; an incomplete character becomes U+FFFD."""
        return self._release(self._decoder.finish(), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        kept = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        released, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
