"""Questions and answers about Python's standard library, made from the library itself: chat.jsonl for docs/finetune.md.

    python examples/chat/questions.py > chat.jsonl

The first line of a module's docstring says what the module is for. Each one is asked for in several ways, and a few small
questions are added: greetings, and what the model is.
"""

import json
import pkgutil
import pydoc
import random
import sys
import warnings
from collections.abc import Iterator

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
    """Name and purpose of each public module that is a file and says in one sentence what it is for."""
    for module in pkgutil.iter_modules():
        path = getattr(module.module_finder, "path", "")
        if module.name not in sys.stdlib_module_names or module.name.startswith("_") or "site-packages" in path:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about modules that a later Python removes
            file = f"{path}/{module.name}/__init__.py" if module.ispkg else f"{path}/{module.name}.py"
            try:
                text = pydoc.synopsis(file)
            except (OSError, SyntaxError):
                continue
        text = (text or "").removeprefix(f"{module.name}.py").lstrip(" -:")  # some repeat their name
        if text[:1].isalpha() and text.endswith(".") and len(text) <= 90:  # otherwise the sentence goes on in the next line
            yield module.name, text


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
