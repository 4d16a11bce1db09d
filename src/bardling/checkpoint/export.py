"""Export: a model as a folder that `transformers` opens, an adapter for PEFT, a GGUF file for llama.cpp, an ONNX file, or
nanoGPT's `ckpt.pt`. Adapters are merged into their base model in every format but PEFT's. Existing files are never overwritten.

A new format is one exporter function and one line in `EXPORT_FORMATS` (`extensions.py`).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bardling.checkpoint.contents import write_description, write_model
from bardling.checkpoint.load import Loaded, base_of, load, run_of
from bardling.checkpoint.model_card import known_license, model_card
from bardling.config import ModelConfig, RunConfig
from bardling.config.architecture import GPT2_VOCAB_SIZE
from bardling.data.tokens.chatml import END, PAD, START, with_chatml
from bardling.data.tokens.gguf_vocabulary import vocabulary_metadata
from bardling.data.tokens.text_interface import GENERATION, text_interface
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.files.atomic import atomic_folder, check_place, os_error_as_user_error
from bardling.interop.gguf_file import GGUF_DTYPES, write_gguf
from bardling.interop.gguf_model import gguf_metadata, gguf_refusal, gguf_state
from bardling.interop.huggingface import refuse_nonfinite
from bardling.interop.nanogpt_checkpoint import write_meta, write_nanogpt_checkpoint
from bardling.interop.onnx_file import onnx_refusal, write_onnx
from bardling.interop.peft import write_adapter
from bardling.interop.pretrained import is_hub_name

WEIGHTS = "weights: "
"""Begins the note that names the dtype of the weights, where it is not the format's."""


Exporter = Callable[..., list[str]]
"""(model, out, *, best, dataset): writes the model (as in `checkpoint.load.load`) to `out`, which must not exist, and returns
notes for the user. That of a format with `dtypes` also takes `dtype`, one of them, and that of a format with `options` takes
these: `chat` (give ChatML to a model without a chat template), `license` and `repository` (of the hub, for the card)."""


class ExportFormat(NamedTuple):
    """One format of `bardling export`."""

    write: Exporter
    usage: str  # what to do with the result, a line each; {out} is its path, and {quoted} the same for a shell
    refusal: Callable[[ModelConfig], str] = lambda _: ""  # why the format cannot hold such a model; empty if it can
    dtype: str = "float32"  # of the weights that are written, unless a note names another
    dtypes: tuple[str, ...] = ()  # those that a user can choose
    options: tuple[str, ...] = ()  # further keyword arguments of the exporter
    suffix: str = ""  # of the file that is written; empty: a folder


class _Opened(NamedTuple):
    model: Loaded
    notes: list[str]
    adds_chat: bool = False  # whether the chat template is new


def _open(spec: str, out: Path, target: ExportFormat, *, best: bool, training: bool = False, chat: bool = False) -> _Opened:
    """The model to export, after checking that it can be exported to `out`; with `chat`, with a chat template."""
    check_place(out)
    if out.exists():
        raise UserError(f"{out}: already exists: remove it, or choose another --out")
    loaded = load(spec, best=best, training=training)
    if refusal := target.refusal(loaded.config):
        raise UserError(f"{spec}: {refusal}")
    refuse_nonfinite(loaded.state, spec)
    opened = _Opened(loaded, [loaded.note] if loaded.note else [])
    return _with_chat_format(opened, spec) if chat else opened


def _with_chat_format(opened: _Opened, spec: str) -> _Opened:
    """The model with ChatML's template and tokens, unless it has a chat template, which is kept."""
    loaded, notes, _ = opened
    try:
        tokenizer = loaded.needed_tokenizer()
    except UserError as reason:
        raise UserError(f"{spec}: --chat needs the model's tokenizer: {reason}") from None
    if (template := tokenizer.interface.chat_template) is not None:
        marks = "" if "endgeneration" in template else " (it does not mark answers with {% generation %})"
        return _Opened(loaded, [*notes, f"--chat: the model's own chat template is kept{marks}"])
    extended = with_chatml(tokenizer, "--chat")
    tokens = ", ".join(f"{name} = {extended.encode(name, allow_special=True)[0]}" for name in (START, END, PAD))
    note = f"--chat: added the template of ChatML ({tokens}); finetune the model on conversations before you chat with it"
    return _Opened(dataclasses.replace(loaded, tokenizer=tokenizer).extended(extended), [*notes, note], adds_chat=True)


