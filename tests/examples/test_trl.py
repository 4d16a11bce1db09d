"""The example of a handover to TRL: its files fit together, and its commands train a model that Bardling reads back.

The slow test installs TRL with pip, beside the packages of this environment: into a temporary folder, or into the one that
BARDLING_TEST_TRL names, where later runs find it.
"""

import hashlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bardling.checkpoint.load import load
from bardling.cli.main import main
from bardling.data.text.conversations import conversation
from bardling.data.tokens.tokenizer import load_tokenizer
from bardling.training.run import train
from chat_models import write_scripted_model

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "trl"
BLOCKS = re.findall(r"^```\n(.*?)^```$", (EXAMPLE / "README.md").read_text(encoding="utf-8"), re.M | re.S)
COMMANDS = re.findall(r"^(?:echo (\".*\") \| )?bardling (.*)$", "".join(BLOCKS), re.M)  # (input, arguments)
METHODS = ("sft", "dpo", "grpo")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A copy of the example, as the current folder."""
    folder = tmp_path / "trl"
    shutil.copytree(EXAMPLE, folder)
    monkeypatch.chdir(folder)
    return folder


def rows(name):
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_the_configurations_name_what_exists(example):
    yaml = pytest.importorskip("yaml")
    runpy.run_path("make_data.py", run_name="__main__")
    rewards = runpy.run_path("rewards.py")
    written = {re.search(r"--out (\S+)", arguments).group(1) for _, arguments in COMMANDS if "--out" in arguments}
    read = {word for _, arguments in COMMANDS for word in arguments.split()}
    for method in METHODS:
        assert f"trl {method} --config {method}.yaml\n" in BLOCKS
        config = yaml.safe_load(Path(f"{method}.yaml").read_text())
        assert config["model_name_or_path"] in written
        assert config["output_dir"] in read
        assert rows(config["datasets"][0]["data_files"])
        assert config["save_strategy"] == "no"  # a string: YAML's no is False
    names = [name.removeprefix("rewards.") for name in config["reward_funcs"]]
    completions = [[{"role": "assistant", "content": text}] for text in ("1 plus 2 is 3.", "1 plus 2 is 33.")]
    found = {name: rewards[name](completions=completions, answer=["3", "3"], prompts=None) for name in names}
    assert found["correct"] == [1, 0]
    assert 0 > found["brief"][0] > found["brief"][1]


def test_the_data_are_conversations_and_preferences(example):
    runpy.run_path("make_data.py", run_name="__main__")
    for row in rows("conversations.jsonl"):
        assert conversation(row) == row["messages"]
    for row in rows("preferences.jsonl"):
        assert row["chosen"] != row["rejected"]
        assert conversation({"messages": row["prompt"] + row["chosen"]})
    for row in rows("prompts.jsonl"):
        assert row["prompt"][0]["content"].startswith("What is ")
        int(row["answer"])


def test_the_commands_of_bardling_run(example, monkeypatch, capsys):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    runpy.run_path("make_data.py", run_name="__main__")
    write_scripted_model(Path("runs/assistant"), "\nfour", block_size=256)
    ends = [load_tokenizer("runs/assistant").interface.eos[0], 1]
    Path("runs/assistant/generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    for text, arguments in COMMANDS:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{text.strip(chr(34))}\n".encode())))
        main(shlex.split(arguments))
        if arguments.startswith("export runs"):  # what TRL would make of it, with nothing learned
            base = transformers.AutoModelForCausalLM.from_pretrained("out/assistant")
            adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", fan_in_fan_out=True)
            peft.get_peft_model(base, adapter).save_pretrained("out/sft-lora")
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(f"out/assistant/{name}", "out/sft-lora")
            for method in ("dpo", "grpo"):
                shutil.copytree("out/assistant", f"out/{method}")
    shown = capsys.readouterr().out
    assert all(re.search(rf"out/{name} .*\d\.\d{{4}}", shown) for name in ("assistant", *METHODS))
    assert shown.endswith("four\n")
    assert text_of(load_tokenizer("out/sft")) == text_of(load_tokenizer("runs/assistant"))
    assert list(load_tokenizer("out/sft").interface.eos) == ends
    assert len(COMMANDS) == 4


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment variables with which `trl` and `bardling` run, without a network."""
    for package in ("transformers", "peft", "datasets", "accelerate"):
        pytest.importorskip(package)
    named = os.environ.get("BARDLING_TEST_TRL")
    folder = Path(named) if named else tmp_path_factory.mktemp("installed")
    if not (folder / "bin" / "trl").exists():
        pinned = re.search(r"^trl==.*$", (ROOT / "constraints.txt").read_text(), re.M).group()
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), pinned]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"pip cannot install {pinned}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    paths = {
        "PATH": [folder / "bin", Path(sys.executable).parent, os.environ["PATH"]],
        "PYTHONPATH": [folder, ROOT / "src"],
    }
    joined = {name: os.pathsep.join(map(str, parts)) for name, parts in paths.items()}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hf")), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **joined, **offline}


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def text_of(tokenizer):
    """What determines the tokens of conversations and answers; transformers adds a post-processor that does nothing."""
    about = tokenizer.interface
    vocabulary = {key: value for key, value in tokenizer.content.items() if key != "post_processor"}
    return vocabulary, about.chat_template, about.bos, about.eos, about.pad, about.start, about.end


@pytest.mark.slow
def test_trl_trains_the_export_and_bardling_reads_the_result(tiny, change, example, environment):
    transformers = pytest.importorskip("transformers")
    model = {"family": "qwen3", "block_size": 256, "n_embd": 32}
    base = change(tiny, model=model, data={"tokenizer": "bpe:400"}, sample={"every": 0}, train={"steps": 20})
    train(base, "runs/base", quiet=True)
    runpy.run_path("make_data.py", run_name="__main__")
    data = ["--data.source", "conversations.jsonl", "--device", "cpu", "--compile", "off", "--precision", "float32"]
    main(["train", "chat", "--model.init", "runs/base", "--out", "runs/assistant", "--train.steps", "5", *data])
    exported = {}
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", block], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        exported = exported or digests(Path("out/assistant"))
    assert digests(Path("out/assistant")) == exported
    before = load("out/assistant")
    for method in METHODS:
        found = load(f"out/{method}")
        assert any(not torch.equal(tensor, before.state[name]) for name, tensor in found.state.items())
        assert text_of(found.tokenizer) == text_of(before.tokenizer)
        reference = transformers.AutoModelForCausalLM.from_pretrained(f"out/{method}", dtype=torch.float32)
        tokens = torch.randint(found.config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = reference(tokens).logits
            torch.testing.assert_close(found.build()(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_losses_of_the_benchmark_equal_those_of_trl(environment, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "sft.py"), "--tiny", "--results", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = (tmp_path / "sft.md").read_text()
    assert results.count("within the tolerance of 0.0001") == 3
    assert re.search(r"^\| trl-packed +\| +2 \| +0% \|", results, re.M)
