"""What a configuration leaves open, decided: vocabulary, number format, compilation, the shape of weights to start from.

The decisions are written into the run's configuration, so that a resumed run computes as before. Where several processes could
decide differently, all do as the primary one.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

from bardling.checkpoint.load import Loaded
from bardling.checkpoint.runfolder import RunFolder
from bardling.config import ModelConfig, RunConfig
from bardling.data.shards import TokenDataset
from bardling.data.tokenizer import Tokenizer, load_tokenizer
from bardling.distributed.context import Context
from bardling.distributed.device import DTYPES, Precision, choose_precision, device_name, matmul_flops
from bardling.errors import UserError
from bardling.model.arithmetic import flops_per_token, fp8_layers, recomputed_flops_per_token
from bardling.model.peaks import peak_flops
from bardling.optim.build import settle_muon_precision
from bardling.train.compiling import asked_to_compile, compile_pays
from bardling.train.plan import make_plan


@dataclass(frozen=True)
class Resolved:
    """A configuration with nothing left open, and why it is as it is."""

    config: RunConfig
    precision: Precision
    peak_flops: float | None  # of one process's device in this precision (FLOP/s); None when unknown
    compile_why: str
    changes: tuple[str, ...]  # where weights to start from ruled over what was asked


def settle_vocabulary(
    dataset: TokenDataset, vocab_size: int, start: Loaded | None, resumed: RunFolder | None
) -> Tokenizer | None:
    """The dataset's tokenizer; tokens of unknown origin follow the model that is there already.

    A nanoGPT folder without a meta.pkl passes for having nanoGPT's vocabulary, which is GPT-2's rounded up to a multiple of 64.
    For a model with GPT-2's own, the ids must be below that (each read checks it), and its tokenizer is theirs.

    Args:
        vocab_size: of the model that is there; 0 when there is none.
        start: weights that the run starts from.
        resumed: the run that goes on.
    """
    tokenizer = dataset.tokenizer
    if tokenizer is not None or dataset.vocab_size != -(-vocab_size // 64) * 64:
        return tokenizer
    dataset.vocab_size = vocab_size
    if start is not None:
        tokenizer = start.tokenizer
    elif resumed is not None and (resumed.path / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(resumed.path)
    return None if tokenizer is not None and tokenizer.vocab_size < vocab_size else tokenizer


def resolve(
    config: RunConfig, dataset: TokenDataset, tokenizer: Tokenizer | None, start: Loaded | None, context: Context
) -> Resolved:
    """Decide every `auto` of `config`.

    Raises:
        UserError: the vocabulary, or the weights to start from, do not fit the dataset; or the device cannot do what is asked.
    """
    vocab_size = dataset.vocab_size
    if config.model.vocab_size and config.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the tokenizer's {vocab_size}: "
            "leave it out, or set it to at least that"
        )
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size).resolved()
    changes: tuple[str, ...] = ()
    if start is not None:
        model, changes = _started_model(config.model, start, dataset, tokenizer)
    left = fp8_layers(model)[1] if config.fp8 else None
    precision = choose_precision(config.precision, context.device, fp8_but=left)
    # As the primary measured it: processes must not compute in different formats.
    name, why = context.broadcast((precision.name, precision.why))
    precision = dataclasses.replace(precision, name=name, why=why)
    if context.device.type == "cpu":
        peak: float | None = matmul_flops(context.device, DTYPES[name])
    else:
        mixed = model if config.fp8 else None
        peak = peak_flops(device_name(context.device), name, tf32=not config.deterministic, fp8=mixed)
    compiled, compile_why = asked_to_compile(config, context.device)
    if compiled is None:
        plan = make_plan(config.train, model.block_size, context.world_size)
        flops = plan.cost(partial(flops_per_token, model))
        if config.train.recompute == "blocks":
            kind = context.device.type
            flops += plan.cost(partial(recomputed_flops_per_token, model, precision=name, device_type=kind, fp8=config.fp8))
        pays, compile_why = compile_pays(flops / context.world_size, peak, context.device, plan.shapes)
        compiled = context.broadcast(pays)
    optim = settle_muon_precision(config.optim, name)
    whole = dataclasses.replace(config, model=model, precision=name, compile="on" if compiled else "off", optim=optim)
    return Resolved(whole, precision, peak, compile_why, changes)


def _started_model(
    wanted: ModelConfig, start: Loaded, dataset: TokenDataset, tokenizer: Tokenizer | None
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The architecture of the weights that the run starts from, and how it differs; context may be shorter, dropout any."""
    own = start.tokenizer
    if own is not None and tokenizer is not None and own.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{dataset.path}: was made with another tokenizer ({tokenizer.fingerprint}) than the model "
            f"({own.fingerprint}): use the model's own tokenizer.json as data.tokenizer"
        )
    if start.config.vocab_size < dataset.vocab_size:
        raise UserError(
            f"{dataset.path}: has a vocabulary of {dataset.vocab_size} tokens, the model one of "
            f"{start.config.vocab_size}: prepare the text with the model's tokenizer"
        )
    block_size = min(wanted.block_size, start.config.block_size)
    model = dataclasses.replace(start.config, block_size=block_size, dropout=wanted.dropout, init=wanted.init).resolved()
    shape = ("n_layer", "n_head", "n_embd", "block_size", "bias", "gelu", "norm", "positions", "mlp")
    asked = wanted.resolved()
    pairs = [(key, getattr(asked, key), getattr(model, key)) for key in shape]
    return model, tuple(f"model.{key}: {a} -> {b}, as the weights are" for key, a, b in pairs if a != b)
