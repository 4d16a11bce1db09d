"""`bardling sample RUN`: generate text with a trained model and print it token by token."""

import math
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bardling.cli.parse import Model, Texts, note, parse, require_options
from bardling.cli.tables import columns, show_table
from bardling.errors import UserError
from bardling.files.prompt import read_prompt_file, read_prompt_input
from bardling.files.streams import escape_unprintable
from bardling.monitor.format import percent

if TYPE_CHECKING:
    from bardling.data.tokens.tokenizer import Tokenizer
    from bardling.generation.engine import Engine
    from bardling.generation.requests import Output, TokenLogprob

_MOST_SLOTS = 64  # completions that are generated at the same time
_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "logprobs")


@dataclass(frozen=True)
class SampleOptions:
    model: Model
    """A run, a checkpoint, a model folder, gpt2 or USER/REPO on the hub, or a nanoGPT or nano-gpt checkpoint."""
    prompt: str | None = None
    """Text to continue; '-' reads it from standard input. Default: start a new document."""
    prompt_file: Path | None = None
    """File or pipe to read the prompt from, at most 16 MiB."""
    special: bool = False
    """Parse special tokens in the prompt, such as <|endoftext|>, instead of treating them as plain text."""
    max_new_tokens: int = 256
    """Maximum length of a completion (tokens)."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: int | None = None
    """Sample only from the k most likely tokens."""
    top_p: float | None = None
    """Sample only from the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Sample only from tokens with at least this fraction of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that occur in the prompt or the completion less likely."""
    stop: Texts = ()
    """Text that ends a completion, which does not include it; repeat the option for several."""
    logprobs: int | None = None
    """Print a table of the generated tokens with their probabilities, and of the N most likely tokens in each place."""
    num_samples: int = 1
    """Number of completions, generated in one batch."""
    seed: int | None = None
    """Sampling seed; default: a random one, which is printed."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Dtype of matrix multiplications."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "float32"
    """Dtype of the weights: int8 or bfloat16 generate faster, with slightly different logits; auto: the fastest here."""
    best: bool = False
    """Use the checkpoint with the lowest validation loss instead of the latest."""


def run(argv: Sequence[str]) -> None:
    from bardling.cli.nanogpt import is_nanogpt
    from bardling.interop.nanogpt_keys import SAMPLE_KEYS

    if is_nanogpt(argv, SAMPLE_KEYS):
        options = nanogpt_options(argv)
    else:
        options = parse(SampleOptions, argv, prog="bardling sample", description="Generate text with a trained model.")
    require_options(1, options, "num_samples")
    text = _prompt(options)
    from bardling.checkpoint.load import load, run_of
    from bardling.distributed.device import choose_device, choose_precision, keep_freed_memory
    from bardling.distributed.threads import limit_threads
    from bardling.files.cpu_quota import cpu_quota
    from bardling.generation.engine import Engine
    from bardling.generation.generate import prompt_ids, will_slide
    from bardling.generation.requests import Request
    from bardling.generation.sampling import Sampling
    from bardling.generation.weights import choose_weights, convert_weights

    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    sampling = Sampling(**{name: getattr(options, name) for name in _SAMPLING}, seed=seed)
    device = choose_device(options.device)
    if device.type == "cpu":
        limit_threads(cpu_quota())
        keep_freed_memory()
    precision = choose_precision(options.precision, device)
    loaded = load(options.model, best=options.best)
    tokenizer = loaded.needed_tokenizer()
    weights, why = choose_weights(options.weights, device)
    if options.weights == "auto":
        note(f"--weights {weights}: {why}")
    slots = min(options.num_samples, _MOST_SLOTS)
    model = convert_weights(loaded.build().to(device), weights, slots if precision.name == "float32" else 1)
    run_folder = run_of(options.model)
    single_document = run_folder is not None and run_folder.dataset_record().get("train_documents") == 1
    # A model trained on one document has never seen an end-of-text token, so it cannot start from one.
    line_break = single_document and not tokenizer.interface.start
    try:
        prompt = prompt_ids(tokenizer, text or ("\n" if line_break else ""), allow_special=options.special)
    except UserError as error:
        where = "--prompt" if options.prompt_file is None else f"prompt file {options.prompt_file}"
        raise UserError(f"{where}: {error}") from error
    if will_slide(len(prompt), sampling.max_new_tokens, model.config.block_size):
        context = model.config.block_size
        note(f"the text will exceed the model's context of {context} tokens; the model then sees only the most recent ones")
    if options.seed is None:
        note(f"--seed {seed}")
    engine = Engine(model, tokenizer, slots=slots, autocast=precision.autocast)
    numbers = [engine.submit(Request(tuple(prompt), sampling, index)) for index in range(options.num_samples)]
    shown = tokenizer.decode(prompt[len(tokenizer.interface.start) :]) if text else ""
    _Printer(tokenizer, shown, numbers).print_all(engine)


