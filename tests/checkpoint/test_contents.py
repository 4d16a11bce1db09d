"""One checkpoint folder: everything comes back to the bit, and nothing strange is believed."""

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bardling.checkpoint.contents import Checkpoint, read_checkpoint, read_model, write_checkpoint
from bardling.checkpoint.rng import restore_rng, rng_state
from bardling.checkpoint.store import CheckpointStore
from bardling.config import ModelConfig, OptimConfig, RunConfig
from bardling.data.tokens.tokenizer import build_tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.optim.serialization import load_optimizer_tensors, optimizer_tensors

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=257, vocab_multiple=64, dropout=0.1)


def step(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.arange(12).reshape(2, 6) * 7 % model.config.vocab_size
    model(tokens, tokens.roll(1, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(config: ModelConfig = TINY, steps: int = 2) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(0)  # of dropout
    model = GPT(config)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=1e-2), torch.device("cpu"))
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def save(folder: Path, model: GPT, optimizer: torch.optim.Optimizer, **training: object) -> Path:
    tensors, meta = optimizer_tensors(optimizer, dict(model.named_parameters()))
    facts = {"step": 2, "samples": 4, "best_val_loss": 1.5, "best_step": 2, "hooks_done": {"validate": 2}, "scaler": None}
    folder.mkdir(exist_ok=True)
    config = asdict(replace(RunConfig(), model=model.config))
    content = Checkpoint(model.config, model.state_dict(), tensors, meta, facts | training, rng_state())
    write_checkpoint(folder, content, build_tokenizer("byte", []), config)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", *trained())


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"gelu": "erf"}, {"vocab_multiple": 1}], ids=str)
def test_everything_comes_back_and_goes_on_to_the_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, optimizer = trained(replace(TINY, **changes))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0).state_dict()
    folder = save(tmp_path / "c", model, optimizer, scaler=scaler)
    found = read_checkpoint(folder)
    assert found.model_config == model.config
    assert found.training == {
        "step": 2,
        "samples": 4,
        "best_val_loss": 1.5,
        "best_step": 2,
        "hooks_done": {"validate": 2},
        "scaler": scaler,
    }
    assert json.loads((folder / "run_config.json").read_text())["model"]["n_embd"] == 8
    again = GPT(found.model_config, seed=5)
    again.load_state_dict(found.model_state)
    second = build_optimizer(again.named_parameters(), OptimConfig(lr=1e-2), torch.device("cpu"))
    load_optimizer_tensors(second, dict(again.named_parameters()), found.optimizer_tensors, found.optimizer_meta)
    torch.manual_seed(3)  # of dropout
    step(model, optimizer)
    torch.manual_seed(3)
    step(again, second)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    first, second = (save(tmp_path / name, *trained()) for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_transformers_opens_the_folder_as_it_is(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config, state = read_model(folder)
    ours = GPT(config)
    ours.load_state_dict(state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 257
    tokens = torch.tensor([[1, 2, 3, 250]])
    torch.testing.assert_close(ours.eval()(tokens), theirs.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_padding_is_not_stored_and_comes_back_as_zeros(folder: Path) -> None:
    assert load_file(folder / "model.safetensors")["transformer.wte.weight"].shape == (257, 8)
    _, state = read_model(folder)
    assert state["transformer.wte.weight"].shape == (320, 8)
    assert not state["transformer.wte.weight"][257:].any()


def test_the_tokenizer_is_there(folder: Path) -> None:
    assert load_tokenizer(folder).fingerprint == build_tokenizer("byte", []).fingerprint


def test_without_the_optimizer_its_files_are_not_needed(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()
    (folder / "rng.safetensors").unlink()
    found = read_checkpoint(folder, optimizer=False)
    assert found.optimizer_tensors == {}
    assert found.training["step"] == 2


def test_infinite_best_loss_survives_json(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", *trained(), best_val_loss=math.inf, best_step=-1)
    assert json.loads((folder / "training.json").read_text())["best_val_loss"] is None
    assert read_checkpoint(folder).training["best_val_loss"] == math.inf


def test_read_weights_do_not_depend_on_the_file(folder: Path) -> None:
    found = read_checkpoint(folder)
    before = found.model_state["transformer.wpe.weight"].clone()
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(found.model_state["transformer.wpe.weight"], before)
    assert found.optimizer_tensors["transformer.wpe.weight.step"].item() == 2


def test_a_full_disk_is_an_os_error_that_the_store_explains(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").mkdir()  # what cannot be written to
        save(folder, *trained(steps=1))

    with pytest.raises(UserError, match=r"model\.safetensors: cannot write the checkpoint"):
        CheckpointStore(tmp_path, 1).save(1, write)
    assert list(tmp_path.iterdir()) == []


# --- random numbers -------------------------------------------------------------------------------------------------------


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.standard_normal(), np.random.rand(), torch.rand(()).item()]


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value for the next call, in both generators
    np.random.standard_normal()
    folder = save(tmp_path / "c", *trained(steps=1))
    state = rng_state()
    expected = [draw() for _ in range(3)]
    restore_rng(state)
    assert [draw() for _ in range(3)] == expected
    restore_rng(read_checkpoint(folder).rng)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("torch"),
        lambda s: s.update(torch=torch.zeros(3, dtype=torch.uint8)),
        lambda s: s.update(python=torch.zeros(3, dtype=torch.int64)),
        lambda s: s.update(python=torch.zeros(626)),
        lambda s: s.update(numpy=torch.full((626,), -1)),
        lambda s: s.update(numpy=torch.zeros((), dtype=torch.int64)),
        lambda s: s.update({"python.gauss": torch.zeros(())}),
        lambda s: s.update({"numpy.gauss": torch.zeros(2)}),
    ],
)
def test_malformed_random_states_are_one_line(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = rng_state()
    kept = dict(state)
    change(state)
    with pytest.raises(UserError, match="random number generator states are malformed") as caught:
        restore_rng(state)
    assert "\n" not in str(caught.value)
    restore_rng(kept)


# --- hostile files --------------------------------------------------------------------------------------------------------


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def raw_header(header: dict[str, Any] | bytes, claimed: int | None = None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", claimed or len(text)) + text)

    return apply


HOSTILE: list[tuple[Callable[[Path], object], str]] = [
    (edit_json("config.json", model_type="llama"), "config.json: model_type = 'llama'"),
    (edit_json("config.json", model_type=None), "config.json: model_type = None"),
    (edit_json("config.json", n_layer=10**12), "config.json: n_layer"),
    (edit_json("config.json", n_layer=2 * 10**9), "config.json: n_layer = 2000000000"),
    (edit_json("config.json", n_embd=4), "model.safetensors: "),
    (edit_json("config.json", n_positions="x"), "config.json: n_positions"),
    (edit_json("config.json", bardling={"vocab_multiple": 2**31 - 1}), "config.json: vocab_multiple = 2147483647"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: is not a JSON object"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: is not valid JSON"),
    (lambda f: (f / "config.json").write_bytes(b"\xff{}"), "config.json: is not valid JSON"),
    (lambda f: (f / "config.json").write_text("[" * 200_000), "config.json: is not valid JSON"),
    (lambda f: (f / "config.json").write_text(" " * (17 << 20)), "config.json: is too large \\(17,825,792 bytes"),
    (lambda f: (f / "config.json").unlink(), "config.json: cannot read: no such file"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot read: no such file"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: is damaged"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]), "is damaged"),
    (raw_header(b"{}", claimed=2**62), "model.safetensors: is damaged"),
    (raw_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "model.safetensors: is damaged"),
    (raw_header({"a": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 0]}}), "model.safetensors: is damaged"),
    (raw_header({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}), "model.safetensors: "),
    (raw_header({}), "model.safetensors: "),
    (edit_weights(lambda t: t.pop("transformer.ln_f.weight")), "model.safetensors: transformer.ln_f.weight is missing"),
    (edit_weights(lambda t: t.update({"transformer.wpe.weight": torch.zeros(5, 8)})), r"wpe.weight has shape \[5, 8\]"),
    (
        edit_weights(lambda t: t.update({"transformer.wpe.weight": torch.zeros(6, 8, dtype=torch.int64)})),
        "wpe.weight is torch.int64",
    ),
    (edit_weights(lambda t: t.update({"x": torch.zeros(1)})), "is not part of GPT-2"),
    (edit_json("training.json", format=2), "training.json: unknown format"),
    (edit_json("training.json", step=-1), "training.json: step = -1"),
    (edit_json("training.json", step=True), "training.json: step = True"),
    (edit_json("training.json", samples="4"), "training.json: samples = '4'"),
    (edit_json("training.json", best_val_loss="x"), "training.json: best_val_loss = 'x'"),
    (edit_json("training.json", best_step=None), "training.json: best_step = None"),
    (edit_json("training.json", hooks_done=[1]), "training.json: hooks_done"),
    (edit_json("training.json", scaler={"scale": "x"}), "training.json: scaler"),
    (edit_json("training.json", optimizer=3), "training.json: optimizer = 3"),
    (lambda f: (f / "optimizer.safetensors").write_bytes(b"\x80\x04"), "optimizer.safetensors: is damaged"),
    (lambda f: (f / "rng.safetensors").unlink(), "rng.safetensors: cannot read: no such file"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_strange_files_are_refused_in_one_line(folder: Path, change: Callable[[Path], object], message: str) -> None:
    assert isinstance(read_checkpoint(folder), Checkpoint)
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "optimizer.safetensors").unlink()
    (folder / "optimizer.safetensors").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        read_checkpoint(folder)


def test_tensors_of_any_layout_can_be_written(tmp_path: Path) -> None:
    """A transposed view, and a view of a larger tensor, are stored as what they show."""
    from bardling.interop.tensor_file import read_tensors, write_tensors

    base = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    write_tensors(tmp_path / "t", {"view": base[:2], "turned": base.t(), "scalar": torch.tensor(3.0), "none": torch.empty(0)})
    found = read_tensors(tmp_path / "t")
    assert torch.equal(found["view"], base[:2])
    assert torch.equal(found["turned"], base.t())
    assert found["scalar"].shape == ()
    assert found["none"].shape == (0,)
    assert (tmp_path / "t").stat().st_size < 600
