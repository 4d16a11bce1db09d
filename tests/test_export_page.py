"""Every command of ours in docs/export.md runs, in the order of the page, and leaves what the page promises."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from bardling.checkpoint.load import load_model, load_tokenizer_of
from bardling.cli.main import main
from bardling.training.run import train
from upload_hub import serve

pytest.importorskip("gguf")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
PAGE = Path(__file__).parents[1] / "docs" / "export.md"


def commands():
    found = re.findall(r"`bardling ([a-z]+ (?:runs|out)/[^`]*)`", PAGE.read_text(encoding="utf-8"))
    return list(dict.fromkeys(found))


def test_the_commands_of_the_page_run(tiny, change, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, model in (("mine", {"family": "qwen3"}), ("gpt2", {"gelu": "erf"})):
        data = {"tokenizer": "bpe:300"}
        config = change(tiny, model=model, data=data, optim={"warmup_steps": 0}, train={"steps": 1}, sample={"every": 0})
        train(config, Path("runs") / name, quiet=True)
    lora = change(config, model={"init": "runs/gpt2"}, tune={"lora_rank": 2})
    train(lora, Path("runs") / "adapted", quiet=True)
    with serve(monkeypatch) as hub:
        for command in commands():
            main(shlex.split(command))
    assert hub.files.keys() >= {"config.json", "model.safetensors", "README.md", "tokenizer.json"}
    assert b'from_pretrained("user/mine")' in hub.files["README.md"]
    names = {
        "mine",
        "mine-bf16",
        "mine.gguf",
        "mine-q8.gguf",
        "mine-chat",
        "mine-onnx",
        "nanogpt",
        "published",
        "adapter",
        "merged",
    }
    assert {path.name for path in Path("out").iterdir()} == names
    assert transformers.AutoModelForCausalLM.from_pretrained("out/mine-bf16").num_parameters() > 0
    shown = capsys.readouterr().out
    for usage in ("vllm serve out/mine\n", "mlx_lm.generate --model out/mine ", "llama-server -m out/mine-q8.gguf\n"):
        assert usage in shown
    assert len(commands()) == 11
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})
    model, tokenizer = load_model("runs/mine"), load_tokenizer_of("runs/mine")
    ids = tokenizer.encode("Once upon").tolist()
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"
