"""A corpus of several sources: joined end to end, with one tokenizer, named, and checked."""

import numpy as np
import pytest

from bardling.cli.parse import parse
from bardling.config import DataConfig, RunConfig, SourceConfig, TrainConfig
from bardling.config.recipes import config_to_toml, parse_recipe
from bardling.data.tokens.corpus import open_corpus, source_names
from bardling.data.tokens.prepare import prepare
from bardling.errors import UserError


def mixture(*sources, **values):
    return DataConfig(source="", sources=tuple(SourceConfig(str(source)) for source in sources), **values)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("one.txt", "two.txt")]
    for path, word in zip(paths, ("king and queen ", "rose, thorn "), strict=True):
        path.write_text(word * 200)
    return paths


def test_the_splits_follow_each_other(files):
    corpus = open_corpus(mixture(*files, tokenizer="byte"))
    assert [name for name, _ in corpus.splits("train")] == ["one", "two"]
    for split in ("train", "val"):
        joined, parts = corpus.split(split), [part for _, part in corpus.splits(split)]
        whole = np.concatenate([part.read(0, len(part)) for part in parts])
        assert len(joined) == len(whole)
        border = len(parts[0])
        for start, count in ((0, len(whole)), (border - 3, 6), (border, 1), (border - 1, 1), (len(whole), 0)):
            assert np.array_equal(joined.read(start, count), whole[start : start + count])
        assert joined.place(border) == parts[1].place(0)
        with pytest.raises(ValueError, match="not within the split"):
            joined.read(border, len(whole))
    assert corpus.verify() == []
    assert corpus.fingerprint != open_corpus(mixture(*reversed(files), tokenizer="byte")).fingerprint


def test_the_validation_text_has_its_own_title(files):
    single = open_corpus(DataConfig(str(files[0]), "byte", val_source=str(files[1])))
    mixed = open_corpus(mixture(*files, tokenizer="byte", val_source=str(files[1])))
    assert single.validation_title == mixed.validation_title == str(single.val[0].dataset.path) != single.title
    assert mixed.title == "the mixture of one, two" == open_corpus(mixture(*files, tokenizer="byte")).validation_title
    alone = open_corpus(DataConfig(str(files[0]), "byte"))
    assert alone.validation_title == alone.title


def test_a_trained_tokenizer_is_that_of_the_first_source(files):
    corpus = open_corpus(mixture(*files, tokenizer="bpe:270"))
    prints = {part.dataset.manifest.tokenizer for part in corpus.train}
    assert prints == {open_corpus(DataConfig(str(files[0]), "bpe:270")).manifest.tokenizer}


def test_a_prepared_source_gives_its_tokenizer_to_text(files, tmp_path):
    prepared = prepare(str(files[0]), tmp_path / "prepared", "bpe:270").path
    corpus = open_corpus(mixture(prepared, files[1]))
    assert len({part.dataset.manifest.tokenizer for part in corpus.train}) == 1
    with pytest.raises(UserError, match=r"made with tokenizer \w+ of 257 tokens, but .*prepared with tokenizer \w+ of 269"):
        open_corpus(mixture(files[1], prepared))


def test_a_source_may_have_its_own_field_and_separator(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"body": "row {number}"}}\n' for number in range(9)))
    (tmp_path / "joined.txt").write_text("##".join(f"part {number}" for number in range(7)))
    rows, joined = (str(tmp_path / name) for name in ("rows.jsonl", "joined.txt"))
    sources = (SourceConfig(rows, field="body"), SourceConfig(joined, separator="##"))
    corpus = open_corpus(DataConfig(source="", sources=sources))
    manifests = [part.dataset.manifest for part in corpus.train]
    assert [manifest.train.documents + manifest.val.documents for manifest in manifests] == [9, 7]


def test_names_are_unique():
    config = mixture("a/web.jsonl", "b/web.jsonl:body", "hf:some/Stories", "books/*.txt", "c/web-2")
    assert source_names(config) == ["web", "web-2", "stories", "books", "web-2-2"]
    named = DataConfig(sources=(SourceConfig("web.txt"), SourceConfig("x", name="web")), source="")
    assert source_names(named) == ["web-2", "web"]


