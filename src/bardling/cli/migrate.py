"""`bardling migrate CONFIG.py [--key=value ...]`: the recipe that a nanoGPT configuration amounts to, printed as TOML."""

from collections.abc import Sequence

from bardling.errors import UserError

HELP = """usage: bardling migrate CONFIG.py [CONFIG.py ...] [--key=value ...] > my-recipe.toml

Prints the recipe that a nanoGPT training command amounts to. The files are parsed, never executed."""


def run(argv: Sequence[str]) -> None:
    """Translate and print."""
    if any(word in ("-h", "--help") for word in argv):
        print(HELP)
        return
    if not argv:
        raise UserError("bardling migrate CONFIG.py [--key=value ...]: name a nanoGPT configuration file, or give its flags")
    from bardling.cli.nanogpt import migrated

    print(migrated(argv), end="")
