"""`bardling migrate CONFIG.py [--key=value ...]`: print the recipe equivalent to a nanoGPT training command, as TOML."""

from collections.abc import Sequence

from bardling.cli.recipe import wants_help
from bardling.errors import UserError

HELP = """usage: bardling migrate CONFIG.py [CONFIG.py ...] [--key=value ...] > my-recipe.toml

Prints the recipe equivalent to a nanoGPT training command. The files are parsed, never executed."""


def run(argv: Sequence[str]) -> None:
    if wants_help(argv):
        print(HELP)
        return
    if not argv:
        raise UserError("migrate: no configuration given; name a nanoGPT CONFIG.py or give --key=value flags")
    from bardling.cli.nanogpt import read_run
    from bardling.interop.nanogpt import recipe_toml

    print(recipe_toml(read_run(argv), " ".join(argv)), end="")