class _Printer:
    """Prints completions in their order, each as it is generated: while one is shown, those after it are generated too."""

    def __init__(self, tokenizer: "Tokenizer", prompt: str, numbers: Sequence[int]) -> None:
        self._tokenizer, self._prompt, self._numbers = tokenizer, prompt, numbers
        self._texts = dict.fromkeys(numbers, "")  # generated, not printed yet
        self._tokens: dict[int, list[TokenLogprob]] = {number: [] for number in numbers}
        self._ended: set[int] = set()
        self._terminal = sys.stdout.isatty()

    def print_all(self, engine: "Engine") -> None:
        for place, number in enumerate(self._numbers, 1):
            if len(self._numbers) > 1:
                print(f"--- sample {place} of {len(self._numbers)} ---")
            self._print(self._prompt)
            self._print(self._texts.pop(number))
            while number not in self._ended:
                for output in engine.step():
                    self._take(output, current=number)
            print()
            if self._tokens[number]:
                self._print_tokens(self._tokens[number])

    def _take(self, output: "Output", current: int) -> None:
        if output.request == current:
            self._print(output.text)
        else:
            self._texts[output.request] += output.text
        if output.logprob is not None:
            self._tokens[output.request].append(output.logprob)
        if output.finish is not None:
            self._ended.add(output.request)

    def _print(self, text: str) -> None:
        """Print generated text: unchanged in a file or a pipe, but no control characters on a terminal."""
        print(escape_unprintable(text, sys.stdout.encoding) if self._terminal else text, end="", flush=True)

    def _print_tokens(self, tokens: "Sequence[TokenLogprob]") -> None:
        """A table of the generated tokens and the likeliest ones in their places."""
        table = columns("token", "probability", "log-probability")
        if any(token.top for token in tokens):
            table.add_column("most likely")
        for token in tokens:
            assert token.logprob is not None
            likely = "  ".join(f"{self._name(other)} {percent(math.exp(logprob))}" for other, logprob in token.top)
            probability = percent(math.exp(token.logprob))
            cells = (self._name(token.token), probability, f"{round(token.logprob, 4) + 0.0:.4f}", likely)  # + 0.0: never -0.0
            table.add_row(*cells[: len(table.columns)])
        print()
        show_table(table)

    def _name(self, token: int) -> str:
        """A token in quotes; bytes of an incomplete character as escapes."""
        data = self._tokenizer.token_bytes(token)
        try:
            return repr(data.decode())
        except UnicodeDecodeError:
            return repr(data)


def _prompt(options: SampleOptions) -> str:
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt_file: give only one of them")
    if options.prompt_file is not None:
        return read_prompt_file(options.prompt_file)
    return read_prompt_input() if options.prompt == "-" else options.prompt or ""


def nanogpt_options(argv: Sequence[str]) -> SampleOptions:
    """Translate a nanoGPT sampling command."""
    from bardling.interop.nanogpt import sample_from_nanogpt
    from bardling.interop.nanogpt_keys import SAMPLE_KEYS
    from bardling.interop.python_config import read_nanogpt_arguments

    options = sample_from_nanogpt(read_nanogpt_arguments(argv, SAMPLE_KEYS))
    if options.pop("compile"):
        note("compile = True: ignored; sampling is not compiled (nor is it in nanoGPT, despite this setting)")
    return SampleOptions(**options, special=True)  # nanoGPT parses <|endoftext|> in a prompt as the token
