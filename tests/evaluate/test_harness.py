"""Our models in lm-eval: every answer equals that of lm-eval's backend `hf` on the exported folder; lm-eval's tasks here."""

import gzip
import importlib.metadata
import itertools
import json
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bardling.checkpoint.load import load
from bardling.cli.main import main
from bardling.config.recipes import config_from_dict
from bardling.config.run import RunConfig
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.benchmarks import Subject, absolute_spec, check_spec, open_task
from bardling.training.run import train

pytest.importorskip("lm_eval")
WORDS = ["king", "queen", "rose", "thorn", "night", "day"]
BLOCK_SIZE = 32

TASK = """
task: met
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {items}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run of a Llama-like model with a BPE of its own; long enough to prefer what the text has."""
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": BLOCK_SIZE},
        "data": {"source": str(corpus), "tokenizer": "bpe:300"},
        "optim": {"lr": 1e-2, "warmup_steps": 5},
        "train": {"steps": 40, "batch_size": 8},
        "eval": {"every": 0, "windows": 4},
        "sample": {"every": 0},
    }
    return train(config_from_dict(RunConfig, values, "test"), tmp_path_factory.mktemp("harness") / "run", quiet=True).folder


@pytest.fixture(scope="module")
def models(run, tmp_path_factory):
    """The same model in lm-eval twice: by our adapter, and exported in lm-eval's own backend for transformers."""
    from lm_eval.models.huggingface import HFLM

    from bardling.evaluate.harness import BardlingLM

    out = tmp_path_factory.mktemp("exported") / "model"
    main(["export", str(run), "--out", str(out)])
    # With its cache, lm-eval 0.4.13 confuses requests of equal tokens whose continuations begin in different places.
    options = {"device": "cpu", "dtype": "float32", "batch_size": 4, "logits_cache": False}
    return BardlingLM(path=str(run), device="cpu"), HFLM(pretrained=str(out), **options)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task of lm-eval with a local dataset: the YAML file."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [
        {"ctx": f"The {first} and the", "endings": [f" {second} met", " 999999", " zzzz"], "label": number % 2 and 2}
        for number, (first, second) in enumerate(itertools.pairwise(WORDS))
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "met.yaml"
    path.write_text(TASK.format(items=tmp_path / "items.jsonl"))
    return path


def requests(*arguments):
    return [SimpleNamespace(args=given, task_name="t") for given in arguments]


def test_log_likelihoods_equal_those_of_transformers(models):
    ours, theirs = models
    pairs = [(f"The {a} and the", f" {b} met {n} times.") for n, (a, b) in enumerate(itertools.pairwise(WORDS))]
    pairs += [
        (context, ending) for context in ("The king", "The king and") for ending in (" and the queen", " rose", "\n", " 9")
    ]
    pairs += [
        ("", "The night"),  # from the token that begins a text
        ("The king  ", "and the queen"),  # spaces at the end of a context belong to the continuation
        ("The rose and the thorn met 3 times.\n" * 5, "The"),  # longer than the context
        ("<|endoftext|>The", " king"),  # the name of a special token is that token
        ("The king met", "<|endoftext|>"),
        ("", "<|endoftext|>The king"),
        ("naïve ∑", " 🙂 day"),
    ]
    found, expected = ours.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    for pair, (total, greedy), (total_of_hf, greedy_of_hf) in zip(pairs, found, expected, strict=True):
        assert total == pytest.approx(total_of_hf, abs=1e-4), pair
        assert greedy == greedy_of_hf, pair
    assert {greedy for _, greedy in found} == {True, False}


def multiple_choice_items() -> list[dict]:
    """200 items in HellaSwag's form: of the file that BARDLING_HELLASWAG names, or made here."""
    if path := os.environ.get("BARDLING_HELLASWAG"):
        with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:  # noqa: PTH123
            return random.Random(0).sample([json.loads(line) for line in file], 200)
    draw = random.Random(0)

    def sentences(count: int) -> str:
        return " ".join(
            f"The {draw.choice(WORDS)} and the {draw.choice(WORDS)} met {draw.randrange(9)} times." for _ in range(count)
        )

    return [{"ctx": sentences(draw.randint(1, 4)), "endings": [sentences(1) for _ in range(4)]} for _ in range(200)]


