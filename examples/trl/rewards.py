"""Rewards for GRPO. TRL calls them with the completions of a batch and the columns of the dataset, such as `answer`."""

from typing import Any

Completion = list[dict[str, str]]  # the messages that the model added: one


def correct(completions: list[Completion], answer: list[str], **_: Any) -> list[float]:
    """1 if the answer is in the text, else 0."""
    return [float(expected in text.split()) for text, expected in zip(texts(completions), answer, strict=True)]


def brief(completions: list[Completion], **_: Any) -> list[float]:
    """From 0 for an empty text down to -1 for 100 characters and more."""
    return [-min(len(text), 100) / 100 for text in texts(completions)]


def texts(completions: list[Completion]) -> list[str]:
    return [completion[0]["content"].replace(".", " ") for completion in completions]
