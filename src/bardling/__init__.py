"""Bardling trains GPTs from raw text to a model that loads in standard tools.

    import bardling

    config = bardling.load_recipe("quickstart")
    bardling.train(config, "runs/first")
    model, tokenizer = bardling.load_model("runs/first"), bardling.load_tokenizer("runs/first")
    prompt = tokenizer.encode("    def").tolist()
    completion = [row[0] for row in bardling.generate(model, [prompt], max_new_tokens=100)]
    print(tokenizer.decode(completion))

The names below are imported when they are first used, so that `import bardling` is cheap.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bardling.checkpoint.load import load_model as load_model
    from bardling.checkpoint.load import load_tokenizer_of as load_tokenizer  # noqa: F401
    from bardling.config import ModelConfig as ModelConfig
    from bardling.config import RunConfig as RunConfig
    from bardling.config.recipes import load_recipe as load_recipe
    from bardling.data.tokens.prepare import prepare as prepare
    from bardling.errors import UserError as UserError
    from bardling.generation.generate import generate as generate
    from bardling.model.gpt import GPT as GPT
    from bardling.training.library import fit_batches as fit_batches
    from bardling.training.run import resume as resume
    from bardling.training.run import train as train

__version__ = version("bardling")

# name -> (module, name there)
_PUBLIC = {
    "GPT": ("bardling.model.gpt", "GPT"),
    "ModelConfig": ("bardling.config", "ModelConfig"),
    "RunConfig": ("bardling.config", "RunConfig"),
    "UserError": ("bardling.errors", "UserError"),
    "fit_batches": ("bardling.training.library", "fit_batches"),
    "generate": ("bardling.generation.generate", "generate"),
    "load_model": ("bardling.checkpoint.load", "load_model"),
    "load_recipe": ("bardling.config.recipes", "load_recipe"),
    "load_tokenizer": ("bardling.checkpoint.load", "load_tokenizer_of"),
    "prepare": ("bardling.data.tokens.prepare", "prepare"),
    "resume": ("bardling.training.run", "resume"),
    "train": ("bardling.training.run", "train"),
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bardling' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
