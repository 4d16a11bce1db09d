"""Random small tokenizers and random text: ids, streamed decoding and task ids equal those of transformers and lm-eval."""

import contextlib
import random
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, LETTERS, added, library, lm_eval_pair, surround, words, write

from bardling.config import ModelConfig
from bardling.data.tokens.stream_decoder import StreamDecoder
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.evaluate.multiple_choice import _encode
from bardling.evaluate.tasks import ChoiceItem
from bardling.generation.generate import prompt_ids

transformers = pytest.importorskip("transformers")

PER_KIND = 6  # tokenizers
NAMES = ["<s>", "</s>", "<unk>", "<tool>", "[END]", "covid", "\t\t"]


@dataclass
class Pair:
    ours: Tokenizer
    theirs: Any
    names: list[str]  # of its control tokens

    @property
    def control(self) -> set[int]:
        return {self.theirs.convert_tokens_to_ids(name) for name in self.names}

    def expected(self, text: str, **options: Any) -> list[int]:
        return list(self.theirs(text, **options).input_ids)


def make(kind: str, seed: int) -> Pair:
    rng = random.Random(f"{kind} {seed} options")
    scheme, fallback = rng.choice(["first", "always", "never"]), rng.random() < 0.7
    made = library(kind, seed, scheme=scheme, fallback=fallback, split=rng.random() < 0.5)
    names = ["<unk>", "<s>", "</s>"]
    if rng.random() < 0.6:
        added(made, ("<tool>", rng.random() < 0.5), ("[END]", rng.random() < 0.5), ("covid", False), ("\t\t", False))
        names += ["<tool>", "[END]"]
    surround(made, ["<s>"] * (rng.random() < 0.5), [])
    config = {"unk_token": "<unk>"}
    config |= {"bos_token": "<s>"} if rng.random() < 0.6 else {}
    config |= {"eos_token": rng.choice(["</s>", "[END]"]) if "[END]" in names else "</s>"} if rng.random() < 0.8 else {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), made, **config)
        return Pair(load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder), names)


PAIRS = {kind: [make(kind, seed) for seed in range(PER_KIND)] for kind in KINDS}


def texts(with_names: bool) -> st.SearchStrategy[str]:
    common = words(random.Random(1), 30)
    parts = [st.sampled_from([*common, *(word.title() for word in common[:5]), "'s", "don't", "...", "covid", "\t\t"])]
    parts.append(st.text(alphabet=" \n\t" + LETTERS.replace("<", "").replace("[", "") + "é日👍\u2581\u00a0", max_size=6))
    parts.append(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=3))
    parts += [st.sampled_from(NAMES)] * with_names
    joined = st.lists(st.tuples(st.one_of(parts), st.sampled_from(["", " ", " ", "  ", "\n"])), max_size=10)
    return joined.map(lambda pieces: "".join(part + gap for part, gap in pieces))


every_kind = pytest.mark.parametrize("kind", KINDS)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join(decoder.push(token) for token in ids) + decoder.finish()


@every_kind
@given(data=st.data(), text=texts(with_names=False))
@settings(deadline=None, max_examples=40)
def test_ids_equal_those_of_autotokenizer(kind: str, data: st.DataObject, text: str) -> None:
    pair = data.draw(st.sampled_from(PAIRS[kind]))
    expected = pair.expected(text)
    assert [*pair.ours.interface.start, *pair.ours.encode(text)] == expected
    assert pair.ours.encode(text).tolist() == pair.expected(text, add_special_tokens=False)
    assert pair.ours.encode(text, allow_special=True).tolist() == pair.expected(text, add_special_tokens=False)
    if text and expected:
        assert prompt_ids(pair.ours, text) == expected


@every_kind
@given(data=st.data(), text=texts(with_names=True))
@settings(deadline=None, max_examples=40)
def test_control_tokens_in_text_are_text_unless_a_prompt_asks_for_them(kind: str, data: st.DataObject, text: str) -> None:
    pair = data.draw(st.sampled_from(PAIRS[kind]))
    unknown = pair.theirs.unk_token_id  # of characters that the vocabulary lacks
    assert not (set(pair.ours.encode(text).tolist()) & pair.control) - {unknown}
    assert pair.ours.encode(text, allow_special=True).tolist() == pair.expected(text, add_special_tokens=False)
    found = pair.ours.control_tokens_in(text)
    assert set(found) <= set(pair.names)
    assert bool(found) == any(name in text for name in pair.names)


@every_kind
@given(data=st.data(), text=texts(with_names=True))
@settings(deadline=None, max_examples=40)
def test_streamed_text_equals_the_decoded_text(kind: str, data: st.DataObject, text: str) -> None:
    pair = data.draw(st.sampled_from(PAIRS[kind]))
    ids = pair.expected(text)
    ids += data.draw(st.lists(st.integers(0, len(pair.theirs) - 1), max_size=12))
    expected = pair.theirs.decode(ids)
    assert pair.ours.decode(ids) == expected
    assert streamed(pair.ours, ids) == expected
    cut = data.draw(st.integers(0, len(ids)))
    assert pair.ours.decode_after(ids[:cut], ids[cut:]) == expected[len(pair.theirs.decode(ids[:cut])) :]


@every_kind
@given(data=st.data(), context=texts(with_names=False), endings=st.lists(texts(with_names=False), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_task_ids_equal_those_of_lm_eval(kind: str, data: st.DataObject, context: str, endings: list[str]) -> None:
    pair = data.draw(st.sampled_from(PAIRS[kind]))
    item = ChoiceItem(context, tuple(endings), 0, "1")
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4096, vocab_size=len(pair.theirs))
    expected = [lm_eval_pair(pair.theirs, context, " " + ending) for ending in endings]
    first, encoded = pair.ours.interface.first, None
    with contextlib.suppress(UserError):
        (encoded,) = _encode(pair.ours, [item], [0], config, "task")
    if encoded is None:  # nothing to begin with, or an ending of unknown characters only
        assert first is None or not all(ending for _, ending in expected)
        return
    for ours, (alone, ending) in zip(encoded.endings, expected, strict=True):
        assert encoded.context.tolist() == (alone if any(token is not None for token in alone) else [first])
        assert ours.tolist() == ending or not ending


def test_the_random_tokenizers_differ() -> None:
    assert len({pair.ours.fingerprint for pairs in PAIRS.values() for pair in pairs}) == len(KINDS) * PER_KIND
    assert {pair.ours.kind for pairs in PAIRS.values() for pair in pairs} == {"bpe", "other"}
    assert {len(pair.ours.interface.start) for pairs in PAIRS.values() for pair in pairs} == {0, 1}
    assert all(set(string.ascii_lowercase) & set("".join(pair.theirs.get_vocab())) for pair in PAIRS["unigram"])
