"""`bardling export RUN --format hf|peft|gguf|onnx|nanogpt --out PATH`: write a model in a format that other software loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bardling.cli.parse import Model, parse
from bardling.errors import UserError
from bardling.extensions import EXPORT_FORMATS
from bardling.files.paths import shell_path


@dataclass(frozen=True)
class ExportOptions:
    model: Model
    """A run, a checkpoint, a model folder, a GGUF file, or a nanoGPT or nano-gpt checkpoint file."""
    out: Path
    """Folder to create; for gguf, the file."""
    format: str | None = None
    """'hf': config.json, model.safetensors and the tokenizer, for transformers, vLLM and MLX. 'peft': an adapter alone.
    'gguf': a file for llama.cpp. 'onnx': model.onnx and the tokenizer, for onnxruntime. 'nanogpt': a ckpt.pt. Installed
    extensions may add others. Unset: peft for an adapter, else hf."""
    merge: bool = False
    """Write an adapter and its base model as one model, in the format hf."""
    dtype: str | None = None
    """Type of the weights; hf: float32, float16 or bfloat16; gguf: f32, f16, bf16 or q8_0. Unset: that of the model's files."""
    push: str | None = None
    """Also upload the result to this repository, USER/REPO, on the Hugging Face hub, with the token in HF_TOKEN or that of
    `hf auth login`."""
    public: bool = False
    """Make a repository that --push creates public; unset: private."""
    chat: bool = False
    """Give a model without a chat template that of ChatML, with its tokens <|im_start|>, <|im_end|> and <|pad|>."""
    license: str | None = None
    """License for the model card, by its identifier on the hub, such as mit or apache-2.0; unset: unknown."""
    best: bool = False
    """For a run: use the checkpoint with the lowest validation loss instead of the latest."""
    dataset: str = "bardling"
    """For nanogpt: the folder under its data/ in which sample.py finds the tokenizer's meta.pkl."""


def run(argv: Sequence[str]) -> None:
    description = "Write a model in a format that other software loads."
    options = parse(ExportOptions, argv, prog="bardling export", description=description)
    from bardling.checkpoint.load import names_adapter
    from bardling.interop.publish import check_publishing, publish

    name = options.format or ("peft" if not options.merge and names_adapter(options.model) else "hf")
    if options.merge and name == "peft":
        raise UserError("--merge: the format peft is for adapters that are not merged: omit one of them")
    target = EXPORT_FORMATS.get("--format", name)
    if options.dtype is not None and options.dtype not in target.dtypes:
        known = f"choose from {', '.join(target.dtypes)}" if target.dtypes else f"{name} is always {target.dtype}"
        raise UserError(f"--dtype {options.dtype}: {known}")
    if target.suffix and options.out.suffix != target.suffix:
        raise UserError(f"--out {options.out}: is a file in this format, and must end in {target.suffix}")
    if options.push is not None:
        check_publishing(options.push)
    chosen: dict[str, object] = {} if options.dtype is None else {"dtype": options.dtype}
    for option in ("chat", "license"):
        if value := getattr(options, option):
            if option not in target.options:
                raise UserError(f"--{option}: has no effect on the format {name}: omit it, or use --format hf")
            chosen[option] = value
    if options.push is not None and "repository" in target.options:
        chosen["repository"] = options.push
    notes = target.write(options.model, options.out, best=options.best, dataset=options.dataset, **chosen)
    for note in (text for text in notes if not text.startswith("weights: ")):
        print(f"note: {note}")
    print(next((text for text in notes if text.startswith("weights: ")), f"weights: {target.dtype}"))
    if options.push is not None:
        print(f"published: {publish(options.out, options.push, private=not options.public)}")
    print(target.usage.format(out=str(options.out), quoted=shell_path(options.out)))
