"""What a model expects around its text, as the files beside its `tokenizer.json` describe it.

Each file knows a part: `tokenizer_config.json` and `special_tokens_map.json` (names of special tokens, chat template, longest
text), `chat_template.jinja`, `generation_config.json` and `config.json` (ids of the tokens that begin and end a text). They are
read once, with the precedence that `transformers` gives them, kept as they are, and written back with every field, also those
that nothing here uses. A description that names no tokens is completed: a text ends with the tokenizer's end-of-text token and
begins with what its post-processor puts there, or else with the end-of-text token.

Limits: files of up to 16 MiB, templates of up to 1 MiB. Templates are data here; `data/tokens/chat_template.py` renders them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bardling.data.tokens.vocabulary import EOT
from bardling.errors import UserError
from bardling.files.atomic import write_atomically
from bardling.files.reading import read_json_object, read_small_bytes

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
GENERATION, MODEL = "generation_config.json", "config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
MAX_TEMPLATE_BYTES = 1 << 20
_MAX_TEMPLATES = 100
_UNLIMITED = 10**20  # transformers writes 1e30 for a tokenizer whose longest text is unknown
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CLASS_OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen3": "Qwen2Tokenizer"}  # what AutoTokenizer takes if no file names a class
_CLASS_TOKENS = {  # the special tokens of transformers' classes, where no file names others
    "GPT2Tokenizer": {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": {"eos_token": EOT, "pad_token": EOT, "unk_token": EOT},
}


@dataclass(frozen=True)
class TextFiles:
    """The files beside a `tokenizer.json`, as they were read."""

    config: Mapping[str, Any] | None = None  # tokenizer_config.json; None: there is none
    special: Mapping[str, Any] = field(default_factory=dict)  # special_tokens_map.json
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json
    model: Mapping[str, Any] = field(default_factory=dict)  # `_IDS` and model_type of config.json
    template: str | None = None  # chat_template.jinja
    templates: Mapping[str, str] = field(default_factory=dict)  # additional_chat_templates, by name
    folder: str = ""  # for messages

    def token(self, key: str) -> str | None:
        """The token that the files name for `key`, such as 'eos_token'; None if they name none."""
        values = {**self._class_tokens, **(self.config or {})}
        where = CONFIG
        if "added_tokens_decoder" not in values and key in self.special:  # transformers ignores the map otherwise
            values, where = {**self.special}, SPECIAL
        value = values.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None and not isinstance(content, str):
            fault = f"{key} = {_short(value)}: must be a token, or an object with its 'content'"
            raise UserError(f"{self.folder}/{where}: {fault}")
        return content

    @property
    def _class_tokens(self) -> Mapping[str, str]:
        name = (self.config or {}).get("tokenizer_class") or _CLASS_OF_MODEL.get(str(self.model.get("model_type")))
        return _CLASS_TOKENS.get(str(name).removesuffix("Fast"), {})

    def ids(self, key: str) -> tuple[int, ...]:
        """The ids of `generation_config.json`, else of `config.json`, for a key such as 'eos_token_id'."""
        return _ids(self.generation, key, f"{self.folder}/{GENERATION}") or _ids(self.model, key, f"{self.folder}/{MODEL}")

    @property
    def chat_template(self) -> str | None:
        """The default chat template."""
        if self.template is not None:
            return self.template
        value = (self.config or {}).get("chat_template")
        named = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
        value = next((entry.get("template") for entry in named if entry.get("name") == "default"), None) if named else value
        return value if isinstance(value, str) else None

    @property
    def chat_template_file(self) -> str:
        """The file of the default chat template."""
        return str(Path(self.folder) / (CONFIG if self.template is None else TEMPLATE))

    @property
    def max_length(self) -> int | None:
        value = (self.config or {}).get("model_max_length")
        return int(value) if isinstance(value, int | float) and 0 < value < _UNLIMITED else None


@dataclass(frozen=True)
class TextInterface:
    """What a model expects around its text. All tokens are ids."""

    bos: int | None  # begins a text
    eos: tuple[int, ...]  # each of them ends a generated text; the first one ends a document in training
    pad: int | None
    unk: int | None
    start: tuple[int, ...]  # what the post-processor puts before a text
    end: tuple[int, ...]  # and after it
    files: TextFiles

    @property
    def chat_template(self) -> str | None:
        return self.files.chat_template

    @property
    def chat_template_file(self) -> str:
        """For messages."""
        return self.files.chat_template_file

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens that the files name: 'bos_token', ..., as chat templates know them."""
        return {key: name for key in _SPECIAL_TOKENS if (name := self.files.token(key)) is not None}

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest text, if the files limit it."""
        return self.files.max_length

    @property
    def generation(self) -> Mapping[str, Any]:
        """The content of `generation_config.json`."""
        return self.files.generation

    @property
    def first(self) -> int | None:
        """The token from which an empty text continues."""
        return self.bos if self.bos is not None else next(iter(self.eos), None)

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """What the post-processor puts after a text that goes on: not the token that would end it."""
        kept = len(self.end)
        while kept and self.end[kept - 1] in self.eos:
            kept -= 1
        return self.end[:kept]

    def model_ids(self, vocab_size: int) -> dict[str, Any]:
        """The special ids of a `config.json`: those of the model's own, completed."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos) or None
        values: dict[str, Any] = {"bos_token_id": self.bos, "eos_token_id": eos}
        own = self.files.generation if self.files.generation.get("_from_model_config") else self.files.model
        values |= {key: own[key] for key in _IDS if key in own}
        if not isinstance(pad := values.get("pad_token_id"), int) or pad >= vocab_size:
            values.pop("pad_token_id", None)  # transformers cannot build an embedding without this row
        return values

    def write(self, folder: Path, names: Mapping[str, str | None]) -> None:
        """Write the files into `folder`, each atomically; `names` are special tokens ('bos_token', ...) that no file names."""
        files = self.files
        if files.config is None:
            config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            config |= {key: name for key, name in names.items() if name is not None and key not in files.special}
        else:
            config = {"tokenizer_class": "PreTrainedTokenizerFast", **files._class_tokens, **files.config}
        if files.templates:  # one form holds all of them
            everything = {**files.templates, **({} if files.template is None else {"default": files.template})}
            # transformers reads template files as text, which converts their line breaks
            lines = {name: text.replace("\r\n", "\n").replace("\r", "\n") for name, text in everything.items()}
            config["chat_template"] = [{"name": name, "template": text} for name, text in lines.items()]
        _write(folder / CONFIG, config)
        if files.special:
            _write(folder / SPECIAL, files.special)
        if generation := self._generation_to_write():
            _write(folder / GENERATION, generation)
        if files.template is not None and not files.templates:
            write_atomically(folder / TEMPLATE, files.template.encode())

    def _generation_to_write(self) -> Mapping[str, Any]:
        """Without a generation config, further end tokens of a `config.json` would be lost in folders that have no model."""
        if self.files.generation or set(self.files.ids("eos_token_id")) <= set(self.eos[:1]):
            return self.files.generation
        return {"_from_model_config": True, **{key: self.files.model[key] for key in _IDS if key in self.files.model}}


