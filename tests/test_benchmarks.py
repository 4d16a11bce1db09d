"""The scripts in `benchmarks/` with tiny sizes: they measure, agree with their baselines, and write tables."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bardling.config import ModelConfig
from bardling.config.recipes import load_recipe
from bardling.errors import UserError
from bardling.interop.nanogpt_checkpoint import write_nanogpt_checkpoint
from bardling.model.gpt import GPT

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 65}
TEXT = "".join(f"line {number}: the quick brown fox jumps over {number * 7 % 13} lazy dogs\n" for number in range(400))
RECIPE = """
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
family = "qwen3"
[optim]
name = "muon"
warmup_steps = 1
lr = 1e-2
[train]
steps = 12
batch_size = 4
"""
# A train.py that accepts nanoGPT's flags, checks its data, and "trains" by copying an existing checkpoint.
TRAINER = """
import os, pickle, shutil, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
assert sys.argv[1] == "config/train_shakespeare_char.py" and os.path.isfile(sys.argv[1])
assert os.path.getsize("data/shakespeare_char/train.bin") > os.path.getsize("data/shakespeare_char/val.bin") > 0
assert len(pickle.load(open("data/shakespeare_char/meta.pkl", "rb"))["itos"]) > 10
print("step 0: train loss 4.0, val loss 4.0")
print("iter 0: loss 4.0, time 1.0ms")
assert flags["eval_interval"] == flags["max_iters"] == "7" and flags["eval_iters"] == "1", flags
os.makedirs(flags["out_dir"])
shutil.copy("made.pt", flags["out_dir"] + "/ckpt.pt")
"""


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def rows_of(path: Path) -> list[list[str]]:
    """Cells of all rows of the tables in a file, headers included."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables_are_aligned_and_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tables import Table, publish, spread

    table = Table("Speed", ("side", "ms"), [("ours", "1.5"), ("the | plain", "12")], ["a note"])
    for _ in range(2):
        path = publish("thing", [table], device=torch.device("cpu"), command=["--x", "1"], folder=tmp_path / "new")
    text = path.read_text()
    assert text.count("# Results of benchmarks/thing.py") == 1
    assert text.count("### Speed") == text.count("- a note") == text.count("python benchmarks/thing.py --x 1") == 2
    assert f"torch {torch.__version__}" in text
    lines = [line for line in text.splitlines() if line.startswith("|")][:4]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[1].endswith(":|")  # numbers are right-aligned
    assert "| ours" in capsys.readouterr().out
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)"
    with pytest.raises(ValueError, match="cells"):
        Table("Speed", ("side", "ms"), [("ours",)]).markdown()


