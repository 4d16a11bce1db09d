"""CORE on small task files, against a plain computation by its published rules, one prompt at a time; hostile files."""

import json
import random
import re

import jinja2
import pytest
import torch

from bardling.cli.main import main
from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.benchmarks import Subject, absolute_spec, check_spec, open_task
from bardling.model.gpt import GPT

WORDS = ["king", "queen", "rose", "thorn", "night", "day", "war", "sea"]
BLOCK_SIZE = 128
YAML = """
icl_tasks:
- label: choices
  dataset_uri: reading/choices.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- label: winograd
  dataset_uri: winograd.jsonl
  num_fewshot: [0]
  icl_task_type: schema
- label: recall
  dataset_uri: recall.jsonl
  num_fewshot: [1]
  icl_task_type: language_modeling
  continuation_delimiter: ""
"""
DELIMITERS = {"choices": "\nAnswer: ", "winograd": " ", "recall": ""}
FEWSHOT = {"choices": 2, "winograd": 0, "recall": 1}
BASELINES = {"choices": 25.0, "winograd": 50.0, "recall": 0.0, "unused": 10.0}


# What the metric's authors render, written down as templates.
def templates(example, prompt):
    return "{% for e in examples %}{{ " + example + " }}\n\n{% endfor %}" + prompt


TEMPLATES = {
    "choices": templates("e.query ~ delimiter ~ e.choices[e.gold]", "{{ item.query }}{{ delimiter }}{{ option }}"),
    "winograd": templates(
        "e.context_options[e.gold] ~ delimiter ~ e.continuation", "{{ option }}{{ delimiter }}{{ item.continuation }}"
    ),
    "recall": templates(
        "e.context | trim ~ delimiter ~ e.continuation", "{{ item.context | trim }}{{ delimiter }}{{ option }}"
    ),
}


def words(draw, low, high):
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def items(label, count):
    draw = random.Random(label)
    for number in range(count):
        if label == "choices":
            choices = [f"{words(draw, 0, 2)} {option}".strip() for option in draw.sample(WORDS, 4)]
            yield {"query": words(draw, 1, 6), "choices": choices, "gold": draw.randrange(4)}
        elif label == "winograd":
            options = [f"The {option} {words(draw, 0, 3)} met" for option in draw.sample(WORDS, 2)]
            yield {"context_options": options, "continuation": words(draw, 1, 3), "gold": draw.randrange(2)}
        else:
            yield {"context": words(draw, 1, 5) + "  ", "continuation": "s" * (1 + number % 2)}  # see `subject`


@pytest.fixture
def folder(tmp_path):
    """An evaluation bundle of three small tasks."""
    bundle = tmp_path / "bundle"
    (bundle / "eval_data" / "reading").mkdir(parents=True)
    (bundle / "core.yaml").write_text(YAML)
    rows = "".join(f'{label},"a, description",{value}\n' for label, value in BASELINES.items())
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Description,Random baseline\n" + rows)
    for label, path in (("choices", "reading/choices"), ("winograd", "winograd"), ("recall", "recall")):
        lines = "".join(json.dumps(item) + "\n" for item in items(label, 23))
        (bundle / "eval_data" / f"{path}.jsonl").write_text(lines)
    return bundle


