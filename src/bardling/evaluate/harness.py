"""Models of Bardling in the language model evaluation harness (lm-eval), as its model `bardling`.

lm-eval finds the model through the entry-point group `lm_eval.models`. Releases up to 0.4.13 do not read that group: with them,
`python -m bardling.evaluate` takes the place of `lm-eval` (see `__main__.py`).

Texts become tokens as in lm-eval's backend `hf`, so that both give the same log-likelihoods: names of special tokens in a text
are parsed, a text begins with what the tokenizer's post-processor puts there, spaces at the end of a context belong to its
continuation, an empty context is the token that begins a text, and a context that is too long loses its beginning. Beyond that,
a continuation longer than the block size is scored in parts, and a context shared by several continuations is computed once.
lm-eval's batch size has no meaning here: batches are measured in tokens. Generation is greedy unless a task asks for samples;
of a prompt that leaves no room for the longest answer, the model sees the end.

With several processes, the primary one runs lm-eval; the others call `follow` and take part in every forward pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lm_eval.models  # noqa: F401  registers lm-eval's own models, which it does itself only while there are no others
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from bardling.checkpoint.load import load
from bardling.data.tokens.chat_template import render_chat
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.context import Context
from bardling.distributed.device import choose_device, choose_precision
from bardling.errors import UserError
from bardling.evaluate.benchmarks import Subject
from bardling.evaluate.endings import Ids, score_pairs
from bardling.evaluate.loss import Interrupted
from bardling.generation.engine import Engine
from bardling.generation.requests import Request
from bardling.generation.sampling import Sampling
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

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "BardlingLM":
        """What `--model_args` says, and otherwise lm-eval's own settings, which always name a device."""
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **arg_dict})

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
        """For each (context, settings): the generated text, up to a stop string or the end of the text."""
        wanted = [request.args for request in requests]
        found = _generate(self.subject, *self.subject.context.broadcast((wanted, _GENERATE)))
        for arguments, text in zip(wanted, found, strict=True):
            self.cache_hook.add_partial("generate_until", arguments, text)
        return found

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; without a generation prompt, it ends within the last message, which the model continues."""
        text = render_chat(self.subject.tokenizer.interface, chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = str(chat_history[-1]["content"]).strip()
        return text[: text.rindex(last) + len(last)] if last in text else text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, which lm-eval records."""
        return self.subject.tokenizer.interface.chat_template if chat_template else None

    def _score(self, pairs: Sequence[Pair], label: str) -> list[tuple[float, bool]]:
        return _score(self.subject, *self.subject.context.broadcast((list(pairs), label)))

    def follow(self) -> Any:
        """In a process that is not the primary one: take part in its forward passes until it calls `finish`; returns what that
        was called with."""
        from_primary: Any = None
        while not isinstance(wanted := self.subject.context.broadcast(from_primary), _Finished):
            (_generate if wanted[1] == _GENERATE else _score)(self.subject, *wanted)
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
    if device.startswith("cuda") and not torch.cuda.is_available():  # lm-eval's command says cuda:0 unless told otherwise
        device = "auto"
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


