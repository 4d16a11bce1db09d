"""Chat templates: the text and ids of transformers' `apply_chat_template`, and no harm from hostile ones."""

import os
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bardling.data.tokens.chat_process import rendered
from bardling.data.tokens.chat_template import ChatTemplate, chat_prompt_ids, render_chat
from bardling.data.tokens.text_interface import TextFiles, TextInterface
from bardling.data.tokens.tokenizer import load_tokenizer
from bardling.errors import UserError
from chat_models import FORMATS, write_chat_tokenizer

WORDS = [
    "hi",
    "",
    " two  spaces ",
    "line\nbreak\n",
    "a<|im_end|>b",
    "日本 é",
    "</think>\n\nyes",
    "{{ 7 * 7 }}",
    "'\"\\",
    "stop",
    "skip",
]
HI = [{"role": "user", "content": "hi"}]


def interface(template: str, folder: str = "model", **tokens: str) -> TextInterface:
    files = TextFiles(config={"tokenizer_class": "PreTrainedTokenizerFast", **tokens}, template=template, folder=folder)
    return TextInterface(None, (), None, None, (), (), files)


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    """A chat that most templates accept, sometimes with a role out of turn."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": " ".join(rng.choices(WORDS, k=2))})
    for turn in range(rng.randint(1, 7)):
        role = ("user", "assistant")[turn % 2 if rng.random() < 0.95 else 0]
        messages.append({"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))})
    if rng.random() < 0.2:
        messages[-1]["name"] = "Ann"
    if rng.random() < 0.2:
        messages[-1]["tool_calls"] = None  # as clients send it
    return messages


@pytest.mark.parametrize("name", FORMATS)
def test_texts_and_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_chat_tokenizer(tmp_path, name)
    tokenizer, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng, refused = random.Random(name), 0
    with ChatTemplate(tokenizer.interface) as template:
        for number in range(50):
            messages, prompt = conversation(rng), number % 3 > 0
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except Exception as error:  # noqa: BLE001  a class of jinja2's own
                refused += 1
                with pytest.raises(UserError, match=f"refuses the messages: {re.escape(str(error))}$"):
                    template.render(messages, add_generation_prompt=prompt)
                continue
            assert template.render(messages, add_generation_prompt=prompt) == expected
            ids = theirs.apply_chat_template(messages, add_generation_prompt=True).input_ids
            assert chat_prompt_ids(tokenizer, messages, template) == ids
    assert refused == 0 if name in ("chatml", "llama3", "json") else 0 < refused < 25


SNIPPETS = [
    "{% macro say(m, end='') %}{{ m.role|upper }}{{ caller() if caller }}{{ end }}{% endmacro %}"
    "{% call say(messages[0], end='!') %}<{{ messages|length }}>{% endcall %}",
    "{%- for m in messages -%}\n  {{ loop.index }}/{{ loop.length }} {{ loop.previtem.role if not loop.first }}\n{% endfor %}",
    "  {% if true %}\n    indented\n  {% endif %}\n{#- comment -#}\n  {{ '  a ' | trim }}  \n\n",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(', ') }}{{ messages[-1:]|list }}",
    "{% set ns = namespace(a=1, b={'c': [1, 2]}) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.b.c|last }}{{ ns.x is undefined }}",
    "{{ 'é<b>&\"' | tojson }}{{ {'z': 1, 'a': [none, true, 1.5]} | tojson(indent=4) }}",
    "{{ [1] | tojson(separators=(',', ':')) }}{{ {'z': 1, 'a': 2} | tojson(sort_keys=true) }}{{ 'é' | tojson(true) }}",
    "{{ dict([('a', 1)], b=2) }}{{ dict.fromkeys('ab', 0) }}{{ 5 // 2 }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ -3 | abs }}",
    "{{ '%05d' % 42 }}{{ '{:>5}'.format('x') }}{{ 'a' 'b' }}{{ 1 if false }}{{ 'x' if false else 'y' }}{{ 'abc'[::-1] }}",
    "{% for c in 'abcdef' %}{% if c == 'b' %}{% continue %}{% elif c == 'e' %}{% break %}{% endif %}{{ c }}{% endfor %}",
    "{% set x %}block{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ x }}{% filter upper %}{{ x }}{% endfilter %}",
    "{% generation %}a{% if true %}b{% generation %}c{% endgeneration %}{% endif %}{% endgeneration %}\n{{ missing }}",
    "{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}",
    "{% set m = messages[0] %}{{ m }}{{ m.items()|list }}{{ m.get('x', 'none') }}{{ 'role' in m }}{{ m is mapping }}",
    "{{ strftime_now('%Y')|length }}{{ '<b>'|e }}{{ '<b>'|safe }}{{ 'a\\nb'|indent(2) }}{{ 'A b'|title }}{{ [3, 1]|sort }}",
    "{% raw %}{{ not rendered }}{% endraw %}{{ messages[0].content is string }}{{ (1, 2)[0] }}\r\nx\ry\n",
]


def test_everything_that_templates_use_is_rendered_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_chat_tokenizer(tmp_path, "chatml")
    tokenizer, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    variables = {**tokenizer.interface.special_tokens, "tools": None, "documents": None}
    for messages in (HI, [{"role": "system", "content": "é"}, *HI, {"role": "assistant", "content": "<ok>\n"}]):
        for prompt in (False, True):
            given = variables | {"messages": messages, "add_generation_prompt": prompt}
            for snippet in SNIPPETS:
                options = {"chat_template": snippet, "tokenize": False, "add_generation_prompt": prompt}
                assert rendered(snippet, given, 1000)["text"] == theirs.apply_chat_template(messages, **options)


def test_one_text_without_a_kept_template(tmp_path: Path) -> None:
    write_chat_tokenizer(tmp_path, "chatml")
    tokenizer = load_tokenizer(tmp_path)
    expected = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert render_chat(tokenizer.interface, HI, add_generation_prompt=False) == expected
    ids = chat_prompt_ids(tokenizer, HI)
    assert tokenizer.decode(ids) == expected + "<|im_start|>assistant\n"
    assert ids[:2] != [0, 2]  # no post-processor


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(UserError, match=r"^some/model: has no chat template: give a text to complete instead$"):
        ChatTemplate(TextInterface(None, (), None, None, (), (), TextFiles(folder="some/model")))


# ---- messages ----


@pytest.fixture(scope="module")
def plain() -> Any:
    with ChatTemplate(interface("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")) as template:
        yield template


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "messages: must be a list of at least one message"),
        ("hi", "messages: must be a list"),
        (None, "messages: must be a list"),
        (["hi"], r"messages\[0\]: must be an object with 'role' and 'content', not 'hi'"),
        ([*HI, {"role": "robot", "content": "x"}], r"messages\[1\].role = 'robot': must be one of system, developer, user, "),
        ([{"content": "x"}], r"messages\[0\].role = None: must be one of"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role = \['user'\]: must be one of"),
        ([{"role": "user"}], r"messages\[0\].content = None: must be text, or a list of parts such as"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content = 5: must be text"),
        ([{"role": "user", "content": []}], r"messages\[0\].content = \[\]: must be text"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] = 'x': only text is supported"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[1\] = .*image_url.*: only text is supported, as in",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"messages\[0\].content\[0\] = .*: only text"),
        ([{"role": "user", "content": "x", "tool_calls": [{"id": 1}]}], r"messages\[0\].tool_calls: is not supported"),
        ([{"role": "user", "content": "x", "name": 5}], r"messages\[0\].name = 5: must be text"),
        (HI * 10_001, "messages: has 10,001 messages; the limit is 10,000"),
        (
            [{"role": "user", "content": "x" * 2_000_001}],
            "messages: have 2,000,001 characters together; the limit is 2,000,000",
        ),
    ],
    ids=range(17),
)
def test_malformed_messages_are_named(plain: ChatTemplate, messages: Any, fault: str) -> None:
    with pytest.raises(UserError, match=f"^{fault}") as found:
        plain.render(messages)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 300


def test_parts_are_joined_and_empty_fields_dropped(plain: ChatTemplate) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert plain.render([{"role": "user", "content": parts, "tool_calls": [], "refusal": None}]) == "user:one\ntwo;"
    assert plain.render([{"role": "user", "content": "a\ud800b"}]) == "user:a\ufffdb;"


def test_the_largest_messages_are_rendered(plain: ChatTemplate) -> None:
    text = "\U0001f600" * 1_999_000
    assert plain.render([{"role": "user", "content": text}]) == f"user:{text};"
    assert len(plain.render(HI * 10_000)) == 80_000


# ---- hostile templates ----

BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "generators": "{{ (range(99999) | list * 99) | map('string') | join | length }}" * 9,
    "macros": "{% macro f(n) %}{% for i in range(9) %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}{{ f(50) }}",
    "powers": "{{ 7 ** (7 ** 11) }}",
    "search": "{% set x = 'a' * 400000 %}{{ (x ~ x).rfind(x ~ 'b' ~ x[1:]) }}{{ (x ~ x ~ x).rfind('b' ~ x) }}" * 99,
    "nested": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
}
SIZES = {
    "multiplication": "{{ 'x' * 10**10 }}",
    "list": "{{ ([1] * 10**10) | length }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "blocks": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}{{ n.x }}",
    "width": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "filter": "{{ 'x' | center(10**10) }}",
    "method": "{{ 'x'.ljust(10**10) }}",
    "indent": "{{ messages | tojson(indent=10**10) }}",
    "replace": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "just over": "{{ 'x' * 4000001 }}",
}
ESCAPES = {
    "mro": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "attr": "{{ ('' | attr('__class__')).mro() }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "map": "{{ [''] | map(attribute='__class__') | list }}{{ ([''] | map(attribute='__class__') | first).mro() }}",
    "import": "{% import 'os' as os %}{{ os.system('true') }}",
    "include": "{% include '/etc/passwd' %}",
    "append": "{{ messages.append(1) }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "frames": "{{ (messages | map('string')).gi_frame.f_builtins }}",
}
FAULTS = {
    "syntax": ("{% for %}", "line 1: TemplateSyntaxError: Expected an expression"),
    "end": ("\n\n{% if true %}", "line 3: TemplateSyntaxError: Unexpected end of template"),
    "filter": ("{{ 1 | nonsense }}", "line 1: TemplateAssertionError: No filter named 'nonsense'"),
    "runtime": ("\n{{ 'x' + 1 }}", "line 2: TypeError: can only concatenate str"),
    "undefined": ("{{ no.such.thing }}", "line 1: UndefinedError: 'no' is undefined"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template recurses too deeply"),
    "brackets": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "the chat template recurses too deeply"),
    "raise": ("{{ raise_exception('two\nlines') }}", "the chat template refuses the messages: two lines"),
    "1 MB": ("x" * (1 << 20) + "x", "the chat template has 1,048,577 characters; the limit is 1,048,576"),
}


def fault_of(template: str, seconds: float = 0.3) -> str:
    with pytest.raises(UserError) as found, ChatTemplate(interface(template, "some/model"), seconds=seconds) as made:
        made.render(HI)
    message = str(found.value)
    assert message.startswith("some/model/chat_template.jinja: ")
    assert "\n" not in message
    assert len(message) < 1200
    return message


@pytest.mark.parametrize("name", BOMBS)
def test_endless_work_is_ended(name: str) -> None:
    fault = fault_of(BOMBS[name])
    assert fault.endswith(("takes more than 0.3 s of processor time", "needs too much memory", "recurses too deeply"))


@pytest.mark.parametrize("name", SIZES)
def test_huge_values_are_refused(name: str) -> None:
    fault = fault_of(SIZES[name])
    reasons = ("needs too much memory", "; the limit is 4,000,000", "takes more than 0.3 s")
    assert any(reason in fault for reason in reasons), fault


@pytest.mark.parametrize("name", ESCAPES)
def test_templates_cannot_leave_the_sandbox(name: str) -> None:
    fault = fault_of(ESCAPES[name])
    assert any(reason in fault for reason in ("SecurityError", "UndefinedError", "TypeError", "no loader"))


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_line(name: str) -> None:
    template, reason = FAULTS[name]
    assert fault_of(template, seconds=5).startswith(f"some/model/chat_template.jinja: {reason}")


def test_a_large_template_is_rendered_or_ended() -> None:
    text = "word " * 200_000
    assert render_chat(interface(text), HI) == text
    assert fault_of("{{ a }}" * 140_000).endswith("takes more than 0.3 s of processor time")


def test_the_config_is_named_if_it_holds_the_template() -> None:
    files = TextFiles(config={"chat_template": "{{ 1 / 0 }}"}, folder="m")
    with pytest.raises(UserError, match=r"^m/tokenizer_config.json: line 1: ZeroDivisionError: division by zero$"):
        render_chat(TextInterface(None, (), None, None, (), (), files), HI)


def test_the_limits_hold_in_threads_and_after_them_chats_go_on() -> None:
    hostile = "{% for m in messages %}{{ m.content }}{% endfor %}{% if messages[0].content == 'loop' %}" + BOMBS["loops"]
    with ChatTemplate(interface(hostile + "{% endif %}"), seconds=0.3) as template, ThreadPoolExecutor(4) as pool:

        def render(text: str) -> str:
            try:
                return template.render([{"role": "user", "content": text}])
            except UserError as error:
                return str(error)

        found = list(pool.map(render, ["a", "loop", "b", "c", "loop", "d"]))
    ended = "model/chat_template.jinja: the chat template takes more than 0.3 s of processor time"
    assert found == ["a", ended, "b", "c", ended, "d"]


def test_elapsed_time_is_limited_too() -> None:
    endless = interface(BOMBS["loops"])
    with ChatTemplate(endless, seconds=60, elapsed_seconds=0.5) as template, pytest.raises(UserError) as found:
        template.render(HI)
    assert str(found.value).endswith("the chat template takes more than 0.5 s")


def test_a_killed_process_is_replaced() -> None:
    with ChatTemplate(interface("{{ messages[0].content }}")) as template:
        assert template.render(HI) == "hi"
        assert template._process is not None
        os.kill(template._process.pid, signal.SIGKILL)
        template._process.wait()
        assert template.render(HI) == "hi"
        process = template._process
    assert process.poll() == 0


def test_an_interrupted_text_does_not_answer_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatTemplate(interface("{{ messages[0].content }}")) as template:
        assert template.render(HI) == "hi"

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        assert template._process is not None
        monkeypatch.setattr(
            template._process, "stdout", type("Pipe", (), {"readline": interrupted, "close": lambda self: None})()
        )
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "first"}])
        assert template.render([{"role": "user", "content": "second"}]) == "second"


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_chat_templates import HI, interface; from bardling.data.tokens.chat_template import ChatTemplate\n"
        "template = ChatTemplate(interface('x')); template.render(HI); print(template._process.pid, flush=True); os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *sys.path], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        if (state := Path(f"/proc/{pid}/stat")).exists() and state.read_text().split(")")[-1].split()[0] == "Z":
            break
