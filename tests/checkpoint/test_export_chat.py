"""`export --chat`: ChatML for a model without a chat template. Its tokens get new rows, and all others keep theirs."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.export import export_gguf, export_hf
from bardling.checkpoint.load import load
from bardling.cli.main import main
from bardling.config import ModelConfig
from bardling.data.tokens.chat_template import chat_prompt_ids
from bardling.data.tokens.chatml import END, PAD, START, TEMPLATE, with_chatml
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.training.run import train

CHAT = [{"role": "user", "content": "Who met the queen?"}, {"role": "assistant", "content": "The king."}]
RENDERED = f"{START}user\nWho met the queen?{END}\n{START}assistant\nThe king.{END}\n"
FAMILIES = {"gpt2": {}, "untied llama": {"family": "llama"}, "value embeddings": {"family": "custom", "value_embeddings": 1}}


@pytest.fixture
def base(tmp_path, corpus):
    """`base(spare, tokenizer, **options)`: a model folder with some rows more than its tokenizer has tokens."""

    def write(spare: int = 0, tokenizer: str = "bpe:300", **options) -> str:
        known = build_tokenizer(tokenizer, [corpus.read_text()])
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": known.vocab_size + spare}
        config = ModelConfig(**{**sizes, "vocab_multiple": 64, **options}).resolved()
        (tmp_path / "base").mkdir()
        write_model(tmp_path / "base", config, GPT(config, seed=1).state_dict(), known)
        return str(tmp_path / "base")

    return write


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spare", [0, 12])
def test_new_tokens_are_the_mean_and_the_others_keep_their_logits(base, tmp_path, family, spare):
    before = load(base(spare, **FAMILIES[family]))
    if family == "value embeddings":  # which transformers does not have
        after = before.extended(with_chatml(before.tokenizer))
    else:
        export_hf(str(tmp_path / "base"), tmp_path / "chat", chat=True)
        after = load(tmp_path / "chat")
    size = before.tokenizer.vocab_size
    assert after.tokenizer.vocab_size == size + 3
    assert after.config.vocab_size == size + max(spare, 3)
    assert after.config.padded_vocab_size == before.config.padded_vocab_size
    tables = [name for name, value in before.state.items() if value.shape[0] == before.config.padded_vocab_size]
    assert len(tables) == (1 if family == "gpt2" else 2)
    for name in tables:
        old, new = before.state[name], after.state[name]
        torch.testing.assert_close(new[size : size + 3], old[:size].mean(0).expand(3, -1))
        assert torch.equal(new[:size], old[:size])
        assert torch.equal(new[size + 3 :], old[size + 3 :])
    tokens = torch.randint(size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = before.build()(tokens), after.build()(tokens)
    assert torch.equal(new[..., :size], old[..., :size])


def test_transformers_sees_the_template_its_tokens_and_where_answers_end(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    export_hf(base(), tmp_path / "chat", chat=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    ours = load(tmp_path / "chat")
    start, end, pad = (theirs.convert_tokens_to_ids(name) for name in (START, END, PAD))
    assert (start, end, pad) == (300, 301, 302)
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == (END, PAD, "<|endoftext|>")
    assert model.generation_config.eos_token_id == [end, 299]
    assert model.generation_config.pad_token_id == pad
    assert model.generation_config.bos_token_id == 299
    assert theirs.apply_chat_template(CHAT, tokenize=False) == RENDERED
    tokens = theirs.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    answer = [token for token, mark in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if mark]
    assert theirs.decode(answer) == f"The king.{END}"
    prompt = theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat_prompt_ids(ours.tokenizer, CHAT[:1]) == prompt
    assert ours.tokenizer.interface.chat_template == TEMPLATE
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([prompt])).logits, ours.build()(torch.tensor([prompt])))


def test_a_gguf_file_has_the_template_too(base, tmp_path):
    pytest.importorskip("gguf")
    from llama_cpp import LlamaCpp

    export_gguf(base(family="qwen3"), tmp_path / "chat.gguf", chat=True)
    loaded = load(tmp_path / "chat.gguf")
    assert loaded.tokenizer.interface.chat_template == TEMPLATE
    assert loaded.tokenizer.interface.eos == (301, 299)
    found = LlamaCpp(tmp_path / "chat.gguf")
    assert found.template(CHAT[:1]) == f"{START}user\nWho met the queen?{END}\n{START}assistant\n"


def test_training_takes_the_spare_rows_of_a_model(tiny, change, base, tmp_path):
    """`data.chat_template = "chatml"` and `export --chat` begin with the same rows."""
    rows = [{"messages": [{**CHAT[0], "content": f"Who met {number} queens?"}, CHAT[1]]} for number in range(8)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = change(
        tiny,
        model={"init": base(spare=12), "block_size": 64},
        data={"source": str(tmp_path / "chat.jsonl"), "tokenizer": "byte", "chat_template": "chatml"},
        optim={"lr": 1e-30, "weight_decay": 0.0},
        train={"steps": 1},
        eval={"every": 0},
        sample={"every": 0},
    )
    train(config, tmp_path / "run", quiet=True)
    export_hf(str(tmp_path / "base"), tmp_path / "chat", chat=True)
    weights = load_file(tmp_path / "chat" / "model.safetensors")["transformer.wte.weight"]
    torch.testing.assert_close(load(tmp_path / "run").state["transformer.wte.weight"][:312], weights)


def test_a_template_of_the_model_is_kept(base, tmp_path, capsys):
    own = "{% for m in messages %}{{ m.content }}{% endfor %}"
    export_hf(base(), tmp_path / "first", chat=True)
    (tmp_path / "base" / "chat_template.jinja").write_text(own)
    main(["export", str(tmp_path / "base"), "--chat", "--out", str(tmp_path / "own")])
    kept = "note: --chat: the model's own chat template is kept"
    assert f"{kept} (it does not mark answers with {{% generation %}})\n" in capsys.readouterr().out
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == own
    assert load(tmp_path / "own").config.vocab_size == 300
    main(["export", str(tmp_path / "first"), "--chat", "--out", str(tmp_path / "again")])
    assert f"{kept}\n" in capsys.readouterr().out
    assert load(tmp_path / "again").config.vocab_size == 303


def test_tokens_that_a_tokenizer_has_already_are_used(base, tmp_path):
    """A base model whose tokenizer reserves them has rows for them, which may be trained."""
    folder = base(spare=3)
    content = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    entry = next(token for token in content["added_tokens"] if token["id"] == 299)
    content["added_tokens"] += [{**entry, "id": 300 + number, "content": name} for number, name in enumerate((END, START))]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(content))
    export_hf(folder, tmp_path / "chat", chat=True)
    before, after = load(folder), load(tmp_path / "chat")
    assert after.tokenizer.encode(f"{START}{END}{PAD}", allow_special=True).tolist() == [301, 300, 302]
    old, new = (loaded.state["transformer.wte.weight"] for loaded in (before, after))
    assert torch.equal(new[:302], old[:302])
    torch.testing.assert_close(new[302], old[:302].mean(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "nanogpt"], "--chat: has no effect on the format nanogpt: omit it, or use --format hf"),
        ([], "--chat needs the model's tokenizer"),
    ],
)
def test_what_cannot_have_a_template_is_refused(base, tmp_path, capsys, arguments, message):
    base()
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tmp_path / "base"), "--chat", *arguments, "--out", str(tmp_path / "chat")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "chat").exists()


def test_characters_cannot_have_tokens_for_turns(base, tmp_path):
    with pytest.raises(UserError, match=r"--chat: the char tokenizer cannot have tokens for turns"):
        export_hf(base(tokenizer="char"), tmp_path / "chat", chat=True)


def test_the_card_says_that_the_template_is_not_trained(base, tmp_path):
    export_hf(base(), tmp_path / "chat", chat=True)
    card = (tmp_path / "chat" / "README.md").read_text()
    assert "were added after training" in card
    assert "apply_chat_template" not in card
    assert "This is a base model" in card


def test_new_tokens_come_after_all_others_where_ids_are_missing():
    content = copy.deepcopy(dict(build_tokenizer("byte", ()).content))
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    for entry in added:
        vocabulary[entry["content"]] = entry["id"] = entry["id"] + 4
    before = Tokenizer(content, "gaps", None)
    after = with_chatml(before)
    assert after.extends(before)
    assert after.vocab_size == before.vocab_size + 3
    assert [after.encode(name, allow_special=True).tolist() for name in (START, END, PAD)] == [[261], [262], [263]]
