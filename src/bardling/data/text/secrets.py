"""Strings that look like secrets: keys of well-known services, private keys, tokens, assigned passwords.

A pattern is tried only where its first characters occur, so that long texts take little time. Found values are shown masked,
never as a whole. Limits: a finding is a guess by the shape of the text; placeholders with few distinct characters are ignored,
as are assigned values that are no mixture of letters and digits.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_SHOWN = 4  # characters of a value that are shown
_LEAST_DISTINCT = 8  # characters of a value that is no placeholder


class Secret(NamedTuple):
    """A string that looks like a secret."""

    kind: str
    line: int  # counted from 1
    masked: str


_PATTERNS: tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...] = (
    ("AWS access key", ("AKIA",), re.compile(r"(?<![A-Za-z0-9])(AKIA[A-Z2-7]{16})(?![A-Za-z0-9])")),
    ("GitHub token", ("ghp_", "gho_", "ghs_"), re.compile(r"(gh[pos]_[A-Za-z0-9]{36})(?![A-Za-z0-9])")),
    ("GitHub token", ("github_pat_",), re.compile(r"(github_pat_[A-Za-z0-9_]{60,90})")),
    ("Slack token", ("xox",), re.compile(r"(xox[abprs]-[0-9A-Za-z-]{20,250})")),
    ("Google API key", ("AIza",), re.compile(r"(AIza[0-9A-Za-z_-]{35})(?![0-9A-Za-z_-])")),
    ("Hugging Face token", ("hf_",), re.compile(r"(?<![A-Za-z0-9_])(hf_[A-Za-z]{34})(?![A-Za-z0-9])")),
    ("Stripe key", ("sk_live_",), re.compile(r"(sk_live_[0-9A-Za-z]{20,99})")),
    ("OpenAI or Anthropic key", ("sk-",), re.compile(r"(?<![A-Za-z0-9-])(sk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,160})")),
    ("JSON web token", ("eyJ",), re.compile(r"(eyJ[A-Za-z0-9_-]{10,1000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000})")),
    (
        "private key",
        ("-----BEGIN ",),
        re.compile(r"-----BEGIN (?:[A-Z]{1,12} )?PRIVATE KEY-----\s{1,4}([A-Za-z0-9+/=\s]{64,200})"),
    ),
    (
        "assigned secret",
        ("api_key", "apikey", "api-key", "secret", "passw", "access_token", "auth_token"),
        re.compile(
            r"""(?i)(?:api[_-]?key|secret(?:[_-]?key)?|passw(?:or)?d|(?:access|auth)_token)["']?\s{0,3}[:=]{1,2}\s{0,3}["']"""
            r"""([A-Za-z0-9+/_=.-]{16,120})["']"""
        ),
    ),
)


def find_secrets(text: str) -> Iterator[Secret]:
    """The strings of a text that look like secrets, kind by kind."""
    for kind, place, begin, end in _spans(text):
        yield Secret(kind, text.count("\n", 0, place) + 1, mask(text[begin:end]))


def hide_secrets(text: str) -> str:
    """The text with each of these strings masked."""
    for _, _, begin, end in sorted(_spans(text), key=lambda span: -span[2]):
        text = text[:begin] + mask(text[begin:end]) + text[end:]
    return text


def _spans(text: str) -> Iterator[tuple[str, int, int, int]]:
    """Kind, where the string begins, and where its value begins and ends."""
    lower = text.lower()
    for kind, anchors, pattern in _PATTERNS:
        assigned, done = kind == "assigned secret", 0
        for place in sorted(_places(lower if assigned else text, anchors)):
            match = pattern.match(text, place) if place >= done else None
            if match is None:
                continue
            done, value = match.end(), match[1]
            mixed = re.search("[0-9]", value) and re.search("[A-Za-z]", value)
            if len(set(value)) >= _LEAST_DISTINCT and (mixed or not assigned):
                yield kind, place, *match.span(1)


def _places(text: str, anchors: tuple[str, ...]) -> Iterator[int]:
    for anchor in anchors:  # every pattern begins with one of its anchors
        place = text.find(anchor)
        while place >= 0:
            yield place
            place = text.find(anchor, place + len(anchor))


def mask(value: str) -> str:
    """The first characters of a value, and its length."""
    return f"{value[:_SHOWN]}{'*' * 8} ({len(value)} characters)"
