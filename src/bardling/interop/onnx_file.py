"""Models as ONNX files: token ids to logits, for onnxruntime and other runtimes.

The graph is PyTorch's own export of the model. Its input `input_ids` is int64 [batch, sequence], its output `logits` float32
[batch, sequence, vocabulary]; batch and sequence may have any size, the latter up to the context. There are no keys and values
of earlier tokens, so each call computes the whole text. A tracing exporter can fix a size that should be free without saying
so, so onnxruntime computes the logits of other shapes than the traced one, which must be the model's.

Limits: full attention; float32. ONNX files end at 2 GiB: weights of more than that are in `model.onnx.data` beside the file.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.model.gpt import GPT

FILE = "model.onnx"
_MAX_FILE_BYTES = 2_000_000_000  # of weights; the rest of the file is far smaller than what remains to 2 GiB
_TRACED = (2, 8)  # batch, sequence
_TOLERANCE = 1e-3  # of logits, as a fraction of the largest


def onnx_refusal(config: ModelConfig) -> str:
    """Why a model cannot be written; empty if it can."""
    arch = config.architecture
    if arch.sliding_window is not None:
        return f"cannot be exported to ONNX: model.sliding_window = {arch.sliding_window}: only full attention is supported"
    if config.block_size < _TRACED[1]:
        return f"cannot be exported to ONNX: model.block_size = {config.block_size}: must be at least {_TRACED[1]}"
    return ""


class _Logits(nn.Module):
    """The model as a function of a single argument, whose name becomes the input's."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids)
        return logits


def write_onnx(folder: Path, model: GPT) -> None:
    """Write `model.onnx` into a folder, and check with onnxruntime that it computes the model's logits.

    Raises:
        UserError: a package is missing, PyTorch cannot convert the model, or the file computes something else.
    """
    runtime = _runtime()
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=model.config.block_size)
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                _Logits(model).eval(),
                (torch.zeros(_TRACED, dtype=torch.int64),),
                dynamo=True,
                verbose=False,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes=({0: batch, 1: sequence},),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
            raise UserError(f"PyTorch cannot convert the model to ONNX ({reason:.200}): use --format hf") from error
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # where in the source code each node comes from, with the paths of this machine
        large = sum(value.numel() * value.element_size() for value in model.state_dict().values()) > _MAX_FILE_BYTES
        with os_error_as_user_error(folder / FILE, "write"):
            program.save(folder / FILE, external_data=large)
    _check(runtime, folder / FILE, model)


def _runtime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        needed = "the packages onnx, onnxscript and onnxruntime"
        raise UserError(f"ONNX files need {needed}: pip install 'bardling[onnx]'") from error
    return onnxruntime


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are missing and functions that are old."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


@torch.no_grad()
def _check(runtime: Any, path: Path, model: GPT) -> None:
    """Compare the logits of the file with the model's, for one text and for several."""
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator, config = torch.Generator().manual_seed(0), model.config
    for shape in ((1, min(config.block_size, 67)), (3, 5)):
        tokens = torch.randint(config.vocab_size, shape, generator=generator)
        expected, found = model(tokens), torch.from_numpy(session.run(["logits"], {"input_ids": tokens.numpy()})[0])
        if not found.shape == expected.shape or not torch.allclose(
            found, expected, rtol=0, atol=_TOLERANCE * max(1.0, float(expected.abs().max()))
        ):
            raise UserError(f"{FILE}: onnxruntime {runtime.__version__} computes other logits than the model: use --format hf")