@pytest.mark.slow  # 2,400 texts
def test_a_server_and_the_adapter_score_items_as_transformers_does(tmp_path):
    """HellaSwag's form, item by item: lm-eval's `local-completions` through our server, `bardling`, and `hf` on the export."""
    pytest.importorskip("tenacity")  # of lm-eval's client
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from serve_help import running_server

    from bardling.evaluate.harness import BardlingLM

    items = multiple_choice_items()
    texts = [f"{item['ctx']} {ending}" for item in items for ending in item["endings"]]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 256},
        "data": {"source": str(tmp_path / "text.txt"), "tokenizer": "bpe:2048", "cache": str(tmp_path / "cache")},
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "train": {"steps": 60, "batch_size": 8},
        "eval": {"every": 0, "windows": 4},
        "sample": {"every": 0},
    }
    run, out = tmp_path / "run", tmp_path / "out"
    train(config_from_dict(RunConfig, values, "test"), run, quiet=True)
    main(["export", str(run), "--out", str(out)])
    pairs = requests(*[(item["ctx"], f" {ending}") for item in items for ending in item["endings"]])
    hf = HFLM(pretrained=str(out), device="cpu", dtype="float32", batch_size=8, logits_cache=False)
    assert max(len(hf.tok_encode(text)) for text in texts) < 256
    expected = hf.loglikelihood(pairs, disable_tqdm=True)
    with running_server(run) as served:
        settings = {"tokenizer_backend": "huggingface", "tokenizer": str(out), "max_length": 256, "num_concurrent": 4}
        server = LocalCompletionsAPI(base_url=f"{served.url}/v1/completions", model="run", **settings)
        through_server = server.loglikelihood(pairs, disable_tqdm=True)
    for name, found in (("server", through_server), ("bardling", BardlingLM(path=str(run), device="cpu").loglikelihood(pairs))):
        differences = [abs(ours[0] - theirs[0]) for ours, theirs in zip(found, expected, strict=True)]
        print(f"{name}: {len(found)} endings, largest difference {max(differences):.1e}")
        assert max(differences) < 1e-4, name
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected], name
    assert min(total for total, _ in expected) < -5


def test_log_likelihoods_of_whole_texts_equal_those_of_transformers(models):
    ours, theirs = models
    texts = [("The king and the queen met 3 times.\n" * count,) for count in (1, 2, 3, 7)]
    expected = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests(*texts)) == pytest.approx(expected, abs=1e-3, rel=1e-5)
    assert ours.loglikelihood_rolling(requests(("",))) == [0.0]


def test_a_continuation_beyond_the_context_is_scored_in_parts(models):
    ours, _ = models
    tokenizer, model = ours.subject.tokenizer, ours.subject.model
    text = " and the queen met 3 times.\nThe rose" * 6
    context, ids = tokenizer.encode("The king").tolist(), tokenizer.encode("The king" + text).tolist()
    assert len(ids) - len(context) > 2 * BLOCK_SIZE
    total, start = 0.0, len(context)
    while start < len(ids):  # each part with as much before it as fits
        part = ids[start : start + BLOCK_SIZE]
        row = torch.tensor(ids[max(0, start + len(part) - BLOCK_SIZE - 1) : start + len(part)])
        with torch.no_grad():
            logprobs = model(row[None, :-1])[0].double().log_softmax(-1)
        total += float(logprobs[-len(part) :].gather(1, torch.tensor(part)[:, None]).sum())
        start += len(part)
    ((found, _),) = ours.loglikelihood(requests(("The king", text)))
    assert found == pytest.approx(total, rel=1e-5)


def test_generated_texts_equal_those_of_transformers(models):
    ours, theirs = models
    settings = {"until": ["\n", "times"], "max_gen_toks": 12, "do_sample": False}
    contexts = [(f"The {word} and the", settings) for word in WORDS] + [("The rose and the thorn met 3 times.\n" * 5, settings)]
    found = ours.generate_until(requests(*contexts))
    assert found == theirs.generate_until(requests(*contexts), disable_tqdm=True)
    assert any(found)
    assert not any("times" in text for text in found)


def test_settings_of_generation_without_an_equivalent_are_named(models):
    with pytest.raises(UserError, match="generation_kwargs: num_beams is not supported"):
        models[0].generate_until(requests(("The", {"until": ["\n"], "num_beams": 4})))
    with pytest.raises(UserError, match="generation_kwargs: penalty_alpha is not supported"):
        models[0].generate_until(requests(("The", {"until": [], "penalty_alpha": 0.6})))


def test_samples_need_to_be_asked_for(models):
    def texts(**settings):
        return models[0].generate_until(requests(*[("The", {"until": [], "max_gen_toks": 20, **settings})] * 4))

    assert len(set(texts())) == 1, "greedy"
    assert len(set(texts(do_sample=True, temperature=2.0))) > 1


