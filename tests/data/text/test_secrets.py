"""Strings that look like secrets are found with their lines, and never shown as a whole. The keys here are random."""

import random
import string

import pytest

from bardling.data.text.secrets import find_secrets, hide_secrets

DRAW = random.Random(4)
LETTERS = string.ascii_letters + string.digits


def drawn(count, letters=LETTERS):
    return "".join(DRAW.choices(letters, k=count))


SECRETS = {
    "AWS access key": "AKIA" + drawn(16, string.ascii_uppercase + "234567"),
    "GitHub token": "ghp_" + drawn(36),
    "Slack token": "xoxb-" + drawn(12, string.digits) + "-" + drawn(24),
    "Google API key": "AIza" + drawn(35),
    "Hugging Face token": "hf_" + drawn(34, string.ascii_letters),
    "Stripe key": "sk_live_" + drawn(24),
    "OpenAI or Anthropic key": "sk-proj-" + drawn(40),
    "JSON web token": f"eyJ{drawn(20)}.eyJ{drawn(40)}.{drawn(30)}",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{drawn(64)}\n{drawn(64)}",
    "assigned secret": f'API_KEY = "{drawn(18)}a1"',
}


@pytest.mark.parametrize("kind", SECRETS)
def test_found_with_its_line_and_masked(kind):
    text = f"first line\nsecond line {SECRETS[kind]} and more\n"
    (found,) = find_secrets(text)
    assert (found.kind, found.line) == (kind, 2)
    value = SECRETS[kind].split('"')[1] if '"' in SECRETS[kind] else SECRETS[kind].partition("-----\n")[2] or SECRETS[kind]
    assert value[:12] not in found.masked
    assert value[:12] not in hide_secrets(text)
    assert hide_secrets(text).startswith("first line\nsecond line ")


@pytest.mark.parametrize(
    "text",
    [
        "password = 'correct horse battery staple'",
        "api_key = 'xxxxxxxxxxxxxxxxxxxxxxxx'",
        'secret_key = "aaaaaaaaaaaaaaaa1111"',
        "AKIAIOSFODNN7",
        "the secret: nobody knows; passwords are hashed",
        "https://example.com/?token=ghp_short",
        "skeleton sk-learn xoxo AIzawa eyJ",
    ],
)
def test_ordinary_text_is_none(text):
    assert not list(find_secrets(text))
    assert hide_secrets(text) == text