@pytest.mark.parametrize(("bias", "gelu"), [(True, "tanh"), (False, "erf")])
def test_the_plain_model_computes_what_ours_does(bias: bool, gelu: str) -> None:
    from implementations import RandomSequences, initial_weights
    from plain import PlainGPT
    from workers import Spec

    shape = {**SHAPE, "bias": bias, "gelu": gelu}
    ours, plain = GPT(ModelConfig(**shape), seed=0), PlainGPT(shape, 65)
    plain.load_state_dict(initial_weights(Spec("plain", shape, batch=3), 65))
    batch = RandomSequences(65, 16).batch(0, 3)
    expected = plain(batch.inputs, batch.targets)
    found = ours(batch.inputs, batch.targets) / batch.targets.numel()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    weights = (ours.transformer.h[0].mlp.c_fc.weight, plain.transformer["h"][0].mlp.c_fc.weight)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss, weight in zip((found, expected), weights, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_losses_do_not_depend_on_optimisations() -> None:
    from workers import Spec, Worker, closest_curves

    spec = Spec("ours", {**SHAPE, "bias": False, "gelu": "erf"}, batch=2, accumulation=2, precision="float32", compile="off")
    bare = dataclasses.replace(spec, without=("chunked-loss", "fused-optimizer", "prefetch", "flash"))
    plain = dataclasses.replace(spec, kind="plain")
    curves = []
    for one in (spec, bare, plain):
        with Worker(one, one.kind) as worker:
            block = worker.steps(6)
            assert block.seconds > 0
            memory = worker.steps(1, memory=True).memory_above
            assert memory is None or memory >= 0
            curves.append(block.losses)
    assert len(curves[0]) == 6
    assert curves[0][-1] < curves[0][0]  # it learns
    assert closest_curves(curves[0], curves[1]) < 1e-4
    assert closest_curves(curves[0], curves[2]) < 1e-4
    assert closest_curves([1.0, 2.0], [1.0, float("nan")]) == float("inf")


def test_throughput(tmp_path: Path) -> None:
    import throughput

    throughput.main(["--tiny", "--precision", "float32", "--results", str(tmp_path)])
    head, ours, plain = rows_of(tmp_path / "throughput.md")
    assert (ours[1], plain[1], ours[-1]) == ("ours", "plain", "1")
    assert ours[2] == plain[2] == "float32, eager"
    seconds = [float(row[head.index("ms/step")]) for row in (ours, plain)]
    assert min(seconds) > 0
    assert "within the tolerance for float32 of 0.0003 of a loss" in (tmp_path / "throughput.md").read_text()


def test_an_implementation_that_cannot_be_measured_is_reported_in_one_line(tmp_path: Path) -> None:
    import throughput
    from workers import Spec, Worker

    with pytest.raises(UserError, match=r"no model\.py"):
        Worker(Spec("nanogpt", {**SHAPE, "bias": False, "gelu": "erf"}, batch=2, path=str(tmp_path)), "nanoGPT")
    (tmp_path / "model.py").write_text("raise RuntimeError('broken on purpose')")
    with pytest.raises(UserError, match="status 1: RuntimeError: broken on purpose"):
        Worker(Spec("nanogpt", {**SHAPE, "bias": False, "gelu": "erf"}, batch=2, path=str(tmp_path)), "nanoGPT")
    for arguments in (["--settings", "huge"], ["--rounds", "0"], ["--nonsense"]):
        with pytest.raises(UserError):
            throughput.main(arguments)


def test_scaling(tmp_path: Path) -> None:
    import scaling

    scaling.main(["--tiny", "--sizes", "batch", "--blocks", "1", "--block", "1", "--results", str(tmp_path)])
    head, base, doubled = rows_of(tmp_path / "scaling.md")
    assert (base[:2], doubled[:2]) == (["batch", "2"], ["batch", "4"])
    assert doubled[head.index("x FLOPs")] == "2.00"
    with pytest.raises(UserError, match="height"):
        scaling.main(["--sizes", "height"])


@pytest.mark.slow
def test_processes(tmp_path: Path) -> None:
    import processes

    processes.main(["--tiny", "--plain", "--rounds", "1", "--block", "1", "--results", str(tmp_path)])
    head, *rows = rows_of(tmp_path / "processes.md")
    assert [row[:3] for row in rows] == [
        ["one process", "1", "2"],
        ["DDP", "2", "1"],
        ["FSDP2", "2", "1"],
        ["FSDP2, plain code", "2", "1"],
    ]
    assert all(float(row[head.index("ms/step")]) > 0 for row in rows)
    text = (tmp_path / "processes.md").read_text()
    assert text.count("within the tolerance") == 3
    assert "BEYOND" not in text
    with pytest.raises(UserError, match="--batch 15"):
        processes.main(["--batch", "15"])


def test_the_busy_program_exits_with_its_parent() -> None:
    import cpu_contention

    host = (
        f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {cpu_contention.BUSY_LOOP!r}, str(os.getpid())])"
    )
    # The output ends when no process is left that could write to it.
    subprocess.run([sys.executable, "-c", host], stdout=subprocess.PIPE, timeout=120, check=True)


