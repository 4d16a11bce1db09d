"""Cases of docs/compatibility.md: tokenizers, compared with AutoTokenizer and the tokenizers library."""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import added, library, surround, write
from test_model_configs import save

from bardling.checkpoint.load import load
from bardling.data.tokens import gpt2_bpe
from bardling.data.tokens.token_files import read_meta
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from bardling.generation.generate import prompt_ids
from model_hub import serve

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ("the cat sat on the mat.", "  two  spaces,\ta tab", "naïve café, 日本 👍", "x", "the rain in Spain ")
NAMED = ("Say <s>, <tool> and [END]", "a<think>b</think> covid")
Run = Callable[[Path], str]


def same_ids(ours: Tokenizer, theirs: Any, texts: tuple[str, ...] = WORDS) -> str:
    """Documents and prompts have the ids of transformers; 'read', with what begins a text."""
    for text in texts:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text).tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids)
        whole = theirs(text).input_ids
        assert prompt_ids(ours, text) == (whole[:-1] if whole[-1] in ours.interface.eos else whole)
    for text in NAMED if texts is WORDS else ():
        assert ours.encode(text, allow_special=True).tolist() == theirs(text, add_special_tokens=False).input_ids
    start = "".join(theirs.convert_ids_to_tokens(list(ours.interface.start)))
    return f"read; each text begins with `{start}`" if start else "read"


def tokenizer_json(
    folder: Path, kind: str, start: tuple[str, ...] = (), end: tuple[str, ...] = (), edits: Any = None, **options: Any
) -> str:
    made = library(kind, **options)
    surround(made, start, end)
    write(folder, made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if edits:
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**content, **edits}))
    return same_ids(load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder))


def added_token(folder: Path, name: str, special: bool) -> str:
    made = library("llama")
    added(made, (name, special))
    ours = load_tokenizer(write(folder, made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))
    same_ids(ours, transformers.AutoTokenizer.from_pretrained(folder))
    text = ours.token_bytes(made.token_to_id(name)).decode()
    as_token = made.token_to_id(name) in ours.encode(f"a {text} b").tolist()
    return "read; in a text, its name is the token" if as_token else "read; in a text, its name is ordinary characters"


def rebuilt(folder: Path, kind: str, name: str, **config: Any) -> str:
    """AutoTokenizer builds the tokenizers of some classes anew, from the vocabulary alone; here the file decides."""
    write(folder, library(kind), tokenizer_class=name, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **config)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {text: file.encode(text, add_special_tokens=False).ids for text in WORDS}
    assert all(ours.encode(text).tolist() == ids[text] and ours.decode(ids[text]) == file.decode(ids[text]) for text in WORDS)
    others = sum(theirs(text, add_special_tokens=False).input_ids != ids[text] for text in WORDS)
    reason = f"`AutoTokenizer` builds a `{name}` anew and gives other ids for {others} of {len(WORDS)} texts"
    return f"read, with the ids of the `tokenizers` library; {reason}" if others else "read"


