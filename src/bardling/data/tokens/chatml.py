"""ChatML: the chat format for models that have none.

Each turn is `<|im_start|>ROLE`, a line break, the text, `<|im_end|>` and a line break (as in OpenAI's ChatML and the models of
Qwen and SmolLM). A tokenizer without these tokens gets them as new ids after its own, together with a token for padding, and
the template below, which marks answers for training (`{% generation %}`). A model then has rows for three more tokens.
"""

import copy
from dataclasses import replace
from typing import Any

from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_chatml(tokenizer: Tokenizer, option: str = "data.chat_template = 'chatml'") -> Tokenizer:
    """The tokenizer with ChatML's tokens and template; its own ids stay as they are.

    Raises:
        UserError: the tokenizer knows characters only; `option` is what asks for ChatML.
    """
    if tokenizer.kind == "char":
        raise UserError(f"{option}: the char tokenizer cannot have tokens for turns; use a model with byte, gpt2 or bpe:SIZE")
    content: dict[str, Any] = copy.deepcopy(dict(tokenizer.content))
    added = content.setdefault("added_tokens", [])
    known = {entry["content"]: entry for entry in added}
    number, vocabulary = tokenizer.vocab_size, content.get("model", {}).get("vocab")
    # The library numbers added tokens by counting, so where ids are missing, only the vocabulary can state theirs.
    has_gaps = isinstance(vocabulary, dict) and len(vocabulary.keys() | known.keys()) < number
    for name in (START, END, PAD):
        if name in known:
            known[name]["special"] = True
            continue
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        if has_gaps:
            vocabulary[name] = number
        added.append({"id": number, "content": name, **flags})
        number += 1
    ids = {entry["content"]: entry["id"] for entry in added}
    files, about = tokenizer.interface.files, tokenizer.interface
    kept = {key: value for key, value in (files.config or {}).items() if key not in ("chat_template", "added_tokens_decoder")}
    first = {} if about.bos is None or about.bos >= tokenizer.vocab_size else {"bos_token": tokenizer.decode([about.bos])}
    config = {**first, **about.special_tokens, **kept, "eos_token": END, "pad_token": PAD}
    # A text that was trained on before may still end with its own token.
    ends = [ids[END], *(token for token in about.eos if token != ids[END])]
    generation = {**files.generation, "bos_token_id": about.bos, "eos_token_id": ends, "pad_token_id": ids[PAD]}
    described = replace(files, config=config, special={}, generation=generation, model={}, template=TEMPLATE, templates={})
    return Tokenizer(content, tokenizer.name, None, described)
