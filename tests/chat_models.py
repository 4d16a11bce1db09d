"""Chat templates in the formats of four model families, written for these tests, and small models that use them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from bardling.checkpoint.contents import write_model
from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import load_tokenizer
from bardling.model.gpt import GPT

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
{%- endif -%}
{% for message in messages %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message['content'].split('</think>')[-1].lstrip('\\n') }}<|im_end|>{% endgeneration %}

    {% else %}
<|im_start|>{{ message['role'] }}{{ ' ' + message.name if message.name is defined else '' }}
{{ message['content'] }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{#- the date is not today's, so that both sides agree #}
{%- set date = strftime_now('%Y')[:0] ~ '26 Jul 2024' %}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date + '\\n\\n' + system_message + '<|eot_id|>' }}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{%- for message in messages %}
    {%- if message.content == 'skip' %}{% continue %}{% endif %}
    {%- if message.content == 'stop' %}{% break %}{% endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- set state = namespace(system='', turn=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set state.system = messages[0]['content'] ~ '\\n\\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate: user, assistant, user, ...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (state.system if loop.last else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- set state.turn = state.turn + 1 %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}
{%- macro turn(role, text) -%}
<start_of_turn>{{ role }}
{{ text | trim }}<end_of_turn>
{% endmacro -%}
{%- set prefix = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ turn(role, (prefix if loop.first else '') ~ message['content']) }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""

JSON = "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ dict(a='é<&>') | tojson(ensure_ascii=true) }}{{ pad_token }}"

FORMATS = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"]),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "json": (JSON, ["<|x|>"]),
}


def write_chat_tokenizer(folder: Path, name: str | None, eos: str = "</s>") -> None:
    """A tokenizer of bytes with a format's special tokens and its template, and a post-processor; None: without a template."""
    template, special = FORMATS[name or "chatml"]
    tokens = ["<s>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", *special])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if name is not None:
        (folder / "chat_template.jinja").write_text(template)


def write_scripted_model(
    folder: Path, script: str, *, chat: bool = True, endless: bool = False, block_size: int = 1024
) -> Path:
    """A model folder whose likeliest token follows from the one before: after the first character of `script` comes the second,
    and so on; after the last, the end of the text, or the second again if it is `endless`. Characters must differ."""
    write_chat_tokenizer(folder, "chatml" if chat else None, eos="<|im_end|>" if chat else "</s>")
    tokenizer = load_tokenizer(folder)
    size = tokenizer.vocab_size
    config = ModelConfig(n_layer=1, n_head=1, n_embd=size, block_size=block_size, vocab_size=size, vocab_multiple=1, tied=False)
    model = GPT(config)
    ids = tokenizer.encode(script).tolist()
    assert len(set(ids)) == len(ids)
    (end,) = tokenizer.interface.eos
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" not in name:
                parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(size))
        for before, after in zip(ids, [*ids[1:], ids[1] if endless else end], strict=True):
            model.lm_head.weight[after, before] = 9.0
    write_model(folder, config, model.state_dict(), tokenizer)
    return folder
