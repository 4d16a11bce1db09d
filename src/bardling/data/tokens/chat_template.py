"""Chat: messages to the text, and to the token ids, that a model expects.

A model's chat template, a Jinja program from outside, turns messages into text exactly as `apply_chat_template` of
`transformers` does (without tools and documents). It runs in Jinja's sandbox and in a process of its own, `chat_process.py`,
which is limited in time, memory and output, works from any thread and is ended if it exceeds a limit. Starting that process
takes about 0.1 s, rendering about 1 ms: keep a `ChatTemplate` to render many chats.

Limits: roles are those of `ROLES`; content is text, or a list of text parts, which are joined by line breaks, since most
templates read strings only.
"""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bardling.data.text.conversations import MAX_CHARACTERS, MAX_MESSAGES
from bardling.data.text.fields import valid_text
from bardling.data.tokens import chat_process
from bardling.data.tokens.text_interface import TextInterface
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
_MAX_TEMPLATE_CHARACTERS = 1 << 20
_MAX_TEXT_CHARACTERS = 2 * MAX_CHARACTERS
_MAX_MEMORY_BYTES = 512 << 20
_PART = '{"type": "text", "text": "..."}'


class ChatTemplate:
    """A model's chat template. Thread-safe. Usable in a `with` statement, which ends the process that renders.

    Args:
        interface: whose `chat_template` and special tokens are used.
        seconds: of processor time that a text may take.
        elapsed_seconds: that it may take on a busy machine.

    Raises:
        UserError: the model has no chat template.
    """

    def __init__(self, interface: TextInterface, *, seconds: float = 5, elapsed_seconds: float = 60) -> None:
        template = interface.chat_template
        if template is None:
            raise UserError(f"{interface.files.folder or 'the model'}: has no chat template: give a text to complete instead")
        self.file = interface.chat_template_file
        if len(template) > _MAX_TEMPLATE_CHARACTERS:
            self._fail(f"the chat template has {len(template):,} characters; the limit is {_MAX_TEMPLATE_CHARACTERS:,}")
        self._template, self._special = template, interface.special_tokens
        self._seconds, self._elapsed_seconds = seconds, elapsed_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; the next `render` starts another."""
        with self._lock:
            self._end()

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text of a chat.

        Args:
            messages: objects with 'role' and 'content'.
            add_generation_prompt: end with what begins the model's answer.

        Raises:
            UserError: a message is malformed, or the template refuses it; the template is faulty or exceeds a limit.
        """
        return self._render(messages, add_generation_prompt)[0]

    def render_with_spans(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat that is complete, and where what the template marks as generated begins and ends (characters)."""
        return self._render(messages, False)

    def _render(self, messages: Sequence[Mapping[str, Any]], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        variables = {
            **self._special,
            "messages": checked_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        with self._lock:
            reply = self._exchange({"template": self._template, "variables": variables})
        if "text" in reply:
            return str(reply["text"]), [(begin, end) for begin, end in reply["spans"]]
        if reply.get("refused"):
            self._fail(f"the chat template refuses the messages: {reply['error']}")
        self._fail(f"line {reply['line']}: {reply['error']}" if reply.get("line") else f"the chat template {reply['error']}")

    def _exchange(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The process's reply to a request."""
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = self._start()
        process, late = self._process, threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._elapsed_seconds, end)
        timer.daemon = True
        timer.start()
        reply = b""
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended; the status says why
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                reply = process.stdout.readline()
        finally:
            timer.cancel()
            if not reply.endswith(b"\n"):  # also after Ctrl-C: the reply to this request must not answer the next one
                status = self._end()
        if reply.endswith(b"\n"):
            found: Mapping[str, Any] = json.loads(reply)
            return found
        if status == -getattr(signal, "SIGPROF", 0):
            return {"error": f"takes more than {self._seconds:g} s of processor time"}
        if late.is_set():
            return {"error": f"takes more than {self._elapsed_seconds:g} s"}
        return {"error": f"cannot be rendered: the process that renders it ended with status {status}"}

    def _start(self) -> "subprocess.Popen[bytes]":
        limits = (self._seconds, _MAX_MEMORY_BYTES, _MAX_TEXT_CHARACTERS)
        # -P: modules beside that file must not hide others. A session of its own does not receive the terminal's Ctrl-C.
        return subprocess.Popen(
            [sys.executable, "-P", str(Path(chat_process.__file__)), *map(str, limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _end(self) -> int | None:
        """End the process, if it runs; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            return process.wait(timeout=1)  # it ends with its input
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _fail(self, reason: str) -> NoReturn:
        raise UserError(f"{self.file}: {' '.join(reason.split())}")


def render_chat(interface: TextInterface, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """The text of one chat; see `ChatTemplate.render`."""
    with ChatTemplate(interface) as template:
        return template.render(messages, add_generation_prompt=add_generation_prompt)


def chat_prompt_ids(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], template: ChatTemplate | None = None
) -> list[int]:
    """The ids from which a model continues with its answer.

    The text has its special tokens written in it, so they are parsed, and the post-processor adds none.

    Args:
        template: the tokenizer's, kept from earlier chats; by default, one that serves for this chat only.
    """
    text = render_chat(tokenizer.interface, messages) if template is None else template.render(messages)
    return [int(token) for token in tokenizer.encode(text, allow_special=True)]


def checked_messages(messages: Any) -> list[dict[str, str]]:
    """Messages as templates read them; a `UserError` names what is malformed.

    Fields that are None or an empty list, as clients of chat services send them, are dropped.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError("messages: must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise UserError(f"messages: has {len(messages):,} messages; the limit is {MAX_MESSAGES:,}")
    found = [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if (total := sum(len(message["content"]) for message in found)) > MAX_CHARACTERS:
        raise UserError(f"messages: have {total:,} characters together; the limit is {MAX_CHARACTERS:,}")
    return found


def _checked_message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise UserError(f"{name}: must be an object with 'role' and 'content', not {_shown(message)}")
    given = {key: value for key, value in message.items() if value is not None and value != []}
    if given.get("role") not in ROLES:
        raise UserError(f"{name}.role = {_shown(message.get('role'))}: must be one of {', '.join(ROLES)}")
    if unknown := [key for key in given if key not in ("role", "content", "name")]:
        raise UserError(f"{name}.{unknown[0]!s:.40}: is not supported; a message has a role, a content and perhaps a name")
    if not isinstance(given.get("name", ""), str):
        raise UserError(f"{name}.name = {_shown(given['name'])}: must be text")
    return {**given, "content": _text(message.get("content"), f"{name}.content")}


def _text(content: Any, name: str) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return valid_text(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise UserError(f"{name} = {_shown(content)}: must be text, or a list of parts such as {_PART}")
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{name}[{index}] = {_shown(part)}: only text is supported, as in {_PART}")
    return valid_text("\n".join(part["text"] for part in content))


def _shown(value: object) -> str:
    return text if len(text := repr(value)) <= 60 else text[:57] + "..."
