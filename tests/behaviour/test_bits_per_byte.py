"""Bits per byte: text only, as a compressor counts it; one version of the metric; the same texts and items everywhere."""

import gzip
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F

from bardling.cli.main import main
from bardling.config import ModelConfig
from bardling.data.batches.loader import Batch, EvalSequences
from bardling.data.tokens.shards import open_dataset
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer
from bardling.data.tokens.vocabulary import EOT
from bardling.distributed.device import Precision
from bardling.evaluate.loss import evaluate_loss
from bardling.evaluate.tasks import draw_items, load_items
from bardling.model.gpt import GPT
from bardling.monitor.jsonl import metrics, read_jsonl
from bardling.report.compression import compressor_bits_per_byte
from bardling.training.objective import NextToken
from bardling.training.run import train

FLOAT32 = Precision("float32", "test", "cpu")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Short documents, so that a good part of the tokens end one."""
    path = tmp_path_factory.mktemp("texts") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"Nr. {number}: é\n" * (number % 3 + 1)}) + "\n" for number in range(200)))
    return path


@pytest.fixture
def run(tiny, change, documents, tmp_path):
    config = change(tiny, data={"source": str(documents), "tokenizer": "byte"}, eval={"windows": 1000}, sample={"every": 0})
    return train(change(config, train={"steps": 6}, optim={"warmup_steps": 0}), tmp_path / "run", quiet=True).folder


def dataset_of(run):
    return open_dataset(json.loads((run / "dataset.json").read_text())["path"])


def shown(capsys, *argv):
    main([*map(str, argv)])
    return capsys.readouterr().out


def test_eval_and_training_leave_out_the_tokens_that_end_documents(run, capsys):
    """The reference: transformers' model, float64 losses, the text without its ends."""
    transformers = pytest.importorskip("transformers")
    dataset = dataset_of(run)
    ids = torch.from_numpy(dataset.split("val").read(0, len(dataset.split("val"))).astype("int64"))
    (checkpoint,) = (run / "checkpoints").glob("step-000006")
    model, losses = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval(), []
    for start in range(0, len(ids) - 1, 16):
        part = ids[start : start + 17]
        with torch.no_grad():
            losses.append(F.cross_entropy(model(part[None, :-1]).logits[0].double(), part[1:], reduction="none"))
    each, targets = torch.cat(losses), ids[1:]
    text = targets != 256
    assert (~text).sum() > 5
    expected = each[text].sum().item() / math.log(2) / text.sum().item()
    assert abs(each.sum().item() / math.log(2) / text.sum().item() - expected) > 0.05, "the ends make a difference"
    out = shown(capsys, "eval", run, "--device", "cpu", "--precision", "float32")
    assert float(re.search(r"bits per byte +([0-9.]+)", out)[1]) == pytest.approx(expected, abs=1e-4)
    assert float(re.search(r"loss +([0-9.]+)", out)[1]) == pytest.approx(each.mean().item(), abs=1e-4), "of all tokens"
    last = metrics(read_jsonl(run / "metrics.jsonl"), "val")[-1]
    assert last["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def uniform(vocab_size, block_size):
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=block_size, vocab_size=vocab_size, vocab_multiple=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


class Ids:
    name, row, marks = "val", 0, None

    def __init__(self, ids):
        self.ids = torch.tensor(ids).numpy()

    def __len__(self):
        return len(self.ids)

    def read(self, start, count):
        return self.ids[start : start + count]


@pytest.mark.parametrize("every", [1, 2, 7, 1000])
def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary_however_short_the_documents(every):
    ids = [token for number in range(60) for token in ([97 + number % 26] + [256] * (number % every == 0))]
    table = torch.from_numpy(build_tokenizer("byte", ()).bytes_per_token())
    sequences = EvalSequences(Ids([0, *ids]), 16, None)
    result = evaluate_loss(uniform(257, 16), sequences, batch_size=3, precision=FLOAT32, bytes_per_token=table)
    assert (result.bytes, result.tokens) == (60, len(ids))
    assert result.bits_per_byte == pytest.approx(math.log2(257), rel=1e-6)


def word_level(**about):
    vocab = {"[UNK]": 0, "</s>": 1, "[CLS]": 2, "ab": 3, "c": 4}
    special = [
        {"id": vocab[name], "content": name, "special": True, **FLAGS} for name in ("[UNK]", "[CLS]", *about.pop("added"))
    ]
    content = {"version": "1.0", "added_tokens": special, "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    return Tokenizer({**content, "post_processor": None, "decoder": None, "model": model}, "words.json", **about)


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize("added", [(), ("</s>",)], ids=["an ordinary entry", "a special token"])
def test_an_end_of_text_token_has_no_bytes_and_an_unknown_word_those_of_its_name(added):
    assert word_level(added=added, eot="</s>").bytes_per_token().tolist() == [5, 0, 0, 2, 1]


def test_the_training_objective_sums_the_losses_of_text_and_trains_bitwise_as_before():
    torch.manual_seed(0)
    tokens = torch.randint(12, (3, 17))
    batch = Batch(tokens[:, :-1], tokens[:, 1:].clone())
    batch.targets[0, 4:9] = -100
    table = torch.tensor([1, 2, 3, 1, 0, 2, 1, 1, 1, 0, 4, 1])
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=12), seed=3)
    plain, counted = NextToken()(model, batch), NextToken(table)(model, batch)
    each = F.cross_entropy(model(batch.inputs).double().flatten(0, 1), batch.targets.flatten(), reduction="none")
    text = (table[batch.targets.flatten().clamp(min=0)] > 0) & (batch.targets.flatten() != -100)
    assert counted.others["text_loss"].item() == pytest.approx(each[text].sum().item(), rel=1e-6)
    assert torch.equal(plain.loss, counted.loss)
    gradients = [torch.autograd.grad(sums.loss / 7, list(model.parameters())) for sums in (plain, counted)]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_training_logs_the_bits_of_text_only(run):
    """Before the first update all is known: the loss of the first step is that of nearly uniform predictions."""
    first = metrics(read_jsonl(run / "metrics.jsonl"), "train")[0]
    assert first["bits_per_byte"] == pytest.approx(first["loss"] / math.log(2), rel=0.02), "a token of a text is a byte"


