"""`bardling chat MODEL`: a conversation in the terminal, or line by line from a pipe.

On a terminal: a prompt with history, answers as they are generated, Ctrl-C to end an answer, and notes on standard error. From
a pipe: each line is a turn, answers are all that is printed, and the first error ends the command. Answers are escaped, so that
a model cannot control the terminal.
"""

import contextlib
import json
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from bardling.cli.parse import Model, note, parse
from bardling.errors import Terminated, UserError, closest
from bardling.files.atomic import check_place, write_atomically
from bardling.files.decoding import decode_text
from bardling.files.paths import expand_home
from bardling.files.prompt import MAX_PROMPT_BYTES

if TYPE_CHECKING:
    from bardling.generation.conversation import Conversation


@dataclass(frozen=True)
class ChatOptions:
    model: Model
    """A run, a checkpoint, a model folder, gpt2 or USER/REPO on the hub, or a nanoGPT or nano-gpt checkpoint."""
    system: str = ""
    """System message: what the model is told before the conversation."""
    max_new_tokens: int = 512
    """Maximum length of an answer (tokens)."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: int | None = None
    """Sample only from the k most likely tokens."""
    top_p: float | None = None
    """Sample only from the most likely tokens that together reach this probability."""
    min_p: float | None = None
    """Sample only from tokens with at least this fraction of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that have occurred less likely."""
    seed: int | None = None
    """Sampling seed; default: a random one, which is printed."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "float32"
    """Dtype of the weights; fewer bits generate faster and round the weights. 'auto': what is fastest on this device."""
    best: bool = False
    """Use the checkpoint with the lowest validation loss instead of the latest."""


def run(argv: Sequence[str]) -> None:
    options = parse(ChatOptions, argv, prog="bardling chat", description="Talk with a model.")
    from bardling.checkpoint.load import load
    from bardling.data.tokens.chat_template import ChatTemplate
    from bardling.distributed.device import choose_device
    from bardling.generation.conversation import Conversation
    from bardling.generation.engine import Engine
    from bardling.generation.sampling import Sampling
    from bardling.generation.weights import convert_weights

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    sampling = Sampling(**{name: getattr(options, name) for name in names}, seed=seed)
    device = choose_device(options.device)
    loaded = load(options.model, best=options.best)
    tokenizer = loaded.needed_tokenizer()
    with contextlib.ExitStack() as stack:
        template = None
        if tokenizer.interface.chat_template is not None:
            template = stack.enter_context(ChatTemplate(tokenizer.interface))
        elif options.system:
            raise UserError(f"--system: {options.model} has no chat template, and so no system message: leave it out")
        model = convert_weights(loaded.build().to(device), options.weights)
        engine = Engine(model, tokenizer, slots=1, retained=1)
        conversation = Conversation(engine, tokenizer, template, sampling, model.config.block_size)
        conversation.system = options.system
        if options.seed is None:
            note(f"--seed {seed}")
        if template is None:
            note(f"{options.model} has no chat template: it continues the text that you type")
        terminal = sys.stdin is not None and sys.stdin.isatty()
        session = _Session(conversation, terminal=terminal, chat=template is not None)
        if terminal:
            note("/help lists the commands, Ctrl-D leaves")
            session.talk()
        else:
            session.answer_all(_lines())


