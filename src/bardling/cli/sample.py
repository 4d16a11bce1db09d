"""`bardling sample RUN`: generate text with a trained model and print it token by token."""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bardling.cli.parse import Model, note, parse
from bardling.config import SampleConfig
from bardling.errors import UserError
from bardling.files.prompt import read_prompt_file, read_prompt_input

if TYPE_CHECKING:
    from bardling.data.tokens.tokenizer import Tokenizer


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
    sampling = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}
    try:
        config = SampleConfig(prompt=_prompt(options), num_samples=options.num_samples, **sampling)
    except UserError as error:  # this command's options have no section
        raise UserError(str(error).removeprefix("sample.")) from None
    from bardling.checkpoint.load import load, run_of
    from bardling.distributed.device import choose_device, choose_precision, keep_freed_memory
    from bardling.distributed.threads import cpu_quota, limit_threads
    from bardling.generation.generate import generate, prompt_ids, will_slide
    from bardling.generation.weights import choose_weights, convert_weights

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
    model = convert_weights(loaded.build().to(device), weights)
    run_folder = run_of(options.model)
    single_document = run_folder is not None and run_folder.dataset_record().get("train_documents") == 1
    # A model trained on one document has never seen an end-of-text token, so it cannot start from one.
    line_break = single_document and not tokenizer.interface.start
    try:
        prompt = prompt_ids(tokenizer, config.prompt or ("\n" if line_break else ""), allow_special=options.special)
    except UserError as error:
        where = "--prompt" if options.prompt_file is None else f"prompt file {options.prompt_file}"
        raise UserError(f"{where}: {error}") from error
    if will_slide(len(prompt), config.max_new_tokens, model.config.block_size):
        context = model.config.block_size
        note(f"the text will exceed the model's context of {context} tokens; the model then sees only the most recent ones")
    seed = options.seed
    if seed is None:
        seed = secrets.randbelow(2**31)
        note(f"--seed {seed}")
    steps = generate(
        model,
        [prompt] * config.num_samples,
        **sampling,
        eot_id=tokenizer.interface.eos,
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        autocast=precision.autocast,
    )
    shown = prompt[len(tokenizer.interface.start) :] if config.prompt else []
    _print_texts(steps, tokenizer, prompt, len(shown), config.num_samples)


def _print_texts(
    steps: Iterable[Sequence[int | None]], tokenizer: "Tokenizer", prompt: Sequence[int], shown: int, num_samples: int
) -> None:
    """Print a single completion as it is generated, and several once all are complete.

    Args:
        steps: the next token of each completion; None for those that have ended.
        prompt: the tokens before them, of which the last `shown` are printed too.
    """
    from bardling.data.tokens.tokenizer import StreamDecoder

    decoders = [StreamDecoder(tokenizer) for _ in range(num_samples)]
    texts = [""] * num_samples

    def add(row: int, piece: str) -> None:
        texts[row] += piece
        if num_samples == 1:
            print(piece, end="", flush=True)

    for row, decoder in enumerate(decoders):
        if shown:
            add(row, "".join(map(decoder.push, prompt[len(prompt) - shown :])))
        else:
            for before in prompt:  # the text goes on after them
                decoder.push(before)
    for tokens in steps:
        for row, token in enumerate(tokens):
            if token is not None and token not in tokenizer.interface.eos:
                add(row, decoders[row].push(token))
    for row, decoder in enumerate(decoders):
        add(row, decoder.finish())  # bytes of an incomplete character
    if num_samples == 1:
        print()
        return
    for row, text in enumerate(texts, 1):
        print(f"--- sample {row} of {len(texts)} ---\n{text}")


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