def test_the_entry_point_names_the_model():
    from lm_eval.api.registry import get_model

    from bardling.evaluate.harness import BardlingLM

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    value = project["project"]["entry-points"]["lm_eval.models"]["bardling"]
    assert importlib.metadata.EntryPoint("bardling", value, "lm_eval.models").load() is BardlingLM
    assert get_model("bardling") is BardlingLM
    assert get_model("hf").__name__ == "HFLM", "lm-eval's own models are still there"


@pytest.mark.slow  # lm-eval reads thousands of files to list its tasks
def test_the_command_of_lm_eval_knows_the_model(run, task):
    """As long as lm-eval does not read entry points, through a module that registers the model first."""
    argv = ["run", "--model", "bardling", "--model_args", f"path={run}", "--include_path", str(task.parent), "--tasks", "met"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(task.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bardling.evaluate", *argv], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "|met" in done.stdout
    assert "0.6|±  |0.2449|" in done.stdout


def test_tasks_of_lm_eval_in_eval(run, task, capsys, monkeypatch):
    monkeypatch.chdir(task.parent)
    main(["eval", str(run), "--data", str(task), "--tasks", "lm-eval:met.yaml", "--device", "cpu", "--precision", "float32"])
    out = capsys.readouterr().out.splitlines()
    (place,) = [number for number, line in enumerate(out) if line.startswith("lm-eval:met ")]
    assert out[place].split()[1:] == ["0.6000", "±", "0.2449", "acc"]
    assert out[place + 1].split()[:3] == ["0.6000", "±", "0.2449"]
    assert "5 of 5 items" in out[place + 2]


def test_fewer_items_are_the_same_every_time(run, task):
    loaded = load(run)
    subject = Subject(loaded.build(), loaded.needed_tokenizer(), Precision("float32", "test", "cpu"))
    few = open_task(f"lm-eval:{task}", 3, seed=1)
    (first,), (second,) = few.evaluate(subject), few.evaluate(subject)
    assert first.as_dict() == second.as_dict()
    assert first.items == 3
    assert "3 of 5 items" in first.notes[0]
    assert open_task(f"lm-eval:{task}", 3, seed=1).chosen == few.chosen
    assert few.chosen != open_task(f"lm-eval:{task}", 3, seed=2).chosen


def test_a_task_that_cannot_be_opened_is_named(task, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"task lm-eval:missing\.yaml: no such file"):
        check_spec("lm-eval:missing.yaml")
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n")
    with pytest.raises(UserError, match=r"task lm-eval:bad.yaml: lm-eval cannot load it \(.*nowhere.jsonl"):
        open_task("lm-eval:bad.yaml")
    assert absolute_spec("lm-eval:bad.yaml") == f"lm-eval:{tmp_path}/bad.yaml"
    assert absolute_spec("lm-eval:arc_easy") == "lm-eval:arc_easy"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"task lm-eval:piqa: needs the package lm_eval: pip install 'bardling\[eval\]'"):
        check_spec("lm-eval:piqa")


def test_chat_templates_reach_the_model(models):
    ours, _ = models
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    template += "{% if add_generation_prompt %}<a>{% endif %}"
    files = ours.subject.tokenizer.interface.files
    object.__setattr__(files, "template", template)
    try:
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " The king "}]
        assert ours.chat_template(True) == template
        assert ours.apply_chat_template(chat[:1]) == "<user>Hi</user><a>"
        assert ours.apply_chat_template(chat, add_generation_prompt=False) == "<user>Hi</user><assistant> The king"
    finally:
        object.__setattr__(files, "template", None)


@pytest.mark.slow  # lm-eval reads thousands of files to list its tasks
def test_a_misspelt_task_of_lm_eval_is_named():
    with pytest.raises(UserError, match=r"lm-eval has no such task \(did you mean 'arc_easy'\?\); `lm-eval ls tasks` lists"):
        open_task("lm-eval:arc_esay")


def test_arguments_of_the_model_come_before_those_of_the_command(run):
    from bardling.evaluate.harness import BardlingLM

    made = BardlingLM.create_from_arg_obj(
        {"path": str(run), "device": "cpu"}, {"device": "meta", "batch_size": 1, "other": None}
    )
    assert made.subject.context.device.type == "cpu"


def test_a_model_without_a_path_is_refused():
    from bardling.evaluate.harness import BardlingLM

    with pytest.raises(UserError, match="path=runs/first"):
        BardlingLM()


def test_without_lm_eval_the_command_names_the_extra(monkeypatch):
    from bardling.evaluate.__main__ import main as command

    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(UserError, match=r"needs the package lm_eval.*: pip install 'bardling\[eval\]'"):
        command()