def pair(folder: Path, theirs: str = "", drop: str = "", **files: Any) -> str:
    """A vocab.json and a merges.txt."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([*WORDS, "the cat " * 20], 280, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "model").mkdir()
    trained.save_model(str(folder / "model"))
    for name, content in files.items():
        (folder / "model" / f"{name}.json").write_text(json.dumps(content))
    if drop:
        (folder / "model" / drop).unlink()
    ours = load_tokenizer(folder / "model")
    return same_ids(ours, getattr(transformers, theirs).from_pretrained(folder / "model"), (*WORDS, "e\u0301 12345"))


def meta_pkl(folder: Path, entries: list[str], text: str, ids: list[int], **more: Any) -> str:
    content = {"vocab_size": len(entries), "itos": dict(enumerate(entries)), "stoi": {t: i for i, t in enumerate(entries)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps({**content, **more}, protocol=4))
    _, tokenizer = read_meta(folder / "meta.pkl")
    assert tokenizer is not None
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.decode(ids) == text
    return "read"


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("pass",)


def gpt2_by_name(folder: Path, known: bool) -> str:
    """A small stand-in for GPT-2's repository on a local hub; `known`: it has the digest that is expected."""
    constants = pytest.importorskip("huggingface_hub.constants")
    write(folder / "hub", library("byte-level", special=("<|endoftext|>",)))
    content = (folder / "hub" / "tokenizer.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch, serve(folder, patch, constants) as hub:
        hub.models["openai-community/gpt2"] = {"tokenizer.json": content}
        if known:
            patch.setattr(gpt2_bpe, "GPT2_DIGEST", gpt2_bpe.vocabulary_digest(json.loads(content)))
        ours = build_tokenizer("gpt2", ())
    theirs = tokenizers.Tokenizer.from_file(str(folder / "hub" / "tokenizer.json"))
    assert [ours.encode(text).tolist() for text in WORDS] == [theirs.encode(text).ids for text in WORDS]
    return "read"


def built(folder: Path, spec: str) -> str:
    """A tokenizer of our own: other software gives the same ids to its file."""
    ours = build_tokenizer(spec, ["\n".join(WORDS) * 20])
    ours.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in WORDS:
        assert ours.encode(text).tolist() == theirs(text).input_ids
        assert ours.decode(theirs(text).input_ids) == text
    return "read"


def unread(folder: Path, name: str, data: bytes = b"x", direct: bool = False, beside: str = "") -> str:
    """A file that no tokenizer is read from: in a model's folder, or named as data.tokenizer."""
    save(folder / "model", "GPT2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / file).unlink()
    if beside:
        (folder / "model" / beside).write_text("{}")
    if name:
        (folder / "model" / name).write_bytes(data)
    return str(build_tokenizer(str(folder / "model" / name), ()) if direct else load(folder / "model").needed_tokenizer())


def sentencepiece(folder: Path, **settings: Any) -> str:
    """A trained model has the ids of the `sentencepiece` library."""
    library = pytest.importorskip("sentencepiece")
    settings |= {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2}
    with (folder / "tokenizer.model").open("wb") as file:
        library.SentencePieceTrainer.train(sentence_iterator=iter(WORDS * 9), model_writer=file, **settings)
    theirs = library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = build_tokenizer(str(folder / "tokenizer.model"), ())
    for text in (*WORDS, *NAMED):
        assert ours.encode(text).tolist() == theirs.encode(text)
    return "read"


TOKENIZERS: dict[str, Run] = {
    "byte-level BPE": partial(tokenizer_json, kind="byte-level"),
    "byte-level BPE that begins texts with a token": partial(tokenizer_json, kind="byte-level", start=("<s>",)),
    "byte-level BPE of `GPT2Tokenizer`, to which `tokenizer_config.json` adds `add_prefix_space`": partial(
        rebuilt, kind="byte-level", name="GPT2Tokenizer", add_prefix_space=True
    ),
    "BPE with the normalizer `Prepend` (Llama 2)": partial(tokenizer_json, kind="llama"),
    "the same with `<s>` from the post-processor": partial(tokenizer_json, kind="llama", start=("<s>",)),
    "the same with `<s>` and `</s>`": partial(tokenizer_json, kind="llama", start=("<s>",), end=("</s>",)),
    "BPE with the normalizer `Prepend` and the class `LlamaTokenizer`": partial(rebuilt, kind="llama", name="LlamaTokenizer"),
    **{
        f"Metaspace BPE, `prepend_scheme` {scheme}": partial(tokenizer_json, kind="metaspace", scheme=scheme)
        for scheme in ("first", "always", "never")
    },
    "Metaspace BPE with `<s>` from the post-processor": partial(tokenizer_json, kind="metaspace", start=("<s>",)),
    "Metaspace BPE without byte fallback": partial(tokenizer_json, kind="metaspace", fallback=False),
    "Unigram": partial(tokenizer_json, kind="unigram"),
    "WordPiece": partial(tokenizer_json, kind="wordpiece"),
    "WordPiece with `<s>` and `</s>`": partial(tokenizer_json, kind="wordpiece", start=("<s>",), end=("</s>",)),
    "word-level": partial(tokenizer_json, kind="wordlevel"),
    "truncation and padding stored in `tokenizer.json`": partial(
        tokenizer_json,
        kind="byte-level",
        edits={
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                **{"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"},
            },
        },
    ),
    "added token, special: `<tool>`": partial(added_token, name="<tool>", special=True),
    "added token, not special, that looks like markup: `<think>`": partial(added_token, name="<think>", special=False),
    "added word, not special: `covid`": partial(added_token, name="covid", special=False),
    "`vocab.json` and `merges.txt` alone": partial(pair, theirs="GPT2TokenizerFast"),
    "`vocab.json` and `merges.txt` of a GPT-2": partial(pair, theirs="GPT2TokenizerFast", config={"model_type": "gpt2"}),
    "`vocab.json` and `merges.txt` of a Qwen3": partial(pair, theirs="Qwen2TokenizerFast", config={"model_type": "qwen3"}),
    "`vocab.json` and `merges.txt` of a Llama": partial(pair, config={"model_type": "llama"}),
    "`vocab.json` and `merges.txt` of `RobertaTokenizer`": partial(
        pair, tokenizer_config={"tokenizer_class": "RobertaTokenizer"}
    ),
    "`vocab.json` without `merges.txt`": partial(pair, drop="merges.txt"),
    "nanoGPT's `meta.pkl`, characters": partial(meta_pkl, entries=[*"\n abé"], text="ab é\n", ids=[2, 3, 1, 4, 0]),
    "nanoGPT's `meta.pkl`, words": partial(meta_pkl, entries=["the", "cat", "."], text="the cat .", ids=[0, 1, 2]),
    "nanoGPT's `meta.pkl`, a pickle with code": partial(meta_pkl, entries=["a"], text="a", ids=[0], more=Code()),
    "GPT-2's by name: `gpt2`, fetched from the hub": partial(gpt2_by_name, known=True),
    "`gpt2`, but the fetched file has another vocabulary": partial(gpt2_by_name, known=False),
    "bytes: `byte`": partial(built, spec="byte"),
    "characters of the text: `char`": partial(built, spec="char"),
    "a character that `char` has not seen": lambda _: str(build_tokenizer("char", ["abc"]).encode("ab\nxyz")),
    "BPE trained on the text: `bpe:300`": partial(built, spec="bpe:300"),
    **{
        f"model folder with only {what}": partial(unread, name=name)
        for name, what in {
            "tokenizer.model": "SentencePiece's `tokenizer.model`",
            "spiece.model": "SentencePiece's `spiece.model`",
            "vocab.txt": "WordPiece's `vocab.txt`",
            "tekken.json": "Mistral's `tekken.json`",
            "qwen.tiktoken": "`qwen.tiktoken`",
        }.items()
    },
    "SentencePiece's `tokenizer.model`, named directly, BPE": partial(sentencepiece, model_type="bpe", byte_fallback=True),
    "the same, unigram": partial(sentencepiece, model_type="unigram", user_defined_symbols=["<sep>"]),
    "the same, characters": partial(sentencepiece, model_type="char"),
    "the same, damaged": partial(unread, name="tokenizer.model", direct=True),
    "`vocab.json`, named directly": partial(unread, name="vocab.json", data=b'{"a": 0}', direct=True),
    "the same beside a `merges.txt`": partial(unread, name="vocab.json", data=b'{"a": 0}', direct=True, beside="merges.txt"),
    "`meta.pkl`, named directly": partial(unread, name="meta.pkl", data=pickle.dumps({"vocab_size": 2}), direct=True),
    "model folder without a tokenizer": partial(unread, name=""),
    "a truncated `tokenizer.json`": partial(unread, name="tokenizer.json", data=b'{"version": "1.0", "mod'),
}
