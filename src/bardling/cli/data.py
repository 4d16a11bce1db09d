"""`bardling data COMMAND ...`: look at training data before and after it is tokenized.

Each command is one file, `data_COMMAND.py`, and one line here. It is imported only when it runs.
"""

import importlib
from collections.abc import Sequence

from bardling.errors import UserError, closest

DATA_COMMANDS = {
    "check": "find duplicates, leaks, secrets and damaged text, and describe a source or dataset",
    "merge": "join the parts that `prepare --shard` has made",
    "show": "print sequences exactly as the model sees them",
    "tokenizer": "train a tokenizer on a sample, or measure one",
}


def usage() -> str:
    commands = "\n".join(f"  {command:<9} {summary}" for command, summary in DATA_COMMANDS.items())
    return (
        "usage: bardling data COMMAND ...\n\n"
        "Look at training data before and after it is tokenized.\n\n"
        f"commands:\n{commands}\n\n"
        "`bardling data COMMAND --help` lists a command's options."
    )


def run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    command, *rest = argv
    if command not in DATA_COMMANDS:
        near = closest(command, list(DATA_COMMANDS))
        raise UserError(f"unknown command 'data {command}'{near}; choose from {', '.join(DATA_COMMANDS)}")
    importlib.import_module(f"bardling.cli.data_{command}").run(rest)