def test_cpu_contention(tmp_path: Path) -> None:
    import cpu_contention

    cpu_contention.main(["--tiny", "--turns", "300000", "1000", "--rounds", "1", "--block", "2", "--results", str(tmp_path)])
    rows = rows_of(tmp_path / "cpu_contention.md")
    assert [row[0] for row in rows[1:]] == ["300,000", "1,000"]
    with pytest.raises(UserError, match="--rounds 0"):
        cpu_contention.main(["--rounds", "0"])


def test_step_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import step_profile

    config, optim, _ = step_profile.SETTINGS["gpt2"]
    tiny = dataclasses.replace(config, n_layer=1, n_head=1, n_embd=16, block_size=16)
    monkeypatch.setitem(step_profile.SETTINGS, "gpt2", (tiny, optim, 2))
    step_profile.main(["--settings", "gpt2", "--steps", "1", "--top", "3", "--results", str(tmp_path)])
    rows = rows_of(tmp_path / "step_profile.md")
    parts = [row[0] for row in rows]
    assert parts[1:6] == ["forward", "backward", "optimizer", "the rest", "step"]
    assert len(parts) == 6 + 4  # and a table of three operators
    with pytest.raises(UserError, match="bert"):
        step_profile.main(["--settings", "bert"])


def test_gpu_reports_a_missing_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--record-absent"):
        gpu.main(["--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    gpu.main(["--record-absent", "--sizes", "124m", "--results", str(tmp_path)])
    assert rows_of(tmp_path / "gpu.md")[1][2:] == ["not measured"] * 8
    cases = gpu.cases_of("124m", gpu.SIZES["124m"], gpu.Options())
    assert [case for case in cases if case.startswith("without")] == [f"without {part}" for part in gpu.WITHOUT]


@pytest.mark.slow
def test_gpu_script_on_a_cpu(tmp_path: Path) -> None:
    import gpu

    arguments = ["--tiny", "--device", "cpu", "--blocks", "1", "--block", "1", "--without", "bf16", "chunked-loss"]
    gpu.main([*arguments, "--results", str(tmp_path)])
    assert [row[1] for row in rows_of(tmp_path / "gpu.md")[1:]] == [
        "ours",
        "plain, compiled",
        "without bf16",
        "without chunked-loss",
    ]
    assert "failed" not in (tmp_path / "gpu.md").read_text()


def test_generation(tmp_path: Path) -> None:
    import generation

    arguments = ["--tiny", "--sides", "float32", "int8", "nanogpt", "--prompts", "2", "--new_tokens", "12", "--clock", "cpu"]
    generation.main([*arguments, "--results", str(tmp_path)])
    head, *rows = rows_of(tmp_path / "generation.md")
    assert [row[:2] for row in rows] == [["2", "float32"], ["2", "int8"], ["2", "nanogpt"]]
    assert all(float(row[head.index("tokens/s")].replace(",", "")) > 0 for row in rows)
    assert "nanogpt: 24 of 24 greedy tokens equal those of float32" in (tmp_path / "generation.md").read_text()
    with pytest.raises(UserError, match="--sides mlx"):
        generation.main(["--sides", "mlx"])


def test_sft_gives_trl_the_conversations_of_the_same_steps(tmp_path: Path) -> None:
    import sft
    from sft_sides import SideSpec

    conversations = list(itertools.islice(sft.docstring_conversations(), 40))
    assert {len(messages) for messages in conversations} == {2, 4, 6}
    data = tmp_path / "conversations.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    ours = SideSpec("bardling", "model", 2, 2, 64, 1e-4, "float32", str(data), str(tmp_path / "run"))
    numbers = [[range(1, 9), range(9, 17)], [range(17, 29), range(29, 41)]]
    names = [[[f"conversations.jsonl:{number}" for number in row] for row in step] for step in numbers]
    passes = {}
    for side in sft.SIDES:
        steps = json.loads(Path(sft.trl_spec(side, ours, names, tmp_path).data).read_text())
        found = [sorted(conversations.index(messages) + 1 for part in step for messages in part) for step in steps]
        assert found == [[*range(1, 17)], [*range(17, 41)]]
        passes[side] = [[len(part) for part in step] for step in steps]
    assert passes == {"trl": [[16], [24]], "trl-by-8": [[8, 8], [12, 12]], "trl-packed": [[8, 8], [12, 12]]}
    for arguments in (["--sides", "axolotl"], ["--rows", "0"]):
        with pytest.raises(UserError, match=arguments[1]):
            sft.main(arguments)


def test_time_to_loss(tmp_path: Path, text: Path, recipe: Path) -> None:
    import time_to_loss

    checkout = tmp_path / "nanoGPT"
    (checkout / "config").mkdir(parents=True)
    (checkout / "config" / "train_shakespeare_char.py").write_text("")
    (checkout / "train.py").write_text(TRAINER)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=len(set(TEXT)), bias=False), seed=0)
    config = dataclasses.replace(load_recipe(str(recipe)), model=model.config)
    write_nanogpt_checkpoint(
        checkout / "made.pt",
        config=config,
        weights=model.state_dict(),
        optimizer={},
        step=7,
        best_val_loss=None,
        out=checkout,
        dataset="shakespeare_char",
    )
    arguments = ["--recipe", str(recipe), "--text", str(text), "--target", "3.2", "--every", "4", "--nanogpt", str(checkout)]
    time_to_loss.main(
        [*arguments, "--nanogpt_flags", "max_iters=7", "--results", str(tmp_path), "--", "--precision", "float32"]
    )
    head, ours, theirs = rows_of(tmp_path / "time_to_loss.md")
    assert (ours[0], ours[head.index("reached")], ours[-1]) == ("bardling", "yes", "1.00")
    assert int(ours[1]) % 4 == 0
    assert float(ours[head.index("validation loss")]) <= 3.2
    assert (theirs[:2], theirs[head.index("reached")]) == (["nanoGPT", "7"], "NO")
    with pytest.raises(UserError, match="no shipped recipe"):
        time_to_loss.main(["--recipe", "nonsense", "--text", str(text)])


