"""Questions and answers about Python's standard library, made from the library itself: chat.jsonl for docs/finetune.md.

    python examples/chat/questions.py > chat.jsonl

The first line of a module's docstring says what the module is for. Each one is asked for in several ways, and a few small
questions are added: greetings, and what the model is.
"""

import ast
import importlib.util
import json
import pkgutil
import random
import sys
from collections.abc import Iterator
from pathlib import Path

ABOUT = (
    "What is the module {name} for?",
    "What does {name} do?",
    "What is {name}?",
    "Tell me about {name}.",
    "When would I use the module {name}?",
    "Can you explain {name}?",
)
SMALL = {
    "Hello! I am a small model that knows Python's standard library.": ("Hello!", "Hi!", "Good morning!", "Hi there."),
    "A language model with a few million parameters, trained on a laptop.": (
        "What are you?",
        "Who are you?",
        "What is your name?",
    ),
    "You are welcome!": ("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much."),
    "I do not know. I know only modules of Python's standard library.": (
        "What is the capital of France?",
        "How are you?",
        "Who won the election?",
        "What is the weather like?",
        "Tell me a joke.",
        "What is the meaning of life?",
    ),
}


def synopses() -> Iterator[tuple[str, str]]:
    """Name and purpose of each public module whose docstring begins with one short line."""
    for module in pkgutil.iter_modules():
        if module.name not in sys.stdlib_module_names or module.name.startswith("_"):
            continue
        spec = importlib.util.find_spec(module.name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_bytes())) or ""
        text = text.split("\n\n")[0].removeprefix(f"{module.name}.py").lstrip(" -:")  # some repeat their name
        if text[:1].isalpha() and "\n" not in text and 12 <= len(text) <= 90:
            yield module.name, text[0].upper() + text[1:].rstrip(".") + "."


def pairs() -> Iterator[tuple[str, str]]:
    """Questions and answers."""
    for name, purpose in synopses():
        for question in ABOUT:
            yield question.format(name=name), purpose
    for answer, questions in SMALL.items():
        for question in questions:
            yield from [(question, answer)] * 4


def main() -> None:
    """Print conversations of one to three questions."""
    draw, left = random.Random(0), list(pairs())
    draw.shuffle(left)
    while left:
        count = draw.randint(1, 3)
        chosen, left = left[:count], left[count:]
        turns = [
            ({"role": "user", "content": question}, {"role": "assistant", "content": answer}) for question, answer in chosen
        ]
        print(json.dumps({"messages": [message for turn in turns for message in turn]}))


if __name__ == "__main__":
    main()
