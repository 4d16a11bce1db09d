"""A conversation with a model: what has been said, and answers as they are generated.

With a chat template, turns become messages. Without one, a base model continues a text, to which each turn adds what is typed
and what the model wrote after it. Either way the oldest turns are dropped once the prompt leaves too little of the model's
context for an answer. An engine that retains finished texts does not compute the earlier turns again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from bardling.data.tokens.chat_template import ChatTemplate, chat_prompt_ids
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.generation.engine import Engine
from bardling.generation.generate import prompt_ids
from bardling.generation.requests import Request
from bardling.generation.sampling import Sampling

_ANSWER_FRACTION = 4  # at least the fourth part of the context is for the answer, unless answers are limited to less


@dataclass(frozen=True)
class Prompt:
    """What the model answers."""

    text: str  # what was typed
    ids: list[int]  # the whole conversation
    dropped: int  # how many of the oldest turns had to be dropped for it


class Conversation:
    """A conversation; one answer at a time.

    Args:
        template: of the model's chat; None: the model continues a text.
        sampling: of each answer, whose `max_new_tokens` is lowered to what fits into the context.
        context: tokens that the model can see, `block_size`.

    Attributes:
        system: the system message; empty: there is none.
        turns: what was typed and what the model answered.
        finish: why the last answer ended: 'stop', 'length', 'context' (the context is full), or None (it was interrupted).
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, sampling: Sampling, context: int
    ) -> None:
        self._engine, self._tokenizer, self._template = engine, tokenizer, template
        self._sampling, self._context = sampling, context
        self._room = min(sampling.max_new_tokens, max(1, context // _ANSWER_FRACTION))
        self._answers = 0
        self.system = ""
        self.turns: list[tuple[str, str]] = []
        self.finish: Literal["stop", "length", "context"] | None = None

    def prompt(self, text: str) -> Prompt:
        """The conversation with `text` as its newest turn, after the oldest turns are dropped if they do not fit.

        Raises:
            UserError: the text alone does not fit, or the template refuses it. The conversation is then unchanged.
        """
        most = self._context - self._room
        for dropped in range(len(self.turns) + 1):
            ids = self._ids(self.turns[dropped:], text)
            if len(ids) <= most:
                self.turns = self.turns[dropped:]
                return Prompt(text, ids, dropped)
        alone = f"the prompt has {len(ids):,} tokens without earlier turns"
        room = f"the model's context of {self._context:,} tokens has room for {most:,} and an answer"
        raise UserError(f"{alone}; {room}: shorten the text")

    def answer(self, prompt: Prompt, should_stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Generate the answer, piece by piece, and add the turn to the conversation.

        `should_stop` is called before each token; if it returns true, the answer ends. What was generated until then is kept.
        """
        room = self._context - len(prompt.ids) + 1  # the last token is never read by the model
        limit = min(self._sampling.max_new_tokens, room)
        request = Request(tuple(prompt.ids), replace(self._sampling, max_new_tokens=limit), index=self._answers)
        self._answers += 1
        pieces: list[str] = []
        self.finish = None
        number = self._engine.submit(request)
        try:
            while self.finish is None and not should_stop():
                for output in self._engine.step():
                    if output.finish is not None:
                        cut = output.finish == "length" and room < self._sampling.max_new_tokens
                        self.finish = "context" if cut else output.finish
                    pieces.append(output.text)
                    yield output.text
        finally:
            self._engine.cancel(number)
            self.turns.append((prompt.text, "".join(pieces)))

    def reset(self) -> None:
        """Forget all turns."""
        self.turns = []

    def content(self) -> dict[str, Any]:
        """The conversation as an object for a JSON file."""
        return {"text": self._plain_text(self.turns)} if self._template is None else {"messages": self._messages(self.turns)}

    def _ids(self, turns: list[tuple[str, str]], text: str) -> list[int]:
        if self._template is None:
            return prompt_ids(self._tokenizer, self._plain_text(turns) + text)
        messages = [*self._messages(turns), {"role": "user", "content": text}]
        return chat_prompt_ids(self._tokenizer, messages, self._template)

    def _messages(self, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
        said = [message for turn in turns for message in zip(("user", "assistant"), turn, strict=True)]
        all_of_them = [("system", self.system), *said] if self.system else said
        return [{"role": role, "content": content} for role, content in all_of_them]

    @staticmethod
    def _plain_text(turns: list[tuple[str, str]]) -> str:
        return "".join(f"{typed}{continued}\n" for typed, continued in turns)
