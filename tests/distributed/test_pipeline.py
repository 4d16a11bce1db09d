"""Pipelines: the losses, gradient norms, weights and texts of one process, from stages that hold some layers each."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bardling.config import ModelConfig, OptimConfig
from bardling.config.recipes import config_to_toml
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE, distributed
from bardling.distributed.device import Precision
from bardling.generation.generate import generate
from bardling.model.cache import KVCache
from bardling.model.init import initial_value
from bardling.planning.layout import Layout
from bardling.training.build import Execution, build
from bardling.training.objective import NextToken
from bardling.training.recovery.spikes import Limits
from bardling.training.run import resume, train
from bardling.training.step import StepSettings, train_step

VOCABULARY, LENGTH, SEQUENCES = 61, 16, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to compare with the same run of one process."""

    family: str = "qwen3"
    optimizer: str = "adamw"
    layout: tuple[int, int, int, int] = (1, 1, 1, 2)
    passes: int = 4
    schedule: str = "1f1b"
    precision: str = "float32"
    recompute: bool = False
    compiled: bool = False
    documents: bool = False
    steps: int = 4

    @property
    def model(self):
        options = {"n_layer": max(3, self.layout[3]), "n_head": 4, "n_embd": 32, "block_size": LENGTH, "vocab_size": VOCABULARY}
        return ModelConfig(family=self.family, tied=False, **options)


TINY = [Case(), Case(schedule="gpipe", passes=1, documents=True)]
PAIRS = [
    *(Case(family, optimizer, schedule=schedule, steps=20) for family, optimizer, schedule in [
        ("gpt2", "muon", "1f1b"), ("gpt2", "adamw", "gpipe"), ("llama", "adamw", "1f1b"), ("qwen3", "muon", "gpipe"),
    ]),
    Case(recompute=True),
    Case("gpt2", documents=True),
    Case(precision="bfloat16"),
    Case(precision="float16"),
]  # fmt: skip
FOURS = [
    *(Case(family, "muon", layout=(2, 1, 1, 2), passes=2, steps=20) for family in ("gpt2", "llama")),
    Case(layout=(2, 1, 1, 2), passes=2, documents=True),
    Case(layout=(1, 1, 1, 4), passes=8),
]


def batches(case, step, context):
    """This process's passes of a step; with documents, each sequence is cut into two at another place."""
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    found = []
    for numbers in torch.arange(SEQUENCES).chunk(context.data_size)[context.data_rank].chunk(case.passes):
        cuts = [row * LENGTH + cut for row, number in enumerate(numbers.tolist()) for cut in (0, 3 + number)]
        bounds = torch.tensor([*cuts, numbers.numel() * LENGTH], dtype=torch.int32) if case.documents else None
        found.append(Batch(tokens[numbers, :-1], tokens[numbers, 1:], bounds))
    return found


def trained(case, context, compiled):
    """The loss, norm and further sums of each step, and what was assembled. The last step exceeds the guard's limits."""
    execution = Execution(
        Precision(case.precision, "", "cpu"), compiled=compiled, recompute=case.recompute, schedule=case.schedule
    )
    optim = OptimConfig(name=case.optimizer, lr=1e-2, muon_precision="float32", ema_decay=0.9)
    assembly = build(case.model, optim, execution, context, seed=3)
    state = assembly.state
    initial = {name: parameter.detach().clone() for name, parameter in state.parameters.items()}
    for name, value in initial.items():
        assert torch.equal(value, initial_value(name, value.shape, case.model, 3)), name
    settings = StepSettings(NextToken(torch.arange(VOCABULARY) % 3), execution.precision, context, grad_clip=0.5)
    found = []
    for step in range(case.steps + 1):
        limits = Limits(1e9, 1e9 if step < case.steps else 1e-9)
        result = train_step(state, batches(case, step, context), settings, forward=assembly.forward, lr=1e-2, limits=limits)
        if not result.bad:
            state.ema.update(step)
        values = [result.loss, result.grad_norm, result.tokens, *result.sums.values()]
        found.append([*map(float, values), 0.0 if result.bad is None else float(result.bad)])
    return found, state


def evaluated(model):
    """Everything a model is asked for without gradients."""
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(9))
    bounds = torch.tensor([0, 5, LENGTH, 2 * LENGTH], dtype=torch.int32)
    tally = torch.arange(VOCABULARY) % 2 == 0
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    model.eval()
    with torch.no_grad():
        results = {
            "sum": model(tokens, tokens.roll(1)),
            "tally": model(tokens, tokens.roll(1), tally=tally),
            "losses": model(tokens, tokens.roll(1), reduction="none", documents=bounds),
            "scores": model(tokens, tokens.roll(1), output="scores"),
            "logits": model(tokens),
            "hidden": model(tokens, output="hidden"),
            "head": model.head(model(tokens, output="hidden")[:, -1]),
        }
    cache = KVCache(model.config, 2)
    with torch.no_grad():
        results["first"], results["second"] = model(tokens[:, :5], cache=cache), model(tokens[:, 5:7], cache=cache)
    texts = [list(generate(model, prompts, max_new_tokens=20, temperature=t, seed=1)) for t in (0.0, 1.0)]
    return results, texts, len(cache.keys)


def relative(found, expected):
    return [abs(a - b) / max(abs(b), 1e-9) for a, b in zip(found, expected, strict=True)]


@torch.no_grad()
def furthest(found, expected):
    return max(float((tensor - expected[name]).abs().max()) for name, tensor in found.items())


