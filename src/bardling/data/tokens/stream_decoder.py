"""Ids to text one at a time, for text that appears while it is generated."""

import codecs
import json

from bardling.data.tokens.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes ids one at a time, holding back the bytes of a character until it is complete.

    The results of `push` followed by that of `finish` equal `Tokenizer.decode` of all ids. For tokenizers of kind 'other',
    whose decoding depends on context, the most recent tokens are decoded again with each new one. There, a run of byte tokens
    is held back until it ends, since a single invalid one among them changes the text of all.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # kind 'other': the tokens returned last, as context, then those held back
        self._returned = 0  # how many of them have been returned
        self._bytes_wait = '"ByteFallback"' in json.dumps(tokenizer.content.get("decoder"))

    def push(self, token: int) -> str:
        """Text completed by this token; may be empty."""
        if self._tokenizer.kind != "other":
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        self._ids.append(token)
        if self._bytes_wait and self._tokenizer.is_byte(token):
            return ""
        return self._new_text(final=False)

    def finish(self) -> str:
        """The text held back; an incomplete character becomes U+FFFD."""
        if self._tokenizer.kind != "other":
            return self._utf8.decode(b"", final=True)
        return self._new_text(final=True)

    def _new_text(self, *, final: bool) -> str:
        text, before = self._tokenizer.decode(self._ids), self._tokenizer.decode(self._ids[: self._returned])
        if not final and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._ids, self._returned = self._ids[self._returned :], len(self._ids) - self._returned
        return text[len(before) :]
