"""A recipe with its options: checked, and with `--model.depth N` what the dial derives filled in. What the user gave stays."""

import sys
from collections.abc import Sequence

from bardling.config import RunConfig
from bardling.configfile import checked, recipe_keys


def turned(config: RunConfig, recipe: str, argv: Sequence[str]) -> RunConfig:
    """`config`, checked, with the values that its `model.depth` derives; as it is when the dial is not used.

    A depth on the command line rules over the recipe's values; one in the recipe, over the defaults only.

    Raises:
        UserError: its sections do not fit each other.
    """
    config = checked(config)
    if not config.model.depth:
        return config
    from bardling.model.depth import apply_depth, derived_values  # here, because few runs use the dial

    explicit = {word[2:].split("=", 1)[0].replace("-", "_") for word in argv if word.startswith("--")}
    if "model.depth" not in explicit:
        explicit |= recipe_keys(recipe)
    for key, derived in derived_values(config, explicit).items():
        print(f"bardling: {key} = {derived.value:g}  ({derived.why})", file=sys.stderr)
    return apply_depth(config, explicit)