def test_a_target_that_the_recipe_does_not_reach(
    tmp_path: Path, text: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time_to_loss

    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "val", "step": 10, "loss": 3.5}\n{"kind": "val", "step": 12, "loss": 3.6}\n'
    )
    monkeypatch.setattr(time_to_loss.Ours, "_run", lambda *_: (tmp_path, 0.0, 0.0))
    with pytest.raises(UserError, match=r"does not reach 3\.4 in its 12 steps: .* 3\.5000, after step 10"):
        time_to_loss.main(["--recipe", str(recipe), "--text", str(text), "--target", "3.4", "--results", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_ablation(tmp_path: Path, text: Path, recipe: Path) -> None:
    import ablation

    arguments = [str(recipe), "--seconds", "0.05", "--seeds", "2", "--rounds", "1", "--block", "1", "--only", "rotary"]
    more = ["--data.source", str(text), "--data.tokenizer", "char", "--data.cache", str(tmp_path / "cache"), "--device", "cpu"]
    ablation.main([*arguments, "--results", str(tmp_path), "--", *more])
    head, whole, removed = rows_of(tmp_path / "ablation.md")
    assert (whole[0], removed[:2]) == (ablation.WHOLE, ["without rotary", "model.positions learned"])
    difference = float(removed[head.index("loss")]) - float(whole[head.index("loss")])
    assert float(removed[-1]) == pytest.approx(difference, abs=2e-4)


def test_only_what_changes_a_recipe_is_removed(recipe: Path) -> None:
    import ablation

    config = load_recipe(str(recipe))
    names = set(ablation.cases_of(config))
    assert {"without rmsnorm", "without qk-norm", "without mlp", "without muon (adamw, lr 0.001)"} <= names
    assert not {"without zero-init", "without softcap", "without value-embeddings", "without schedule"} & names
    plain = ablation.cases_of(load_recipe("gpt2-124m"))
    assert not any("muon" in name or "rotary" in name for name in plain)
    assert ablation.cases_of(config, ["muon"]).keys() == {ablation.WHOLE, *(name for name in names if "muon" in name)}
    with pytest.raises(UserError, match="softcap"):
        ablation.cases_of(config, ["softcap"])


def test_errors_are_one_line_with_status_2() -> None:
    command = [sys.executable, str(BENCHMARKS / "ablation.py"), "nonsense", "--list"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("ablation: nonsense: no shipped recipe")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_server_under_load(tmp_path: Path) -> None:
    import serve

    serve.main(["--tiny", "--results", str(tmp_path)])
    head, *rows = rows_of(tmp_path / "serve.md")
    assert head[0] == "client"
    assert [row[0] for row in rows[:4]] == ["whole", "stream", "slow", "disconnect"]
    assert all(int(row[1].replace(",", "")) > 0 for row in rows[:4])
    assert rows[5][0] == "bardling serve"
    assert "no slot stayed occupied" in (tmp_path / "serve.md").read_text()


@pytest.mark.slow
def test_preparing_is_compared_with_other_methods(tmp_path: Path) -> None:
    import prepare

    prepare.main(["--tiny", "--rounds", "1", "--results", str(tmp_path)])
    head, *rows = rows_of(tmp_path / "prepare.md")
    assert head[:2] == ["side", "seconds"]
    assert [row[0] for row in rows] == ["bardling", "bardling without gigatoken"]
    assert all(float(row[1].split()[0]) > 0 and float(row[4]) > 50 for row in rows)
    assert "equal to tokenizers: all 1," in (tmp_path / "prepare.md").read_text()


def test_a_wrong_id_is_found(tmp_path: Path) -> None:
    import prepare
    from bardling.data.tokens.prepare import prepare as make
    from bardling.data.tokens.tokenizer import build_tokenizer

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(120)))
    build_tokenizer("bpe:300", ["document 0123456789"]).save(tmp_path)
    spec = tmp_path / "tokenizer.json"
    make(str(text), tmp_path / "ds", str(spec), val_fraction=prepare.VAL_FRACTION)
    assert prepare.compare(text, tmp_path / "ds", spec) > 500
    tokens = tmp_path / "ds" / "train-00000.bin"
    content = bytearray(tokens.read_bytes())
    content[-4] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(UserError, match=r"train, from token [\d,]+: other ids than those of tokenizers"):
        prepare.compare(text, tmp_path / "ds", spec)


def test_the_baselines_of_preparing_write_all_tokens(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import prepare_sides
    from bardling.data.tokens.gpt2_bpe import cached_gpt2_files

    vocabulary = next(cached_gpt2_files(), None)
    if vocabulary is None:
        pytest.skip("GPT-2's tokenizer is not on this machine")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(3000)))
    sizes = {}
    for method in ("datasets_map", "pool_imap"):
        out = tmp_path / method
        subprocess.run([sys.executable, prepare_sides.__file__, method, str(text), str(out), str(vocabulary)], check=True)
        sizes[method] = sum(path.stat().st_size // 2 for path in out.iterdir() if path.suffix in (".bin", ".npy"))
    assert sizes["datasets_map"] > 9000
    assert 0 <= sizes["pool_imap"] - sizes["datasets_map"] < 100  # the head of a file of NumPy


def test_reading_with_files_and_maps(tmp_path: Path) -> None:
    import reading

    reading.main(["--tiny", "--results", str(tmp_path)])
    head, *rows = rows_of(tmp_path / "reading.md")
    assert head[0] == "method"
    assert [row[0] for row in rows] == list(reading.METHODS)
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)
