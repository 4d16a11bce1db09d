"""Generates text while the model trains: the same completions in every process; the primary one logs them."""

from bardling.config import SampleConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.evaluate.loss import Interrupted
from bardling.generation.generate import generate, prompt_ids
from bardling.model.gpt import evaluation_mode
from bardling.monitor.records import SampleRecord
from bardling.training.hooks.base import HookContext, TimedHook
from bardling.training.state import TrainState


class Sample(TimedHook):
    name = "sample"
    may_fail = True

    def __init__(self, run: HookContext, config: SampleConfig, tokenizer: Tokenizer) -> None:
        super().__init__(run, config.every)
        self._config, self._tokenizer = config, tokenizer

    def is_due(self, state: TrainState) -> bool:
        """Samples can be disabled, and then none are generated after the last step either."""
        return self._config.every > 0 and super().is_due(state)

    def work(self, state: TrainState) -> None:
        config, tokenizer, run = self._config, self._tokenizer, self.run
        prompt = prompt_ids(tokenizer, config.prompt)
        with evaluation_mode(state.model):
            steps = generate(
                state.model,
                [prompt] * config.num_samples,
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
        texts = [tokenizer.decode_after(prompt, [token for token in row if token is not None]) for row in rows]
        run.monitor.log(SampleRecord(state.step, config.prompt, texts))
