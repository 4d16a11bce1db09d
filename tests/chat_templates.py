"""Chat templates in the formats of four model families, written for these tests."""

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