class Texts:
    """Tokens of texts, as lm-eval's backend `hf` makes them: names of special tokens become these tokens.

    Raises:
        UserError: the tokenizer cannot represent a text, or an id is outside the model's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int) -> None:
        unique = list(dict.fromkeys(texts))
        special = {text for text in unique if tokenizer.control_tokens_in(text)}
        plain = [text for text in unique if text not in special]
        self._ids = dict(zip(plain, tokenizer.encode_batch(plain), strict=True))
        self._ids |= {text: tokenizer.encode(text, allow_special=True) for text in special}
        largest = max((int(ids.max()) for ids in self._ids.values() if len(ids)), default=0)
        if largest >= vocab_size:
            fault = f"the tokenizer's id {largest} is outside the model's vocabulary of {vocab_size}"
            raise UserError(f"{fault}: use the tokenizer that the model was trained with")
        self.first, self._start = tokenizer.interface.first, np.array(tokenizer.interface.start, np.int64)
        self._name = "" if self.first is None else tokenizer.decode([self.first])

    def alone(self, text: str) -> Ids:
        """A text without anything before it."""
        return self._ids[text]

    def begun(self, text: str) -> Ids:
        """A text as the post-processor begins it, unless that is written in it."""
        written = self._name and text.startswith(self._name)
        return self._ids[text] if written else np.concatenate([self._start, self._ids[text]])

    def beginning(self) -> Ids:
        """The token that begins a text, in place of an empty context."""
        if self.first is None:
            raise UserError("a context is empty, and the tokenizer has no token that begins a text")
        return np.array([self.first], np.int64)


def token_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], vocab_size: int) -> list[tuple[Ids, Ids]]:
    """The tokens of contexts, at least one each, and of their continuations; errors as in `Texts`."""
    split = [(None, text) if before is None else _without_spaces_at_the_end(before, text) for before, text in pairs]
    wanted = (text for before, after in split for text in ([before, before + after, after] if before else [after]))
    texts, found = Texts(tokenizer, wanted, vocab_size), []
    for before, after in split:
        if before is None:
            context, continuation = texts.beginning(), texts.begun(after)
        elif before:
            context, whole = texts.begun(before), texts.begun(before + after)
            # together with an unknown word at the end of the context, a continuation may become a single token
            continuation = whole[len(context) :] if len(whole) > len(context) else texts.alone(after)
        else:
            context, continuation = texts.beginning(), texts.alone(after)
            if len(continuation) and continuation[0] == texts.first:
                continuation = continuation[1:]
        found.append((context if len(context) else texts.beginning(), continuation))
    return found


def _without_spaces_at_the_end(before: str, after: str) -> tuple[str, str]:
    kept = before.rstrip()
    return kept, before[len(kept) :] + after


def _generate(subject: Subject, wanted: Sequence[tuple[str, Mapping[str, Any]]], label: str) -> list[str]:
    """The text that follows each context. All processes call this with the same arguments, and generate the same."""
    model, tokenizer, context = subject.model, subject.tokenizer, subject.context
    size, texts = model.config.block_size, Texts(tokenizer, (text for text, _ in wanted), model.config.vocab_size)
    engine = Engine(
        model,
        tokenizer,
        slots=_SLOTS.get(context.device.type, 16),
        autocast=subject.precision.autocast,
        agree=None if context.world_size == 1 else context.broadcast,
    )
    found, numbers = [""] * len(wanted), dict[int, int]()
    for number, (text, settings) in enumerate(wanted):
        sampling = _sampling(settings)
        room = size - sampling.max_new_tokens if sampling.max_new_tokens < size else max(size // 2, 1)
        prompt = texts.begun(text)[-room:] if text else texts.beginning()
        numbers[engine.submit(Request(tuple(map(int, prompt)), sampling, number))] = number
    done = 0
    while engine.running or engine.waiting:
        if context.any(subject.stop_requested()):
            raise Interrupted
        for output in engine.step():
            found[numbers[output.request]] += output.text
            done += output.finish is not None
        subject.progress(label, done, len(wanted))
    return found


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """A task's `generation_kwargs`; a `UserError` names one that has no equivalent."""
    values = dict(normalize_gen_kwargs(dict(settings)))
    stop = tuple(text for text in values.pop("until") if text)
    length, sampled, temperature = values.pop("max_gen_toks"), values.pop("do_sample"), values.pop("temperature", 0.0)
    filters = {name: values.pop(name) for name in _FILTERS if values.get(name) is not None}
    filters = {name: value for name, value in filters.items() if (name, value) != ("top_k", 0)}  # 0 means off
    if values.pop("num_beams", 1) != 1 or values:
        name = next(iter(values), "num_beams")
        raise UserError(f"generation_kwargs: {name} is not supported; remove it with --gen_kwargs or in the task's file")
    return Sampling(length, float(temperature) if sampled else 0.0, stop=stop, **filters)


_FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
_SLOTS = {"cuda": 64}
_GENERATE = "generate_until"