def test_a_mixture_survives_its_recipe():
    sources = (SourceConfig("web", (0.8, 0.2)), SourceConfig("code", 1.0, "Code", "cp1252"))
    config = RunConfig(data=DataConfig(source="", sources=sources, stages=(0.9,)))
    assert parse_recipe(config_to_toml(config), "recipe") == config


def test_a_mixture_on_the_command_line():
    words = ["--data.sources", "0.8,0.2:web.jsonl:text", "1:hf:a/b", "code", "--data.stages", "0.5", "--data.tokenizer", "byte"]
    found = parse(RunConfig, words, prog="x", description="").data
    assert [(each.source, each.weight) for each in found.sources] == [
        ("web.jsonl:text", (0.8, 0.2)),
        ("hf:a/b", 1.0),
        ("code", 1.0),
    ]
    assert found.stages == (0.5,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "shakespeare"}, "data.source = 'shakespeare': data.sources name the text too; leave out one of them"),
        ({"weights": (1.0, 0.0)}, "data.sources.weight = 0.0: the weight of 'b' must be above 0"),
        ({"weights": (-1.0, 1.0)}, "data.sources.weight = -1.0: the weight of 'a' must be above 0"),
        ({"weights": (1.0, float("nan"))}, "data.sources.weight = nan: the weight of 'b' must be above 0"),
        ({"weights": (float("inf"), 1.0)}, "data.sources.weight = inf: the weight of 'a' must be above 0"),
        ({"weights": ((1.0, 2.0), 1.0)}, "data.sources.weight = (1.0, 2.0): 'a' needs one weight, or 1 for the stages"),
        ({"weights": ((1.0, 2.0, 3.0), 1.0), "stages": (0.5,)}, "'a' needs one weight, or 2 for the stages"),
        ({"weights": ((1.0, 0.0), (1.0, 0.0)), "stages": (0.5,)}, "stage 2 needs a source with a weight above 0"),
        ({"stages": (0.9, 0.5)}, "data.stages = (0.9, 0.5): must be fractions between 0 and 1, or numbers of samples"),
        ({"stages": (1.5,)}, "data.stages = (1.5,): must be fractions"),
        ({"stages": (0.5, 100)}, "data.stages = (0.5, 100): must be fractions"),
        ({"stages": (0,)}, "data.stages = (0,): must be fractions"),
        ({"tokenizer": "char"}, "data.tokenizer = 'char': its characters would be those of one source"),
        ({"names": ("x", "x")}, "data.sources.name = ['x', 'x']: two sources have the same name"),
        ({"encodings": ("", "klingon")}, "data.sources.encoding = 'klingon': unknown encoding"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    columns = [
        values.pop(key, default) for key, default in (("weights", (1.0, 1.0)), ("names", ("", "")), ("encodings", ("", "")))
    ]
    sources = tuple(SourceConfig(name, *row) for name, row in zip("ab", zip(*columns, strict=True), strict=True))
    with pytest.raises(UserError) as caught:
        DataConfig(**{"source": "", "sources": sources, **values})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_fits_no_mixture_is_refused():
    with pytest.raises(UserError, match=r"data.stages = \(0.5,\): needs a mixture, data.sources"):
        DataConfig(stages=(0.5,))
    recipe = '[data]\nsource = "stdlib"\n[[data.sources]]\nsource = "a"\n'
    with pytest.raises(UserError, match=r"recipe: data.source = 'stdlib': data.sources name the text too"):
        parse_recipe(recipe, "recipe")
    with pytest.raises(UserError, match=r"recipe: unknown key data.sources.wieght"):
        parse_recipe('[[data.sources]]\nsource = "a"\nwieght = 2\n', "recipe")
    with pytest.raises(UserError, match=r"data.stages = \[0.5\] with train.deadline = '1h': the number of steps is open"):
        RunConfig(data=mixture("a", stages=(0.5,)), train=TrainConfig(deadline="1h"))


def test_a_missing_source_names_itself(files, tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt"):
        open_corpus(mixture(files[0], tmp_path / "gone.txt"))
