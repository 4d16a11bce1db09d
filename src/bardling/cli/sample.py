"""`bardling sample RUN`: let a trained model write, token by token as they are made."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bardling.cli.parse import parse
from bardling.config import SampleConfig
from bardling.errors import UserError


@dataclass(frozen=True)
class SampleOptions:
    """Options of `bardling sample`."""

    model: tyro.conf.Positional[str]
    """A run, a checkpoint, a model folder, gpt2 or USER/REPO on the hub, or a checkpoint of nanoGPT or nano-gpt."""
    prompt: str | None = None
    """Text to go on from; '-' reads it from standard input. Unset begins a new document."""
    prompt_file: Path | None = None
    """File to read the prompt from."""
    special: bool = False
    """Names of special tokens in the prompt, such as <|endoftext|>, mean these tokens instead of their letters."""
    max_new_tokens: int = 256
    """Longest sample (tokens)."""
    temperature: float = 0.8
    """Randomness: 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens may be drawn."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach this probability may be drawn."""
    num_samples: int = 1
    """Samples, made together in one batch."""
    seed: int | None = None
    """Seed of the draws; unset draws a new one and prints it."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format of matrix products."""
    best: bool = False
    """Use the checkpoint with the best validation loss instead of the newest."""


def run(argv: Sequence[str]) -> None:
    """Parse, load, write."""
    from bardling.cli.nanogpt import is_nanogpt, sample_options
    from bardling.interop.nanogpt_keys import SAMPLE_KEYS

    if is_nanogpt(argv, SAMPLE_KEYS):
        options = sample_options(argv)
    else:
        options = parse(SampleOptions, argv, prog="bardling sample", description="Let a trained model write.")
    prompt_text = _prompt(options)
    try:
        config = SampleConfig(
            prompt=prompt_text,
            num_samples=options.num_samples,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
    except UserError as error:  # the options have no section here
        raise UserError(str(error).removeprefix("sample.")) from None
    from bardling.checkpoint.load import load, run_of
    from bardling.data.tokenizer import StreamDecoder
    from bardling.distributed.device import choose_device, choose_precision
    from bardling.generate import generate, prompt_ids, will_slide

    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    loaded = load(options.model, best=options.best)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UserError(f"{options.model}: has no tokenizer: put its tokenizer.json into the model's folder")
    model = loaded.build().to(device)
    owner = run_of(Path(options.model))
    single_document = owner is not None and owner.dataset_record().get("train_documents") == 1
    # Text of one document has no end-of-text token that something could begin after.
    start = config.prompt or ("\n" if single_document else "")
    prompt = prompt_ids(tokenizer, start, allow_special=options.special)
    if will_slide(len(prompt), config.max_new_tokens, model.config.block_size):
        print(
            f"bardling: the text will outgrow the model's context of {model.config.block_size} tokens; "
            "what lies further back is forgotten as it goes on",
            file=sys.stderr,
        )
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    if options.seed is None:
        print(f"bardling: --seed {seed}", file=sys.stderr)
    decoders = [StreamDecoder(tokenizer) for _ in range(config.num_samples)]
    texts = ["" for _ in decoders]
    single = config.num_samples == 1
    if single:
        _write(config.prompt)
    for tokens in generate(
        model,
        [prompt] * config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eot_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        autocast=precision.autocast,
    ):
        for row, token in enumerate(tokens):
            if token is not None and token != tokenizer.eot_id:
                piece = decoders[row].push(token)
                texts[row] += piece
                if single:
                    _write(piece)
    for row, decoder in enumerate(decoders):  # bytes that were waiting for the rest of their character
        end = decoder.finish()
        texts[row] += end
        if single:
            _write(end)
    if single:
        _write("\n")
    else:
        for row, text in enumerate(texts):
            _write(f"--- sample {row + 1} of {config.num_samples} ---\n{config.prompt}{text}\n")


def _write(text: str) -> None:
    """Write at once: a reader watches the text grow."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompt(options: SampleOptions) -> str:
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt and --prompt_file: give one of them")
    if options.prompt_file is not None:
        from bardling.configfile import read_text_file

        return read_text_file(options.prompt_file)
    return sys.stdin.read() if options.prompt == "-" else options.prompt or ""