@pytest.fixture(scope="module")
def subject():
    """A random model of bytes, with weights large enough for its choices to differ from item to item."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=BLOCK_SIZE, vocab_size=257, positions="rotary"), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.head_weight[ord("s")] *= 3  # now and then the likeliest
    return Subject(model.eval(), build_tokenizer("byte", []), Precision("float32", "test", "cpu"))


def plain_accuracy(label, rows, subject):
    """The published procedure, one prompt at a time."""
    template, right = jinja2.Template(TEMPLATES[label], keep_trailing_newline=True), 0
    random.Random(1337).shuffle(rows)
    for number, item in enumerate(rows):
        others = [other for other in range(len(rows)) if other != number]
        chosen = random.Random(1234 + number).sample(others, FEWSHOT[label]) if FEWSHOT[label] else []
        options = item.get("choices") or item.get("context_options") or ["", item["continuation"]]
        settings = {"item": item, "examples": [rows[other] for other in chosen], "delimiter": DELIMITERS[label]}
        prompts = [template.render(option=option, **settings) for option in options]
        if label == "recall":
            prompts[0] = prompts[0].strip()
        tokens = [[256, *prompt.encode()] for prompt in prompts]
        if label == "recall":
            start = len(tokens[0])
            assert tokens[1][:start] == tokens[0]
            row = torch.tensor(tokens[1][-BLOCK_SIZE - 1 :])
            with torch.no_grad():
                likeliest = subject.model(row[None, :-1])[0].argmax(-1)
            count = len(tokens[1]) - start
            right += bool((likeliest[-count:] == row[-count:]).all())
            continue
        shortest = min(map(len, tokens))
        sides = [tuple(row[place] for row in tokens) for place in range(shortest)]
        if label == "winograd":
            sides = [tuple(row[-place - 1] for row in tokens) for place in range(shortest)]
        shared = next((place for place, side in enumerate(sides) if len(set(side)) > 1), shortest)
        means = []
        for row in tokens:
            count = shared if label == "winograd" else len(row) - shared
            cut = torch.tensor(row[-BLOCK_SIZE - 1 :])
            with torch.no_grad():
                logprobs = subject.model(cut[None, :-1])[0].double().log_softmax(-1).gather(1, cut[1:, None])[:, 0]
            means.append(-float(logprobs[-count:].mean()))
        right += means.index(min(means)) == item["gold"]
    return right / len(rows)


def test_scores_equal_a_plain_computation(folder, subject):
    found = open_task(f"core:{folder}").evaluate(subject)
    accuracies, centered = {}, {}
    for label, baseline in list(BASELINES.items())[:3]:
        accuracy = plain_accuracy(label, list(items(label, 23)), subject)
        accuracies[f"core:{label}"] = accuracy
        centered[label] = (accuracy - 0.01 * baseline) / (1 - 0.01 * baseline)
    assert {scores.task: scores.as_dict()["accuracy"] for scores in found[:-1]} == accuracies
    assert 0 < accuracies["core:recall"] < 1, "the items of this task tell right from wrong"
    assert [scores.as_dict()["centered"] for scores in found[:-1]] == pytest.approx(list(centered.values()))
    assert found[-1].task == "core"
    assert found[-1].as_dict()["core"] == pytest.approx(sum(centered.values()) / 3)
    deviations = [scores.as_dict()["centered_stderr"] for scores in found[:-1]]
    assert deviations[0] == pytest.approx((accuracies["core:choices"] * (1 - accuracies["core:choices"]) / 23) ** 0.5 / 0.75)
    assert found[-1].as_dict()["core_stderr"] == pytest.approx(sum(error**2 for error in deviations) ** 0.5 / 3)
    assert found[-1].items == 69


def test_fewer_items_are_the_first_ones_after_shuffling(folder, subject):
    few = open_task(f"core:{folder}", 5)
    (choices, *_) = few.evaluate(subject)
    rows = list(items("choices", 23))
    random.Random(1337).shuffle(rows)
    assert choices.items == 5
    assert [item.contexts[0] for item in few.tasks[0].items] == [row["query"] for row in rows[:5]]


def test_one_choice_may_be_the_beginning_of_another(folder, subject):
    rows = [{"query": "a", "choices": ["the king", "the king met"], "gold": 0}] * 3
    (folder / "eval_data" / "reading" / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_task(f"core:{folder}").evaluate(subject)[0].items == 3


def test_a_diverged_model_gets_no_item_right(folder, subject):
    model = GPT(subject.model.config, seed=1).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    found = open_task(f"core:{folder}").evaluate(Subject(model, subject.tokenizer, subject.precision))
    assert [scores.as_dict()["accuracy"] for scores in found[:-1]] == [0, 0, 0]


def test_the_folder_may_be_named_from_anywhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert absolute_spec("core:bundle") == f"core:{folder}"
    check_spec("core:bundle")


def faults():
    data, meta, tasks = "eval_data/winograd.jsonl", "eval_meta_data.csv", "core.yaml"
    row = '{"context_options": ["a", "b"], "continuation": "c", "gold": %s}\n'
    yield tasks, "icl_tasks: [", "is not valid YAML"
    yield tasks, "- 1", "icl_tasks must be a list of 1 to 1000 tasks"
    yield tasks, "icl_tasks: []", "icl_tasks must be a list"
    yield tasks, "icl_tasks: [3]", "task 1: is not a mapping"
    yield tasks, "icl_tasks: " + "[" * 1500, "core.yaml: is not valid YAML"
    yield tasks, "x: !!python/object/apply:os.system [touch hacked]", "is not valid YAML"
    yield tasks, " " * (1 << 20) + "a", "is too large"
    yield (
        tasks,
        YAML.replace("schema", "guessing"),
        "icl_task_type = 'guessing': must be multiple_choice, schema, language_modeling",
    )
    yield (
        tasks,
        YAML.replace("winograd.jsonl", "../../secret.jsonl"),
        "dataset_uri = '../../secret.jsonl': must be a path inside",
    )
    yield tasks, YAML.replace("winograd.jsonl", "/etc/passwd"), "dataset_uri = '/etc/passwd': must be a path inside"
    yield tasks, YAML.replace("winograd.jsonl", "missing.jsonl"), "missing.jsonl: cannot read: no such file"
    yield tasks, YAML.replace("[0]", "[-1]"), "num_fewshot = -1: must be a number from 0 to 100"
    yield tasks, YAML.replace("[0]", "[23]"), "23 items, for 23 examples before each: the task needs 24 to"
    yield tasks, YAML.replace("winograd\n", "choices\n"), "label = 'choices' occurs twice"
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    yield tasks, bomb + YAML.replace("label: winograd", "label: *a59"), "task 2: label = [[[[[["
    yield tasks, YAML.replace("[0]", "0x" + "f" * 40_000), "num_fewshot = an integer of 160000 bits: must be a number"
    yield tasks, YAML.replace("label: winograd", "label: [1]"), "label = [1]: must be a string"
    yield meta, "Eval Task,Random baseline\nchoices,25\n", "label = 'winograd': "
    yield meta, "Task,Random baseline\nchoices,25\n", "line 2: needs the columns 'Eval Task' and 'Random baseline'"
    yield meta, "Eval Task,Random baseline\nchoices,100\n", "line 2: Random baseline = '100': must be a percentage below 100"
    yield meta, "Eval Task,Random baseline\nchoices,nan\n", "Random baseline = 'nan'"
    yield data, row % 2, "winograd.jsonl, line 1: gold = 2: must be the index of the right option, 0 to 1"
    yield data, row % "true", "gold = True"
    yield data, row % 0 + "[1]\n", "line 2: context_options = nothing"
    yield data, '{"context_options": ["a"], "continuation": "c", "gold": 0}\n', "must be a list of 2 to 64 strings"
    yield data, '{"context_options": ["a", "b"], "continuation": "", "gold": 0}\n', "continuation = '': must be a string"
    yield data, "{\n", "line 1: is not valid JSON"
    yield data, "", "0 items, for 0 examples"


@pytest.mark.parametrize(("name", "content", "message"), list(faults()))
def test_faults_in_the_files_are_named(folder, name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_task(f"core:{folder}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"core\.yaml not found: the folder of an evaluation bundle has core\.yaml"):
        check_spec(f"core:{tmp_path}")


def test_characters_that_the_tokenizer_lacks_are_found_early(folder):
    config = ModelConfig(vocab_size=30, block_size=32)
    with pytest.raises(UserError, match=r"core, task choices: character .* is not in the vocabulary"):
        open_task(f"core:{folder}").check(build_tokenizer("char", ["abc"]), config)


def test_eval_prints_each_task_and_the_mean(folder, tmp_path, corpus, capsys):
    recipe = f'device = "cpu"\ncompile = "off"\n[data]\nsource = {json.dumps(str(corpus))}\ntokenizer = "byte"\n[model]\n'
    recipe += "n_layer = 1\nn_head = 1\nn_embd = 8\nblock_size = 16\n[train]\nsteps = 2\nbatch_size = 2\n[sample]\nevery = 0\n"
    (tmp_path / "r.toml").write_text(recipe)
    main(["train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")])
    capsys.readouterr()
    main(["eval", str(tmp_path / "run"), "--windows", "2", "--tasks", f"core:{folder}", "--task_items", "4", "--device", "cpu"])
    out = capsys.readouterr().out
    assert re.search(r"^core:choices +\d\.\d{4} ± \d\.\d{4} accuracy", out, re.MULTILINE)
    assert re.search(r"^core +-?\d\.\d{4} ± \d\.\d{4} CORE, mean of the centered accuracies", out, re.MULTILINE)
    assert "12 of 69 items" in out