def text_interface(
    files: TextFiles, ids: Mapping[str, int], eot: int | None, start: tuple[int, ...], end: tuple[int, ...]
) -> TextInterface:
    """Combine what the files say with what the tokenizer does.

    Args:
        ids: of each token of the vocabulary.
        eot: the tokenizer's end-of-text token.
        start, end: what its post-processor puts around a text.
    """
    tokens = {key: ids.get(files.token(key) or "") for key in ("bos_token", "pad_token", "unk_token")}
    bos, pad = (
        tokens[f"{key}_token"] if tokens[f"{key}_token"] is not None else next(iter(files.ids(f"{key}_token_id")), None)
        for key in ("bos", "pad")
    )
    if bos is None and files.config is None and not files.special and not files.model:  # nothing describes the text
        bos = start[0] if start else eot
    eos = dict.fromkeys(([] if eot is None else [eot]) + list(files.ids("eos_token_id")))
    return TextInterface(bos, tuple(eos), pad, tokens["unk_token"], start, end, files)


def read_text_files(folder: Path) -> TextFiles:
    """Read the files in `folder` that describe a model's text; those that are missing say nothing."""

    def read(name: str) -> dict[str, Any] | None:
        return read_json_object(folder / name) if (folder / name).is_file() else None

    model = read(MODEL) or {}
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))[:_MAX_TEMPLATES] if (folder / TEMPLATES).is_dir() else []
    files = TextFiles(
        config=read(CONFIG),
        special=read(SPECIAL) or {},
        generation=read(GENERATION) or {},
        model={key: model[key] for key in (*_IDS, "model_type") if key in model},
        template=_template(folder / TEMPLATE) if (folder / TEMPLATE).is_file() else None,
        templates={path.stem: _template(path) for path in templates},
        folder=str(folder),
    )
    for key in _IDS:
        files.ids(key)  # a wrong type is reported now
    return files


def _template(path: Path) -> str:
    try:
        return read_small_bytes(path, limit=MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text: save the template as UTF-8") from None


def _ids(values: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = values.get(key)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(index) is int for index in found):
        raise UserError(f"{where}: {key} = {_short(value)}: must be a token id or a list of token ids")
    return tuple(index for index in found if index >= 0)  # old files write -1 for none


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 60 else text[:57] + "..."


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())