class _Session:
    """Turns and commands, from wherever they come."""

    def __init__(self, conversation: "Conversation", *, terminal: bool, chat: bool) -> None:
        self._conversation, self._chat = conversation, chat
        self._interrupts = _Interrupts()
        self._terminal = terminal
        self._commands: Mapping[str, tuple[str, str, Callable[[str], None]]] = {
            "/reset": ("", "forget the conversation, except for the system message", self._reset),
            "/system": ("TEXT", "set the system message; without TEXT, remove it", self._system),
            "/save": ("FILE", "write the conversation to a new JSON file", self._save),
            "/help": ("", "list the commands", self._help),
            "/quit": ("", "leave, as do Ctrl-D and Ctrl-C", lambda _: None),
        }

    def talk(self) -> None:
        """Talk with the person at the terminal until they leave."""
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  gives `input` a history and editing
        with contextlib.suppress(AttributeError):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        with self._interrupts, contextlib.suppress(EOFError, _Leave):
            while True:
                line = _input("> ")
                try:
                    if not self.take(line):
                        return
                except UserError as error:
                    note(str(error))
        print()  # the shell's prompt begins on a line of its own

    def answer_all(self, lines: Iterator[str]) -> None:
        for line in lines:
            if not self.take(line):
                return

    def take(self, line: str) -> bool:
        """Obey a command or answer a turn; whether the conversation goes on."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):  # // begins a turn with a slash
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
            return True
        name, _, rest = line.strip().partition(" ")
        if name not in self._commands:
            text = "a turn that begins with / is written with //"
            raise UserError(f"unknown command {name}{closest(name, list(self._commands))}; /help lists all; {text}")
        self._commands[name][2](rest.strip())
        return name != "/quit"

    def _answer(self, text: str) -> None:
        from bardling.files.streams import escape_unprintable

        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        with self._interrupts.during_answer():
            prompt = self._conversation.prompt(text)
            if prompt.dropped:
                turns = "the oldest turn" if prompt.dropped == 1 else f"the {prompt.dropped} oldest turns"
                note(f"the conversation exceeds the model's context: it no longer sees {turns}")
            for piece in self._conversation.answer(prompt, lambda: self._interrupts.requested):
                print(escape_unprintable(piece, encoding), end="", flush=True)
        print(flush=True)
        if self._chat and self._conversation.finish == "length":
            note("the answer was cut at --max_new_tokens")
        elif self._conversation.finish == "context":
            note("the answer was cut: the model's context is full")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._say("the conversation is forgotten")

    def _system(self, text: str) -> None:
        if not self._chat:
            raise UserError("/system: the model has no chat template, and so no system message")
        self._conversation.system = text
        self._say(f"the system message is now {text!r}" if text else "there is no system message now")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save: name a file, as in /save chat.json")
        path = Path(expand_home(name))
        check_place(path)
        if path.exists():
            raise UserError(f"{path}: exists already: choose another name")
        write_atomically(path, (json.dumps(self._conversation.content(), indent=2, ensure_ascii=False) + "\n").encode())
        self._say(f"saved to {path}")

    def _help(self, _: str) -> None:
        for name, (argument, purpose, _run) in self._commands.items():
            self._say(f"{f'{name} {argument}':<14} {purpose}")
        self._say("Ctrl-C during an answer ends the answer")

    def _say(self, text: str) -> None:
        """Reply to a command."""
        if self._terminal:
            note(text)


class _Leave(KeyboardInterrupt):
    """Ctrl-C at the prompt."""


class _Interrupts:
    """Ctrl-C: asks for the end of an answer, and at the prompt raises `_Leave`. A second one ends the command."""

    def __init__(self) -> None:
        self.requested = False
        self._answering = False

    def __enter__(self) -> None:
        self._previous = signal.signal(signal.SIGINT, self._receive)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._answering:
            raise _Leave
        if self.requested:
            raise Terminated(number)
        self.requested = True

    @contextlib.contextmanager
    def during_answer(self) -> Iterator[None]:
        self.requested, self._answering = False, True
        try:
            yield
        finally:
            self._answering = False


def _input(prompt: str) -> str:
    """A line that is typed. The prompt never goes into a file that collects the answers."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _lines() -> Iterator[str]:
    """The lines on standard input, without their ends."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:  # replaced by a text stream, or closed
        yield from (line.rstrip("\r\n") for line in sys.stdin or ())
        return
    number = 0
    while data := stream.readline(MAX_PROMPT_BYTES + 1):
        number += 1
        if len(data) > MAX_PROMPT_BYTES:
            raise UserError(f"standard input, line {number}: is longer than {MAX_PROMPT_BYTES >> 20} MiB: give a shorter text")
        yield decode_text(data, f"standard input, line {number}", file="chat.txt").rstrip("\r\n")