def compare(case, context):
    """How far the processes are from one process, and what each of them holds."""
    context = context.arranged(Layout(*case.layout))
    found, state = trained(case, context, case.compiled)
    held = (list(state.parameters), state.shards.owners, context.stage)
    boxes = [None] * context.world_size
    weights = {name: parameter.detach() for name, parameter in state.parameters.items()}
    dist.all_gather_object(boxes, (weights, state.ema.tensors(), held))
    with state.ema.applied():
        results, texts, cached = evaluated(state.model)
    expected, whole = trained(case, SINGLE, False)
    with whole.ema.applied():
        reference, written, _ = evaluated(whole.model)
    return {
        "steps": [relative(*pair) for pair in zip(found, expected, strict=True)],
        "skipped": [step[-1] for step in found],
        "weights": max(furthest(own, whole.parameters) for own, _, _ in boxes),
        "ema": max(furthest(ema, whole.ema.tensors()) for _, ema, _ in boxes),
        "results": {key: furthest({key: results[key]}, reference) for key in reference},
        "shapes": {key: list(results[key].shape) == list(reference[key].shape) for key in reference},
        "texts": texts == written,
        "cached": cached,
        "held": [names for *_, (names, _, _) in boxes],
        "owners": [owners for *_, (_, owners, _) in boxes],
        "stages": [stage for *_, (_, _, stage) in boxes],
        "names": list(whole.parameters),
    }  # fmt: skip


def main(folder, cases):
    with distributed("cpu") as context:
        found = [compare(case, context) for case in cases]
        (folder / f"{context.rank}.json").write_text(json.dumps(found))


def launched(folder, name, processes):
    """`launched[case][rank]` of a list of cases."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, __file__, str(folder), name], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return list(zip(globals()[name], zip(*ranks, strict=True), strict=True))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("pipeline"), "TINY", 2)


def check_as_one_process(case, ranks):
    tolerance = 1e-5 if case.precision == "float32" else 1e-2  # rounding grows from step to step
    for seen in ranks:
        assert max(seen["steps"][0]) < 1e-5, (case, seen["steps"])
        assert max(map(max, seen["steps"])) < tolerance, (case, seen["steps"])
        assert seen["skipped"] == [0.0] * case.steps + [1.0]
        if case.precision == "float32":
            # AdamW divides gradients that should be zero, such as those of key biases, by themselves.
            assert seen["weights"] < 1e-3
            assert seen["ema"] < 1e-3
            assert max(seen["results"].values()) < 1e-3, (case, seen["results"])
            assert seen["texts"]
        assert all(seen["shapes"].values())


def test_training_evaluation_and_generation_are_those_of_one_process(compared):
    for case, ranks in compared:
        check_as_one_process(case, ranks)


def test_each_parameter_is_in_one_stage(compared):
    for _, (seen, _) in compared:
        first, last = seen["held"]
        assert sorted(first + last) == sorted(seen["names"])
        assert {name.split(".")[2] for name in first if name.startswith("transformer.h.")} == {"0", "1"}
        assert "transformer.wte.weight" in first
        assert {"transformer.ln_f.weight", "lm_head.weight"} < set(last)
        assert seen["owners"] == [{name: int(name in last) for name in seen["names"]}] * 2
        assert seen["stages"] == [0, 1]


def test_the_cache_holds_the_layers_of_the_stage(compared):
    for _, ranks in compared:
        assert [seen["cached"] for seen in ranks] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "processes"), [("PAIRS", 2), ("FOURS", 4)])
def test_every_family_and_optimizer(cases, processes, tmp_path):
    for case, ranks in launched(tmp_path, cases, processes):
        check_as_one_process(case, ranks)


@pytest.mark.slow
def test_a_run_moves_from_a_pipeline_to_shards_to_one_process(tiny, change, tmp_path, torchrun):
    optim = {"name": "muon", "muon_precision": "float32", "ema_decay": 0.9, "decay_steps": 12}
    config = change(tiny, model={"family": "llama", "n_layer": 2, "n_kv_head": 1}, optim=optim)
    config = change(config, train={"steps": 12, "batch_size": 8, "micro_batch": 2})
    run, whole, recipe = tmp_path / "run", tmp_path / "whole", tmp_path / "recipe.toml"
    train(config, whole, quiet=True)
    recipe.write_text(config_to_toml(change(config, train={"steps": 3})))
    first = torchrun(2, "train", recipe, "--out", run, "--parallel.pipeline", "2")
    assert first.returncode == 0, first.stderr
    assert "layout pipeline (pipeline 2): as configured" in first.stdout
    moves = [
        ("--parallel.pipeline", "1", "--parallel.layout", "fsdp"),
        ("--parallel.pipeline", "2", "--parallel.layout", "auto"),
    ]
    for number, layout in enumerate(moves, 2):
        again = torchrun(2, "resume", run, "--train.steps", 3 * number, *layout)
        assert again.returncode == 0, again.stderr
    resume(run, config, quiet=True)
    for key in ("loss", "grad_norm"):
        found, expected = ([record[key] for record in records(each, "train")] for each in (run, whole))
        assert found == pytest.approx(expected, rel=1e-5)
    assert records(run, "val")[-1]["loss"] == pytest.approx(records(whole, "val")[-1]["loss"], rel=1e-5)


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


if __name__ == "__main__":
    main(Path(sys.argv[1]), globals()[sys.argv[2]])
