"""Tasks of lm-eval and CORE at intervals of a run: the scores that `bardling eval` finds, and a run that they do not change."""

import json

import pytest

from bardling.cli.main import main
from bardling.config.recipes import config_to_toml
from bardling.errors import UserError
from bardling.training.run import resume, train

pytest.importorskip("lm_eval")
ITEMS = [
    {"query": "The king and the", "choices": ["queen", "zzzz"], "gold": 0},
    {"query": "x", "choices": ["zz", "day"], "gold": 0},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A task of lm-eval with local items, which resamples for a standard error, and an evaluation bundle."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    lines = "".join(json.dumps(item) + "\n" for item in ITEMS)
    (tmp_path / "items.jsonl").write_text(lines)
    (tmp_path / "little.yaml").write_text(
        f"task: little\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood\n"
        'doc_to_text: "{{query}}"\ndoc_to_target: " {{choices[gold]}}"\n'
        "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},"
        " {metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "bundle" / "eval_data").mkdir(parents=True)
    (tmp_path / "bundle" / "eval_data" / "a.jsonl").write_text(lines)
    (tmp_path / "bundle" / "eval_meta_data.csv").write_text("Eval Task,Random baseline\na,50\n")
    entry = "{label: a, dataset_uri: a.jsonl, num_fewshot: [1], icl_task_type: multiple_choice}"
    (tmp_path / "bundle" / "core.yaml").write_text(f"icl_tasks: [{entry}]\n")
    return (f"lm-eval:{tmp_path / 'little.yaml'}", f"core:{tmp_path / 'bundle'}")


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def losses(run):
    return [record["loss"] for record in records(run, "train")]


def test_tasks_are_measured_at_intervals_and_change_nothing(tiny, change, tasks, tmp_path, capsys):
    config = change(tiny, model={"dropout": 0.1}, eval={"tasks": tasks, "tasks_every": 15}, data={"tokenizer": "byte"})
    folder = train(config, tmp_path / "run", quiet=True).folder
    found = records(folder, "task")
    assert [(record["step"], record["task"]) for record in found] == [
        (step, task) for step in (15, 30) for task in ("lm-eval:little", "core:a", "core")
    ]
    assert set(found[0]) - {"kind", "step", "task", "items"} == {"perplexity", "perplexity_stderr", "acc", "acc_stderr"}
    assert set(found[2]) - {"kind", "step", "task", "items"} == {"core", "core_stderr"}
    without = train(change(config, eval={"tasks": ()}), tmp_path / "without", quiet=True).folder
    assert losses(folder) == losses(without), "lm-eval seeds generators, but not those of the run"
    capsys.readouterr()
    main(["eval", f"{folder}@step-30", "--windows", "2", "--tasks", *tasks, "--device", "cpu", "--precision", "float32"])
    out = capsys.readouterr().out
    for record, metric in ((found[3], "perplexity"), (found[4], "accuracy"), (found[5], "core")):
        assert f"{record[metric]:.4f} ± {record[f'{metric}_stderr']:.4f}" in out
    again = resume(folder, change(config, train={"steps": 32}, optim={"decay_steps": 30}), quiet=True).folder
    assert [record["step"] for record in records(again, "task")][6:] == [32] * 3


def test_a_missing_task_ends_a_new_run_before_its_first_step(tiny, change, tasks, tmp_path):
    with pytest.raises(UserError, match=r"task lm-eval:.*nowhere\.yaml: no such file"):
        train(change(tiny, eval={"tasks": (f"lm-eval:{tmp_path / 'nowhere.yaml'}",)}), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"core, task a: character 'z' .* is not in the vocabulary"):
        train(change(tiny, eval={"tasks": tasks[1:]}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # several processes, each of which imports lm-eval
def test_several_processes_find_the_same_scores(tiny, change, tasks, tmp_path, torchrun):
    (tmp_path / "generate.yaml").write_text(
        (tmp_path / "little.yaml").read_text().split("output_type")[0].replace("task: little", "task: generate")
        + 'output_type: generate_until\ndoc_to_text: "{{query}}"\ndoc_to_target: " {{choices[gold]}}"\n'
        + "generation_kwargs: {until: ['\\n'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n"
    )
    tasks = (*tasks, f"lm-eval:{tmp_path / 'generate.yaml'}")
    config = change(tiny, eval={"tasks": tasks, "tasks_every": 15}, data={"tokenizer": "byte"})
    one = train(config, tmp_path / "one", quiet=True).folder
    (tmp_path / "two.toml").write_text(config_to_toml(config))
    done = torchrun(2, "train", tmp_path / "two.toml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    found, expected = records(tmp_path / "two", "task"), records(one, "task")
    assert len(expected) == 8
    for record, other in zip(found, expected, strict=True):
        assert set(record) == set(other)
        numbers = [name for name, value in record.items() if isinstance(value, float)]
        assert [record[name] for name in numbers] == pytest.approx([other[name] for name in numbers], rel=1e-5)
    evaluated = torchrun(2, "eval", tmp_path / "two", "--windows", "2", "--tasks", *tasks, "--precision", "float32")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"{found[-1]['exact_match']:.4f}" in evaluated.stdout
