"""Generates text while the model trains: the same completions in every process; the primary one logs them."""

from collections.abc import Sequence
from dataclasses import dataclass

from bardling.config import SampleConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.evaluate.loss import Interrupted
from bardling.generation.generate import generate, prompt_ids
from bardling.model.gpt import evaluation_mode
from bardling.monitor.records import SampleRecord
from bardling.training.hooks.base import HookContext, TimedHook
from bardling.training.state import TrainState


@dataclass(frozen=True)
class Prompt:
    text: str  # as it is logged
    ids: list[int]
    is_chat: bool = False  # a question, whose answer ends without the name of a token


class Sample(TimedHook):
    name = "sample"
    may_fail = True

    def __init__(
        self, run: HookContext, config: SampleConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt] | None = None
    ) -> None:
        """`prompts` has one for each completion; None for the prompt of `config`."""
        super().__init__(run, config.every)
        self._config, self._tokenizer = config, tokenizer
        self._prompts = prompts

    def is_due(self, state: TrainState) -> bool:
        """Samples can be disabled, and then none are generated after the last step either."""
        return self._config.every > 0 and super().is_due(state)

    def work(self, state: TrainState) -> None:
        config, tokenizer, run = self._config, self._tokenizer, self.run
        prompts = self._prompts or [Prompt(config.prompt, prompt_ids(tokenizer, config.prompt))] * config.num_samples
        with evaluation_mode(state.model):
            steps = generate(
                state.model,
                [prompt.ids for prompt in prompts],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                eot_id=tokenizer.interface.eos,
                vocab_size=tokenizer.vocab_size,
                seed=run.seed + state.step,
                autocast=run.precision.autocast,
                should_stop=lambda: run.context.any(run.stop_requested()),  # all processes stop at the same token
                agree=run.context.broadcast,
            )
            rows = list(zip(*steps, strict=True))
        if run.context.any(run.stop_requested()):
            raise Interrupted
        ends = set(tokenizer.interface.eos) if prompts[0].is_chat else set()
        texts: dict[str, list[str]] = {}
        for prompt, row in zip(prompts, rows, strict=True):
            completion = [token for token in row if token is not None and token not in ends]
            texts.setdefault(prompt.text, []).append(tokenizer.decode_after(prompt.ids, completion))
        for text, found in texts.items():
            run.monitor.log(SampleRecord(state.step, text, found))