def test_compressors_get_exactly_the_bytes_that_the_model_is_measured_on(run):
    dataset = dataset_of(run)
    ids = dataset.split("val").read(0, len(dataset.split("val")))
    text = bytes(int(token) for token in ids if token < 256)
    result = evaluate_loss(
        uniform(257, 16),
        EvalSequences(dataset.split("val"), 16, None),
        batch_size=8,
        precision=FLOAT32,
        bytes_per_token=torch.from_numpy(dataset.tokenizer.bytes_per_token()),
    )
    assert result.bytes in (len(text), len(text) - 1), "the first token is not a target"
    assert compressor_bits_per_byte(dataset)["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert EOT.encode() not in text


@pytest.mark.parametrize(
    ("length", "windows", "widths"), [(2, None, [1]), (23, None, [22]), (30, 5, [29]), (66, None, [64, 1])]
)
def test_a_short_text_is_not_padded_to_the_whole_context(length, windows, widths):
    ids = [(7 * number) % 256 for number in range(length)]
    block = 64 if len(widths) > 1 else 100_000
    sequences = EvalSequences(Ids(ids), block, windows)
    batches = [sequences.batch(first, 1) for first in range(sequences.n)]
    assert [batch.inputs.shape[1] for batch in batches] == widths
    assert torch.cat([batch.targets.flatten() for batch in batches]).tolist() == ids[1:]


# ---- versions ----


def as_an_earlier_version(run, steps):
    """Rewrite the records of `steps` as a version before the metric had one wrote them."""
    file, lines = run / "metrics.jsonl", []
    for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if record["step"] in steps and "bits_per_byte" in record:
            del record["bits_per_byte_version"]
            record["bits_per_byte"] = 0.5
        lines.append(json.dumps(record) + "\n")
    file.write_text("".join(lines))


def test_every_record_states_the_version_of_the_metric(run):
    records = [record for record in read_jsonl(run / "metrics.jsonl") if "bits_per_byte" in record]
    assert {record["kind"] for record in records} == {"train", "val"}
    assert {record["bits_per_byte_version"] for record in records} == {2}


@pytest.mark.parametrize("old", [range(1, 4), range(1, 7)], ids=["resumed by this version", "of an earlier one"])
def test_values_of_an_earlier_version_are_never_compared_with_new_ones(run, old, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "curve.svg"
    main(["report", str(run), "--out", str(out), "--compressors"])
    as_an_earlier_version(run, old)
    assert all(
        "bits_per_byte" not in record for record in metrics(read_jsonl(run / "metrics.jsonl"), "train") if record["step"] in old
    )
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run), "--out", str(out), "--compressors"])
    assert stop.value.code == 2
    assert "--compressors: not all of" in capsys.readouterr().err
    before = out.read_bytes()
    main(["report", str(run), "--out", str(out)])
    assert out.read_bytes() != before
    if 6 in old:
        assert "earlier version, which counted end-of-text tokens" in " ".join(shown(capsys, "info", run).split())


# ---- tasks ----


def test_eval_measures_the_items_that_the_run_measures(tiny, change, tmp_path, capsys):
    task = tmp_path / "little.jsonl"
    endings = ["met the sea", "met the king", "met no rose"]
    rows = [{"ctx": f"The king {number}", "endings": endings, "label": number % 3} for number in range(60)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = [sorted(item.label for item in draw_items(load_items(str(task)), 7, seed)) for seed in (3, 0)]
    assert drawn[0] != drawn[1], "the accuracy tells the draws apart"
    config = change(tiny, seed=3, optim={"warmup_steps": 0}, train={"steps": 4}, sample={"every": 0})
    config = change(config, eval={"tasks": (str(task),), "task_items": 7}, data={"tokenizer": "byte"})
    run = train(config, tmp_path / "run", quiet=True).folder
    (record,) = [record for record in read_jsonl(run / "metrics.jsonl") if record["kind"] == "task"]
    asked = ("--tasks", task, "--device", "cpu", "--precision", "float32", "--windows", "1")
    for model in (run, run / "checkpoints" / "step-000004"):
        out = shown(capsys, "eval", model, *asked)
        assert "7 of 60 items" in out
        assert f"{record['accuracy_norm']:.4f} ± {record['stderr']:.4f} accuracy, ending losses normalised by tokens" in out
        assert re.search(rf"{record['accuracy']:.4f} ± [0-9.]+ accuracy, not normalised", out)
    assert "60 of 60 items" in shown(capsys, "eval", run, *asked, "--task_items", "1000")
