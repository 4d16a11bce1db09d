"""Generates text while the model trains."""

from bardling.config import SampleConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.generation.generate import generate, prompt_ids
from bardling.model.gpt import evaluation_mode
from bardling.monitor.records import SampleRecord
from bardling.training.hooks.base import HookContext, TimedHook
from bardling.training.recovery.signals import Stopped
from bardling.training.state import TrainState


class Sample(TimedHook):
    """Generates the same completions in every process; the primary one logs them."""

    name = "sample"

    def __init__(self, run: HookContext, config: SampleConfig, tokenizer: Tokenizer) -> None:
        super().__init__(run, config.every)
        self._config, self._tokenizer = config, tokenizer

    def is_due(self, state: TrainState) -> bool:
        """Samples can be disabled, and then none are generated after the last step either."""
        return self._config.every > 0 and super().is_due(state)

    def work(self, state: TrainState) -> None:
        """Generate the completions of this step; they are the same in every repetition of the run."""
        config, tokenizer, run = self._config, self._tokenizer, self.run
        prompt = prompt_ids(tokenizer, config.prompt)
        rows: list[list[int]] = [[] for _ in range(config.num_samples)]
        with evaluation_mode(state.model):
            for tokens in generate(
                state.model,
                [prompt] * config.num_samples,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                eot_id=tokenizer.eot_id,
                vocab_size=tokenizer.vocab_size,
                seed=run.seed + state.step,
                autocast=run.precision.autocast,
                should_stop=lambda: run.context.any(run.stop_requested()),  # all processes stop at the same token
                agree=run.context.broadcast,
            ):
                for row, token in zip(rows, tokens, strict=True):
                    if token is not None:
                        row.append(token)
        if run.context.any(run.stop_requested()):
            raise Stopped
        run.monitor.log(SampleRecord(state.step, config.prompt, [tokenizer.decode(row) for row in rows]))
