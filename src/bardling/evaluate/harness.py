"""Models of Bardling in the language model evaluation harness (lm-eval), as its model `bardling`.

lm-eval finds the model through the entry-point group `lm_eval.models`. Releases up to 0.4.13 do not read that group: with them,
`python -m bardling.evaluate` takes the place of `lm-eval` (see `__main__.py`).

Texts become tokens as in lm-eval's backend `hf`, so that both give the same log-likelihoods: names of special tokens in a text
are parsed, a text begins with what the tokenizer's post-processor puts there, spaces at the end of a context belong to its
continuation, an empty context is the token that begins a text, and a context that is too long loses its beginning. Beyond that,
a continuation longer than the block size is scored in parts, and a context shared by several continuations is computed once.
lm-eval's batch size has no meaning here: batches are measured in tokens.

With several processes, the primary one runs lm-eval; the others call `follow` and take part in every forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lm_eval.models  # noqa: F401  registers lm-eval's own models, which it does itself only while there are no others
import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from bardling.checkpoint.load import load
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.context import Context
from bardling.distributed.device import choose_device, choose_precision
from bardling.errors import UserError
from bardling.evaluate.benchmarks import Subject
from bardling.evaluate.endings import Ids, score_pairs
from bardling.monitor.progress import ProgressBar

Pair = tuple[str | None, str]
"""A context and its continuation; without a context, a whole text."""


@register_model("bardling")
class BardlingLM(LM):  # type: ignore[misc]
    """A model for lm-eval: `--model_args path=RUN`, where RUN is anything that `bardling eval` takes as a model.

    Args:
        path: the model to open, unless an open one is given as `subject`.
        best: of a run, use the checkpoint with the lowest validation loss.
        device, precision: as in `bardling eval`; float32 by default, which gives the log-likelihoods of `hf`.
        batch_size, max_batch_size: accepted, since lm-eval passes them, and not used.
    """

    def __init__(
        self,
        path: str = "",
        *,
        subject: Subject | None = None,
        best: bool = False,
        device: str = "auto",
        precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        super().__init__()
        self.subject = subject or _opened(path, best, device, precision)
        self._device = self.subject.context.device

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at a time."""
        return self.subject.model.config.block_size

    @property
    def tokenizer_name(self) -> str:
        return self.subject.tokenizer.data_key

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood (nats), and whether greedy decoding would generate it."""
        pairs = [request.args for request in requests]
        found = self._score(pairs, "loglikelihood")
        for pair, answer in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text (nats), after the token that begins a text."""
        texts = [request.args[0] for request in requests]
        found = [total for total, _ in self._score([(None, text) for text in texts], "loglikelihood_rolling")]
        for text, total in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError

    def _score(self, pairs: Sequence[Pair], label: str) -> list[tuple[float, bool]]:
        return _score(self.subject, *self.subject.context.broadcast((list(pairs), label)))

    def follow(self) -> Any:
        """In a process that is not the primary one: take part in its forward passes until it calls `finish`; returns what that
        was called with."""
        from_primary: Any = None
        while not isinstance(wanted := self.subject.context.broadcast(from_primary), _Finished):
            _score(self.subject, *wanted)
        return wanted.result

    def finish(self, result: Any) -> None:
        """In the primary process: let the others return from `follow`."""
        self.subject.context.broadcast(_Finished(result))


@dataclass(frozen=True)
class _Finished:
    result: Any


def _opened(path: str, best: bool, device: str, precision: Literal["auto", "float32", "bfloat16", "float16"]) -> Subject:
    if not path:
        raise UserError("--model_args: name the model, as in --model_args path=runs/first")
    loaded, chosen = load(path, best=best), choose_device(device)
    model, bar = loaded.build().to(chosen), ProgressBar(unit="contexts")
    return Subject(
        model,
        loaded.needed_tokenizer(),
        choose_precision(precision, chosen),
        Context(0, 1, chosen),
        progress=bar.update,
    )


def _score(subject: Subject, pairs: Sequence[Pair], label: str) -> list[tuple[float, bool]]:
    """Log-likelihoods, and whether all tokens are the likeliest. All processes call this with the same arguments."""
    found = score_pairs(
        subject.model,
        token_pairs(subject.tokenizer, pairs, subject.model.config.vocab_size),
        precision=subject.precision,
        context=subject.context,
        stop_requested=subject.stop_requested,
        progress=subject.reporting(label),
    )
    return [(-score.loss, score.greedy) for score in found]


def token_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], vocab_size: int) -> list[tuple[Ids, Ids]]:
    """The tokens of contexts, at least one each, and of their continuations.

    Raises:
        UserError: the tokenizer cannot represent a text, an id is outside the model's vocabulary, or an empty context has no
            token to begin with.
    """
    split = [(None, text) if before is None else _without_spaces_at_the_end(before, text) for before, text in pairs]
    texts = {text for before, after in split for text in ([after] if not before else [before, before + after, after])}
    ids = _encode(tokenizer, list(texts))
    first, about = tokenizer.interface.first, tokenizer.interface
    name = "" if first is None else tokenizer.decode([first])

    def begun(text: str) -> Ids:  # as the post-processor begins a text, unless that is written in it
        start = () if name and text.startswith(name) else about.start
        return np.concatenate([np.array(start, np.int64), ids[text]])

    found = []
    for before, after in split:
        if before:
            context, whole = begun(before), begun(before + after)
            # together with an unknown word at the end of the context, a continuation may become a single token
            continuation = whole[len(context) :] if len(whole) > len(context) else ids[after]
        else:
            context, continuation = np.zeros(0, np.int64), begun(after) if before is None else ids[after]
            if before is not None and len(continuation) and continuation[0] == first:
                context, continuation = continuation[:1], continuation[1:]
        if not len(context):
            if first is None:
                raise UserError("a context is empty, and the tokenizer has no token that begins a text")
            context = np.array([first], np.int64)
        if (largest := max((int(row.max()) for row in (context, continuation) if len(row)), default=0)) >= vocab_size:
            fault = f"the tokenizer's id {largest} is outside the model's vocabulary of {vocab_size}"
            raise UserError(f"{fault}: use the tokenizer that the model was trained with")
        found.append((context, continuation))
    return found


def _without_spaces_at_the_end(before: str, after: str) -> tuple[str, str]:
    kept = before.rstrip()
    return kept, before[len(kept) :] + after


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Ids]:
    """The tokens of each text, where names of special tokens become these tokens."""
    special = {text for text in texts if tokenizer.control_tokens_in(text)}
    plain = [text for text in texts if text not in special]
    found = dict(zip(plain, tokenizer.encode_batch(plain), strict=True))
    return found | {text: tokenizer.encode(text, allow_special=True) for text in special}
