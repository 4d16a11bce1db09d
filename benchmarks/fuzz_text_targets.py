"""Fuzzing targets for what other people write: tokenizers and their settings, TOML, prompts, tasks, text in any encoding.

The tokenizers come from the `tokenizers` library, with the settings that `transformers` writes beside them.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from bardling.checkpoint.load import load
from bardling.config import ModelConfig
from bardling.config.recipes import load_recipe
from bardling.data.text.named_datasets import source_for
from bardling.data.tokens.stream_decoder import StreamDecoder
from bardling.data.tokens.tokenizer import load_tokenizer
from bardling.errors import UserError
from bardling.evaluate.multiple_choice import check_items
from bardling.evaluate.tasks import load_items
from bardling.files.prompt import read_prompt_file
from bardling.generation.generate import prompt_ids
from fuzz_file_formats import FORMAT_TARGETS
from fuzz_targets import TEXT, Target, make_hf, make_recipe

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def _metaspace() -> str:
    """A tokenizer.json in the style of Llama's: Metaspace, byte fallback, and `<s>` before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.add_tokens([AddedToken("<mark>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return str(tokenizer.to_str())


def _byte_level() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return str(tokenizer.to_str())


def _settings() -> dict[str, object]:
    """A tokenizer_config.json as `transformers` writes it: some special tokens as text, some as objects."""
    added = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(number): {**added, "content": token} for number, token in enumerate(SPECIAL)},
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": added,
        "unk_token": "<unk>",
        "pad_token": {**added, "content": "<pad>"},
        "additional_special_tokens": ["<mark>"],
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16,
        "tokenizer_class": "LlamaTokenizerFast",
    }


def make_tokenizers(folder: Path) -> None:
    """A folder for each kind of tokenizer, and a model with a generation configuration."""
    for name, content in (("metaspace", _metaspace()), ("bytelevel", _byte_level())):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(content)
        (folder / name / "tokenizer_config.json").write_text(json.dumps(_settings()))
        (folder / name / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def make_model(folder: Path) -> None:
    """A model folder of 33 tokens, with everything that belongs to its text."""
    make_hf(folder)
    model = {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(32)} | {"</s>": 32}, "unk_token": "w0"}
    splitter = {"type": "WhitespaceSplit"}
    added = [{"id": 32, "content": "</s>", "special": True, "normalized": False, "lstrip": False, "rstrip": False,
              "single_word": False}]  # fmt: skip
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
               "pre_tokenizer": splitter, "post_processor": None, "decoder": None, "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({**_settings(), "bos_token": "</s>", "unk_token": "w0"}))
    generation = {"bos_token_id": 1, "eos_token_id": [2, 32], "pad_token_id": 0, "max_length": 16, "temperature": 0.6,
                  "top_p": 0.9, "top_k": 5, "do_sample": True, "transformers_version": "4.57.0"}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation))


def make_texts(folder: Path) -> None:
    """A prompt, a text, rows of JSON, and a task, in UTF-8."""
    (folder / "prompt.txt").write_text("The king — and the queen — met at the café.\n" * 3, encoding="utf-8")
    (folder / "text").mkdir()
    (folder / "text" / "one.txt").write_text(TEXT + "Ünï¢ödé: 北京, мир, 🙂.\n", encoding="utf-8")
    (folder / "text" / "two.txt").write_text("A second document.\n", encoding="utf-8")
    rows = [{"text": f"Row {number}: naïve café.", "id": number} for number in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    item = {"ctx": "The king", "endings": [" met", " left", " résumé"], "label": 1, "ind": 7}
    (folder / "task.jsonl").write_text("".join(json.dumps({**item, "ind": n}) + "\n" for n in range(9)), encoding="utf-8")


def use_tokenizer(name: str) -> Callable[[Path], None]:
    """Everything that commands do with a tokenizer: encode, decode whole and as a stream, save, open again."""

    def use(folder: Path) -> None:
        tokenizer = load_tokenizer(folder / name)
        for ids in tokenizer.encode_batch(["The king met.\n", " ", "", "</s><mark> 北 \0"]):
            whole, stream = tokenizer.decode(ids), StreamDecoder(tokenizer)
            assert isinstance("".join(map(stream.push, map(int, ids))) + stream.finish() + whole, str)
        prompt_ids(tokenizer, "The king <s>", allow_special=True)
        prompt_ids(tokenizer, "")
        tokenizer.bytes_per_token()
        (folder / "saved").mkdir(exist_ok=True)
        tokenizer.save(folder / "saved")
        load_tokenizer(folder / "saved")

    return use


def load_model(folder: Path) -> None:
    loaded = load(folder)
    loaded.build()
    if loaded.tokenizer is not None:
        prompt_ids(loaded.tokenizer, "w1 w2")


def _file(path: Path) -> Path:
    """A path that may be opened: reading a named pipe waits for its writer, as it should."""
    if path.is_fifo():
        raise UserError(f"{path}: is a pipe without a writer")
    return path


def _small(path: Path) -> None:
    """Refuse a file of terabytes, which would take as long as its length asks for: texts have no limit."""
    if any(file.stat().st_size > 1 << 26 for file in (path, *path.glob("*")) if file.is_file()):
        raise UserError(f"{path}: is larger than this target reads")


def load_prompt(folder: Path) -> None:
    read_prompt_file(_file(folder / "prompt.txt")).encode()


def load_text(spec: str) -> Callable[[Path], None]:
    def use(folder: Path) -> None:
        _small(folder / spec)
        for document in source_for(str(folder / spec)).documents():
            document.text.encode()  # raises an error for half a surrogate pair

    return use


def load_task(folder: Path) -> None:
    from bardling.data.tokens.tokenizer import build_tokenizer

    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=257)
    check_items(build_tokenizer("byte", []), load_items(str(folder / "task.jsonl")), config, "task")


def load_toml(folder: Path) -> None:
    dataclasses.asdict(load_recipe(str(folder / "recipe.toml"), validate=False))


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "tokenizer_config.json")

TEXT_TARGETS = (
    *(
        Target(f"tokenizer, {name}", 10, make_tokenizers, tuple(f"{name}/{file}" for file in (*TOKENIZER_FILES,
        "special_tokens_map.json")), use_tokenizer(name), writes=True)
        for name in ("metaspace", "bytelevel")
    ),
    Target("model with generation_config.json", 10, make_model, ("generation_config.json", "generation_config.json",
    "tokenizer_config.json", "tokenizer.json"), load_model),
    Target("recipe (TOML), encodings", 8, make_recipe, ("recipe.toml",), load_toml),
    Target("prompt file", 8, make_texts, ("prompt.txt",), load_prompt),
    Target("text file", 10, make_texts, ("text/one.txt",), load_text("text/one.txt")),
    Target("text folder", 6, make_texts, ("text/one.txt", "text/two.txt"), load_text("text")),
    Target("JSON Lines", 6, make_texts, ("rows.jsonl",), load_text("rows.jsonl")),
    Target("task file", 6, make_texts, ("task.jsonl",), load_task),
    *FORMAT_TARGETS,
)  # fmt: skip
