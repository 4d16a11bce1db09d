"""The program that renders chat templates: `data/tokens/chat_template.py` runs this file as a process of its own.

Templates come from outside. Jinja's sandbox keeps them from running code, but not from looping or from building a huge string,
often inside a single operation that nothing in the same process can interrupt. So the operating system sets the limits: of
memory (where it can: not on macOS and Windows) and of processor time per text (not on Windows, where the parent's limit of
elapsed time is the only one).

Protocol: each line on standard input is a request in JSON, {"template": str, "variables": {...}}; each line on standard output
is the reply, {"text": str, "spans": [[begin, end], ...]} (of what is marked as generated) or
{"error": str, "line": int | None, "refused": bool}. Arguments: processor seconds per text, bytes of memory, and characters of
the longest text. Imports nothing of the package, to start fast.
"""

import json
import signal
import sys
import traceback
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; the text inside is rendered as it is.

    `environment.spans` collects where these texts are; `environment.parts` is what has been rendered so far.
    """

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> Any:
        text = caller()
        begin = len("".join(self.environment.parts))  # type: ignore[attr-defined]
        self.environment.spans.append((begin, begin + len(text)))  # type: ignore[attr-defined]
        return text


class _Dict:
    """`dict(...)` in a template, without the attributes of the type."""

    def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*values)


class _Namespace(Namespace):
    """`namespace(...)` in a template, without names that begin with an underscore: these are Python's own."""

    def __init__(*values: Any, **named: Any) -> None:  # a template may set the name 'self'
        self, given = values[0], dict(*values[1:], **named)
        Namespace.__init__(self, {_public(name): value for name, value in given.items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)


def _public(name: Any) -> Any:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")
    return name


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as it is: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=4)
def compiled(template: str) -> jinja2.Template:
    """The template in the environment that `transformers` gives it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _Dict()}
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


def rendered(template: str, variables: dict[str, Any], most_characters: int) -> dict[str, Any]:
    """The reply to one request."""
    try:
        program = compiled(template)
        parts, spans = [], []  # type: list[str], list[tuple[int, int]]
        program.environment.parts, program.environment.spans = parts, spans  # type: ignore[attr-defined]
        for part in program.generate(**variables):
            parts.append(part)
        text = "".join(parts)
    except RecursionError:
        return {"error": "recurses too deeply"}
    except MemoryError:
        return {"error": "needs too much memory"}
    except Exception as error:  # noqa: BLE001  whatever a template provokes is the template's error
        refused = type(error) is jinja2.TemplateError  # raise_exception: the template checks the messages itself
        reason = str(error) if refused else f"{type(error).__name__}: {error}"
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else lines[-1] if lines else None
        return {"error": reason[:1000], "line": line, "refused": refused}
    if len(text) > most_characters:
        return {"error": f"produces {len(text):,} characters; the limit is {most_characters:,}"}
    return {"text": text, "spans": spans}


def main() -> None:
    seconds, memory, most_characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes standard input
    limited = sys.platform != "win32"
    if sys.platform != "win32":
        import resource

        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
        if sys.platform != "darwin":
            _, allowed = resource.getrlimit(resource.RLIMIT_AS)
            memory = memory if allowed == resource.RLIM_INFINITY else min(memory, allowed)
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if limited:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = json.dumps(rendered(request["template"], request["variables"], most_characters)).encode()
        if limited:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
