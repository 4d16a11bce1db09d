"""A contributor adds one component of each kind in a package of their own, and a recipe selects it by name.

The package is installed as pip would install it: a module, and a `dist-info` folder with entry points, on the path. Bardling
itself does not change.
"""

import importlib
import json

import pytest

from bardling.config.recipes import load_recipe
from bardling.errors import UserError
from bardling.extensions import HOOKS, OPTIMIZERS
from bardling.training.run import resume, train

MODULE = '''
"""One toy component of each kind."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from bardling.checkpoint.export import ExportFormat
from bardling.checkpoint.load import load
from bardling.data.text.sources import Document
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.data.tokens.vocabulary import byte_content
from bardling.evaluate.benchmarks import Metric, Scores
from bardling.monitor import RunInfo
from bardling.training.objective import NextToken, Sums


@dataclass(frozen=True)
class Counting:
    """A source: documents that count from 1, as many as its spec says."""

    rest: str

    @property
    def name(self):
        return "counting"

    def documents(self):
        for number in range(int(self.rest)):
            yield Document(f"number {number}", " ".join(str(n) for n in range(number, number + 30)))

    def identity(self):
        return f"{int(self.rest):064x}"

    def size(self):
        return 100 * int(self.rest)


def toy_tokenizer(texts):
    """A tokenizer: bytes."""
    return Tokenizer(byte_content(), "byte")


class SignSGD(torch.optim.Optimizer):
    """An optimizer with a state of its own."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    mean = state.setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.5)
                    parameter.sub_(mean.sign(), alpha=group["lr"])


def toy_optimizer(trained, config, options):
    return SignSGD([parameter for _, parameter in trained], config.lr)


class HalfLoss(NextToken):
    """An objective: half the next-token loss, and how many targets were even."""

    def __call__(self, forward, batch):
        sums = super().__call__(forward, batch)
        return Sums(sums.loss / 2, {**sums.others, "even": (batch.targets % 2 == 0).sum()})


def toy_objective(tokenizer, device):
    return HalfLoss()


class CountSteps:
    """A hook: writes each step's number and how many of its targets were even."""

    def __init__(self, run):
        self.run = run

    def __call__(self, state, result):
        if result is not None:
            line = json.dumps([state.step, int(result.sums["even"].item())])
            with Path(OUT, "hook.jsonl").open("a") as file:
                file.write(line + "\\n")


class Chance:
    """A kind of task: `chance:NAME` scores what guessing does."""

    name = "chance"

    def check(self, *_):
        pass

    def absolute(self, rest):
        return rest

    def open(self, rest, count, seed):
        return self

    def evaluate(self, subject):
        return [Scores(self.name, (Metric("luck", 0.5, 0.1),), subject.model.config.vocab_size)]


class ToySink:
    """A sink: counts the records of each kind."""

    def __init__(self, run: RunInfo):
        self.file, self.kinds = run.folder / "toy-sink.json", {}

    def log(self, record):
        self.kinds[record["kind"]] = self.kinds.get(record["kind"], 0) + 1

    def sample(self, step, prompt, texts):
        self.kinds["sample"] = self.kinds.get("sample", 0) + 1

    def flush(self):
        self.file.write_text(json.dumps(self.kinds))

    def close(self):
        self.flush()


def write_shapes(spec, out, *, best, dataset):
    out.mkdir(parents=True)
    shapes = {name: list(tensor.shape) for name, tensor in load(spec, best=best).state.items()}
    (out / "shapes.json").write_text(json.dumps(shapes))
    return []


CHANCE = Chance()
TOY_FORMAT = ExportFormat(write_shapes, "{out}/shapes.json: look at it")


def cubed_relu(x):
    """A component of the model: the MLP's activation."""
    return torch.relu(x) ** 3
'''

ENTRY_POINTS = """
[bardling.sources]
counting = toy_bardling:Counting
[bardling.tokenizers]
toy = toy_bardling:toy_tokenizer
[bardling.optimizers]
sign-sgd = toy_bardling:toy_optimizer
[bardling.objectives]
half = toy_bardling:toy_objective
[bardling.hooks]
count-steps = toy_bardling:CountSteps
[bardling.tasks]
chance = toy_bardling:CHANCE
[bardling.sinks]
toy = toy_bardling:ToySink
[bardling.export_formats]
shapes = toy_bardling:TOY_FORMAT
[bardling.activations]
relu3 = toy_bardling:cubed_relu
"""

