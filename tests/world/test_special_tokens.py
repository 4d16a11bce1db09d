"""What surrounds a text (beginning and end tokens, chat template, ...) is read from a model folder, used, and written back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import library, llama_folder, surround, write

from bardling.checkpoint.export import export_hf
from bardling.checkpoint.load import load
from bardling.cli.sample import run as sample_command
from bardling.config import DataConfig
from bardling.data.batches.loader import EvalSequences
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.tokenizer import build_tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.generation.generate import generate, prompt_ids
from bardling.monitor.jsonl import read_jsonl
from bardling.training.run import train

transformers = pytest.importorskip("transformers")

TEXTS = ["the cat", " leading", "a  b", "x", "naïve 日本", "end "]
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}],
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\r\n{{ m.content }}{{ eos_token }}{% endfor %}"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_folder(folder: Path, ids: dict[str, Any] | None = None, **sizes: Any) -> Path:
    """Add a small random Llama to a folder with a tokenizer."""
    torch.manual_seed(0)
    options = {"vocab_size": load_tokenizer(folder).vocab_size, "hidden_size": 16, "intermediate_size": 32} | sizes
    options |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, initializer_range=0.5))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **(ids or {"bos_token_id": 1, "eos_token_id": 2})}))
    return folder


@pytest.mark.parametrize("start", [(), ("<s>",), ("<s>", "<unk>")], ids=str)
@pytest.mark.parametrize("end", [(), ("</s>",), ("<unk>",), ("<unk>", "</s>")], ids=str)
def test_prompts_begin_as_autotokenizer_begins_them(tmp_path: Path, start: tuple[str, ...], end: tuple[str, ...]) -> None:
    tokenizer = load_tokenizer(llama_folder(tmp_path, start=start, end=end))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        expected = theirs(text).input_ids
        assert prompt_ids(tokenizer, text) == expected[: len(expected) - (end[-1:] == ("</s>",))]
    if start:
        expected = theirs("").input_ids
        assert prompt_ids(tokenizer, "") == expected[: len(expected) - (end[-1:] == ("</s>",))]
    else:
        assert prompt_ids(tokenizer, "") == [1]


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, 1),
        ({"bos_token": None, "eos_token": "</s>"}, 2),
        ({"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}, "eos_token": "</s>"}, 1),
        ({"tokenizer_class": "LlamaTokenizer"}, 1),
        ({"tokenizer_class": "LlamaTokenizerFast"}, 1),
    ],
)
def test_an_empty_prompt_begins_with_bos_or_else_eos(tmp_path: Path, config: dict[str, Any], first: int) -> None:
    tokenizer = load_tokenizer(write(tmp_path, library("llama"), **config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert prompt_ids(tokenizer, "") == [first]
    assert first == (theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id)


def test_a_tokenizer_of_our_own_begins_as_before() -> None:
    tokenizer = build_tokenizer("byte", ())
    assert (tokenizer.interface.start, tokenizer.interface.bos, tokenizer.interface.eos) == ((), 256, (256,))
    assert prompt_ids(tokenizer, "") == [256]
    assert tokenizer.data_key == tokenizer.fingerprint


DESCRIPTIONS: dict[str, dict[str, dict[str, Any] | str]] = {
    "plain": {},
    "pad and length": {"tokenizer_config.json": {"pad_token": "<unk>", "model_max_length": 48, "padding_side": "left"}},
    "template in the config": {"tokenizer_config.json": {"chat_template": TEMPLATE}},
    "template in a file": {"chat_template.jinja": TEMPLATE},
    "template in both": {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"chat_template": "other"}},
    "several templates": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "x"}]
        }
    },
    "templates in files": {"chat_template.jinja": TEMPLATE, "additional_chat_templates/rag.jinja": "{{ messages }}"},
    "old special tokens": {
        "special_tokens_map.json": {"pad_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>"}
    },
    "unknown fields": {"tokenizer_config.json": {"legacy": True, "my_field": {"a": [1]}, "additional_special_tokens": ["<s>"]}},
    "several ends": {"generation_config.json": {"eos_token_id": [2, 7], "bos_token_id": 1, "temperature": 0.6, "my_field": 3}},
    "one end": {"generation_config.json": {"eos_token_id": 2, "do_sample": True}},
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_an_export_describes_its_text_as_the_original_does(tmp_path: Path, name: str) -> None:
    source, out = model_folder(llama_folder(tmp_path / "model"), {"bos_token_id": 1, "eos_token_id": [2, 5]}), tmp_path / "out"
    for file, content in DESCRIPTIONS[name].items():
        path = source / file
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            path.write_bytes(content.encode())
        else:
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content}))
    export_hf(str(source), out)
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    assert before.special_tokens_map == after.special_tokens_map
    if name == "pad and length":
        assert before.model_max_length == after.model_max_length == 48
    assert before.chat_template == after.chat_template
    for text in TEXTS:
        assert before(text).input_ids == after(text).input_ids
        assert before.decode(before(text).input_ids) == after.decode(after(text).input_ids)
    if before.chat_template is not None:
        for chat in CHATS:
            assert before.apply_chat_template(chat, tokenize=False) == after.apply_chat_template(chat, tokenize=False)
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (source / file).exists():
            written = json.loads((out / file).read_text())
            expected = json.loads((source / file).read_text())
            assert {key: value for key, value in written.items() if key in expected} == expected or name == "templates in files"
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert [configs[0].get(key) for key in IDS] == [configs[1].get(key) for key in IDS]
    generation = [transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config for folder in (source, out)]
    assert [getattr(generation[0], key) for key in IDS] == [getattr(generation[1], key) for key in IDS]


def test_finetuning_keeps_the_description_and_begins_documents(tmp_path: Path, tiny: Any, change: Any) -> None:
    source = model_folder(llama_folder(tmp_path / "model", chat_template=TEMPLATE, pad_token="<unk>"))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "my_field": 1}))
    documents = [f"the cat sat {number} times" for number in range(120)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    config = change(
        tiny,
        data={"source": str(tmp_path / "text.jsonl"), "tokenizer": str(source / "tokenizer.json")},
        model={"init": str(source)},
        optim={"warmup_steps": 0},
        train={"steps": 2},
        sample={"every": 1, "prompt": "the cat", "max_new_tokens": 3},
        checkpoint={"every": 1},
    )
    train(config, tmp_path / "run", quiet=True)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    dataset = open_data(config.data)
    ids = dataset.split("train").read(0, len(dataset.split("train"))).tolist()
    begins = [place for place, token in enumerate(ids) if token == 1]
    assert begins == [0, *(place + 1 for place, token in enumerate(ids[:-1]) if token == 2)]
    assert all(
        ids[start : ids.index(2, start)] == theirs(theirs.decode(ids[start + 1 : ids.index(2, start)])).input_ids
        for start in begins
    )
    for folder in (tmp_path / "run" / "checkpoints" / "step-000002", tmp_path / "run"):
        after = transformers.AutoTokenizer.from_pretrained(folder) if (folder / "config.json").exists() else None
        assert after is None or after.special_tokens_map == theirs.special_tokens_map
        assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 7], "my_field": 1}
        assert load_tokenizer(folder).interface.chat_template == TEMPLATE
    found = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "config.json").read_text())
    assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)
    assert len(read_jsonl(tmp_path / "run" / "samples.jsonl")) == 2


def test_generation_ends_at_any_end_token(tmp_path: Path) -> None:
    source = model_folder(llama_folder(tmp_path))
    loaded = load(source)
    model, prompt = loaded.build(), [1, 300]
    free = [row[0] for row in generate(model, [prompt], max_new_tokens=12, temperature=0.0)]
    for place in (2, 5):
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[place]]}))
        tokenizer = load_tokenizer(source)
        assert tokenizer.interface.eos == (2, free[place])
        ended = [
            row[0] for row in generate(model, [prompt], max_new_tokens=12, temperature=0.0, eot_id=tokenizer.interface.eos)
        ]
        assert ended == free[: free.index(free[place]) + 1]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
        whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        assert whole == prompt + ended


@pytest.mark.parametrize("prompt", ["the cat", "the", " a b", "x y "])
@pytest.mark.parametrize("kind", ["llama", "metaspace", "unigram"])
def test_sampled_text_is_the_decoding_of_all_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, prompt: str
) -> None:
    made = library(kind, scheme="first")
    surround(made, ["<s>"], [])
    source = model_folder(write(tmp_path, made, bos_token="<s>", eos_token="</s>"))
    options = ["--max_new_tokens", "20", "--temperature", "0", "--seed", "1", "--device", "cpu"]
    sample_command([str(source), "--prompt", prompt, *options])
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    inputs = theirs(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, 1:].tolist()
    ids = ids[: ids.index(2)] if 2 in ids else ids
    assert capsys.readouterr().out == theirs.decode(ids) + "\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", b"{", "is not valid JSON"),
        ("generation_config.json", b"[]", "is not a JSON object"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id = '</s>': must be a token id"),
        ("generation_config.json", b'{"eos_token_id": [2, true]}', "must be a token id or a list"),
        ("config.json", b'{"bos_token_id": 1.5}', "bos_token_id = 1.5: must be a token id"),
        ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token = 5: must be a token"),
        ("special_tokens_map.json", b'{"pad_token": ["x"]}', r"special_tokens_map.json: pad_token = \['x'\]"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_damaged_descriptions_are_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    llama_folder(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_key_of_prepared_text_depends_on_what_surrounds_it(tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{"start": ()}, {}, {"eos_token": "<unk>"}]
    folders = [llama_folder(tmp_path / str(number), **option) for number, option in enumerate(options)]
    assert len({load_tokenizer(folder).data_key for folder in folders}) == 3


def test_packed_documents_begin_with_the_token_of_the_tokenizer(tmp_path: Path) -> None:
    llama_folder(tmp_path, start=("<s>",))
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "the king {n}"}}\n' for n in range(120)))
    config = DataConfig(str(tmp_path / "texts.jsonl"), str(tmp_path / "tokenizer.json"), packing="documents")
    dataset = open_data(config, context=40)
    assert dataset.tokenizer is not None
    begin, fed = dataset.tokenizer.interface.start[0], 0
    for name in ("train", "val"):
        batch = EvalSequences(dataset.split("train" if name == "train" else "val"), 40, None).batch(0, 10_000)
        assert not (batch.targets == begin).any(), "given in generation, so not learned"
        fed += int((batch.inputs == begin).sum())
    assert fed == 120