def _tokenizer(loaded: Loaded, notes: list[str]) -> Tokenizer | None:
    """The model's tokenizer; if there is none, a note says why."""
    try:
        return loaded.needed_tokenizer()
    except UserError as reason:
        notes.append(f"written without a tokenizer: {reason}")
        return None


def _write_generation(folder: Path, loaded: Loaded, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Write `generation_config.json`; returns the ids of special tokens for `config.json`."""
    about = text_interface(loaded.text, {}, None, (), ()) if tokenizer is None else tokenizer.interface
    ids = about.model_ids(loaded.config.vocab_size)
    if any(value is not None for value in ids.values()):
        values = about.generation or {"_from_model_config": True, **ids}
        (folder / GENERATION).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return ids


def export_hf(
    spec: str,
    out: Path,
    *,
    best: bool = False,
    dataset: str = "",
    dtype: str = "",
    chat: bool = False,
    license: str = "unknown",
    repository: str = "",
) -> list[str]:
    """Write `config.json`, `model.safetensors`, the tokenizer and a model card of the model `spec` into the new folder `out`.

    `dtype`: of the weights, 'float32', 'float16' or 'bfloat16'; empty: that in the model's files. `chat` adds ChatML's template
    and tokens. `license` is an identifier of the hub, and `repository` the name there, for the card.
    """
    license = known_license(license)
    loaded, notes, adds_chat = _open(spec, out, HF, best=best, chat=chat)
    tokenizer, dtype = _tokenizer(loaded, notes), dtype or loaded.dtype
    with atomic_folder(out) as folder:
        ids = _write_generation(folder, loaded, tokenizer)
        write_model(folder, loaded.config, loaded.state, tokenizer, dtype=getattr(torch, dtype), ids=ids)
        card = model_card(
            spec, loaded, best=best, name=repository or out.name, dtype=dtype, license=license, adds_chat=adds_chat
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return notes if dtype == HF.dtype else [*notes, f"{WEIGHTS}{dtype}"]


def export_peft(
    spec: str, out: Path, *, best: bool = False, dataset: str = "", license: str = "unknown", repository: str = ""
) -> list[str]:
    """Write the LoRA adapter `spec` in PEFT's format into the new folder `out`: it names its base model.

    `license` and `repository`: as in `export_hf`.
    """
    license = known_license(license)
    loaded, notes, _ = _open(spec, out, PEFT, best=best)
    if loaded.adapter is None:
        raise UserError(f"{spec}: is a whole model, not an adapter: use --format hf")
    tokenizer, base = _tokenizer(loaded, notes), base_of(loaded.adapter.path)
    trained = RunConfig() if (run := run_of(spec)) is None else run.trained_config()
    if is_hub_name(trained.model.init) and not any(trained.tune.new_tokens):
        base = trained.model.init  # where others find it too
    elif Path(base).exists():
        base = str(Path(base).absolute())
    with atomic_folder(out) as folder:
        write_adapter(folder, {**loaded.adapter.config, "base_model_name_or_path": base}, loaded.adapter.tensors)
        if tokenizer is not None:
            tokenizer.save(folder)
        card = model_card(spec, loaded, best=best, name=repository or out.name, dtype=PEFT.dtype, license=license, base=base)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return [*notes, f"the base model of the adapter is {base}"]


def export_gguf(
    spec: str, out: Path, *, best: bool = False, dataset: str = "", dtype: str = "", chat: bool = False
) -> list[str]:
    """Write the model `spec` and its tokenizer as the GGUF file `out`.

    `dtype`: of the matrices, one of `GGUF_DTYPES`; empty: that in the model's files. `chat` adds ChatML's template and tokens.
    """
    loaded, notes, _ = _open(spec, out, GGUF, best=best, chat=chat)
    dtype = GGUF_DTYPES[dtype or loaded.dtype]
    metadata = {"general.name": out.stem, **gguf_metadata(loaded.config)}
    tokenizer = _tokenizer(loaded, notes)
    model = {"tokenizer.ggml.model": "none"}
    metadata |= model if tokenizer is None else vocabulary_metadata(tokenizer, loaded.config.vocab_size)
    with os_error_as_user_error(out, "write"):
        out.parent.mkdir(parents=True, exist_ok=True)
    kind = loaded.config.architecture.transformers_family or ""
    notes += write_gguf(out, kind, metadata, gguf_state(loaded.state, loaded.config), dtype)
    return notes if dtype == GGUF.dtype else [*notes, f"{WEIGHTS}{dtype}"]


def export_onnx(spec: str, out: Path, *, best: bool = False, dataset: str = "", chat: bool = False) -> list[str]:
    """Write `model.onnx`, the tokenizer and `config.json` of the model `spec` into the new folder `out`; float32.

    `chat` adds ChatML's template and tokens.
    """
    loaded, notes, _ = _open(spec, out, ONNX, best=best, chat=chat)
    tokenizer = _tokenizer(loaded, notes)
    with atomic_folder(out) as folder:
        write_onnx(folder, loaded.build())
        ids = _write_generation(folder, loaded, tokenizer)
        write_description(folder, loaded.config, tokenizer, ids=ids)
    return notes


def export_nanogpt(spec: str, out: Path, *, best: bool = False, dataset: str = "bardling") -> list[str]:
    """Write the model `spec` and its optimizer state as `out/ckpt.pt`, and `meta.pkl` beside it for a character vocabulary.

    `dataset` is the folder below nanoGPT's `data/` where its programs look for data and `meta.pkl`. Returns what nanoGPT does
    differently or needs besides, one sentence each.
    """
    loaded = _open(spec, out, NANOGPT, best=best, training=True).model
    run = run_of(spec)
    with atomic_folder(out) as folder:
        notes = write_nanogpt_checkpoint(
            folder / "ckpt.pt",
            config=dataclasses.replace(RunConfig() if run is None else run.trained_config(), model=loaded.config),
            weights=loaded.state,
            optimizer=loaded.optimizer_tensors,
            step=loaded.step,
            best_val_loss=loaded.best_val_loss,
            out=out,
            dataset=dataset,
        )
        if loaded.tokenizer is not None and loaded.tokenizer.kind == "char":
            write_meta(folder / "meta.pkl", loaded.tokenizer)
            notes.append(f"copy {out / 'meta.pkl'} to data/{dataset}/ in nanoGPT's folder, where its sample.py looks for it")
        elif loaded.tokenizer is not None and loaded.tokenizer.vocab_size != GPT2_VOCAB_SIZE:
            notes.append(
                f"nanoGPT's sample.py supports only character and GPT-2 tokenizers, not this {loaded.tokenizer.kind!r} "
                "tokenizer: nanoGPT can train the model further, but not sample from it"
            )
    return notes


def _hf_refusal(config: ModelConfig) -> str:
    mismatch = config.architecture.transformers_mismatch
    return f"cannot be exported for transformers: {mismatch}" if mismatch else ""


def _nanogpt_refusal(config: ModelConfig) -> str:
    options = config.architecture.unsupported_options("nanogpt")
    return f"cannot be exported for nanoGPT, which does not support {', '.join(options)}" if options else ""


_HF_USAGE = """\
transformers: AutoModelForCausalLM.from_pretrained({out!r})
vLLM: vllm serve {quoted}
MLX: mlx_lm.generate --model {quoted} --prompt 'Once upon a time'
llama.cpp: bardling export {quoted} --format gguf --out {quoted}.gguf"""
_GGUF_USAGE = """\
llama.cpp: llama-completion -m {quoted} -p 'Once upon a time' -n 64
llama.cpp's server: llama-server -m {quoted}"""

_PEFT_USAGE = """\
peft: AutoPeftModelForCausalLM.from_pretrained({out!r})
one model of both: bardling export {quoted} --merge --out {quoted}-merged"""

_ONNX_USAGE = """\
onnxruntime: InferenceSession({out!r} + '/model.onnx').run(['logits'], {{'input_ids': ids}})  # ids: int64 [batch, sequence]
the ids of a text: tokenizers.Tokenizer.from_file({out!r} + '/tokenizer.json').encode(text).ids"""

_HF_DTYPES = ("float32", "float16", "bfloat16")
HF = ExportFormat(export_hf, _HF_USAGE, _hf_refusal, dtypes=_HF_DTYPES, options=("chat", "license", "repository"))
GGUF = ExportFormat(export_gguf, _GGUF_USAGE, gguf_refusal, "f32", dtypes=tuple(GGUF_DTYPES), suffix=".gguf", options=("chat",))
PEFT = ExportFormat(export_peft, _PEFT_USAGE, options=("license", "repository"))
ONNX = ExportFormat(export_onnx, _ONNX_USAGE, onnx_refusal, options=("chat",))
NANOGPT = ExportFormat(
    export_nanogpt, "{out}/ckpt.pt: sample from it with nanoGPT: python sample.py --out_dir={quoted}", _nanogpt_refusal
)