RECIPE = """
device = "cpu"
precision = "float32"
compile = "off"

[model]
n_layer = 2
n_head = 2
n_embd = 16
block_size = 16
mlp = "relu3"

[data]
source = "counting:40"
tokenizer = "toy"

[optim]
name = "sign-sgd"
lr = 1e-3
warmup_steps = 2

[train]
steps = 12
batch_size = 4
log_every = 4
objective = "half"
hooks = ["count-steps"]

[eval]
every = 6
windows = 4
tasks = ["chance:coin"]

[sample]
every = 12
max_new_tokens = 4

[checkpoint]
every = 6
export = ["shapes"]

[monitor]
sinks = ["toy"]
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder of a recipe whose components come from a package that has just been installed."""
    site = tmp_path / "site-packages"
    info = site / "toy_bardling-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "toy_bardling.py").write_text(MODULE.replace("OUT,", f"{str(tmp_path)!r},"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-bardling\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    (tmp_path / "toy.toml").write_text(RECIPE)
    return tmp_path


def test_a_recipe_of_foreign_components_trains_resumes_and_exports(installed):
    config = load_recipe(str(installed / "toy.toml"))
    run = train(config, installed / "run", quiet=True).folder
    steps = [json.loads(line) for line in (installed / "hook.jsonl").read_text().splitlines()]
    assert [step for step, _ in steps] == list(range(1, 13)), "the hook saw every step"
    assert all(0 < even < 64 for _, even in steps), "and the objective's own sum"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record["loss"] for record in records if record["kind"] == "train"]
    validated = [record["loss"] for record in records if record["kind"] == "val"]
    assert trained[0] == pytest.approx(5.549 / 2, rel=0.02), "half of ln 257"
    assert trained[-1] < trained[0]
    assert validated[-1] > 1.5 * trained[-1], "validation measures next-token loss, whatever is minimised"
    kinds = json.loads((run / "toy-sink.json").read_text())
    assert kinds == {"train": 4, "val": 2, "task": 2, "sample": 1}
    (scored, *_) = [record for record in records if record["kind"] == "task"]
    assert scored == {"kind": "task", "step": 6, "task": "chance", "luck": 0.5, "luck_stderr": 0.1, "items": 257}
    shapes = json.loads((run / "exports" / "shapes-step-000012" / "shapes.json").read_text())
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == [64, 16]
    assert shapes["transformer.wte.weight"] == [257, 16] or shapes["transformer.wte.weight"][1] == 16
    assert "relu3" in (run / "config.toml").read_text()


def test_a_run_of_foreign_components_resumes_exactly(installed):
    import dataclasses
    import shutil

    config = load_recipe(str(installed / "toy.toml"))
    run = train(config, installed / "run", quiet=True).folder
    again = installed / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-000012")
    resume(again, dataclasses.replace(config), quiet=True)
    weights = [(folder / "checkpoints" / "step-000012" / "model.safetensors").read_bytes() for folder in (run, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"sign-sgd"', '"sign-sdg"', r"optim.name = 'sign-sdg': unknown optimizer; .*did you mean 'sign-sgd'"),
        ('"half"', '"halve"', r"train.objective = 'halve': unknown objective"),
        ('"count-steps"', '"count"', r"train.hooks = 'count': unknown hook"),
        ('["shapes"]', '["shape"]', r"checkpoint.export = 'shape': unknown export format; .*gguf, onnx, nanogpt, shapes"),
        ('"relu3"', '"relu4"', r"model.mlp = 'relu4': unknown activation"),
        ('sinks = ["toy"]', 'sinks = ["toys"]', r"monitor.sinks = 'toys': unknown sink"),
    ],
)
def test_a_name_that_nobody_provides_is_refused_with_the_names_that_exist(installed, old, new, message):
    path = installed / "toy.toml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


def test_a_script_registers_a_component_by_one_call(tiny, change, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(HOOKS, "_registered", {})
    HOOKS.register("seen", lambda run: lambda state, result: seen.append(state.step))
    config = change(change(tiny, optim={"warmup_steps": 0}), train={"steps": 3, "hooks": ("seen",)})
    train(config, tmp_path / "run", quiet=True)
    assert seen == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="there is already a hook named 'seen'"):
        HOOKS.register("seen", None)


def test_a_package_that_cannot_be_imported_is_named(installed):
    (installed / "site-packages" / "toy_bardling-1.0.dist-info" / "entry_points.txt").write_text(
        "[bardling.optimizers]\nbroken = no_such_module:thing\n"
    )
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"optim.name = 'broken': no_such_module:thing cannot be loaded .*reinstall"):
        OPTIMIZERS.get("optim.name", "broken")
