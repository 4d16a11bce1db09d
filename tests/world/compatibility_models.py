"""Cases of docs/compatibility.md: models that are read and written, compared with transformers."""

import json
import os
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compatibility_tokenizers import WORDS, Code, Run, pair, same_ids
from safetensors.torch import load_file, save_file
from small_tokenizers import library, llama_folder, write
from test_model_configs import GPT2, LLAMA, edit, same_logits, save, tokens
from test_special_tokens import CHATS, TEMPLATE, model_folder

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.export import export_gguf, export_hf, export_nanogpt
from bardling.checkpoint.load import load
from bardling.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from bardling.data.tokens.token_files import read_meta
from bardling.data.tokens.tokenizer import build_tokenizer, load_tokenizer
from bardling.interop.tensor_file import METADATA
from bardling.model.gpt import GPT
from bardling.training.run import train
from model_hub import serve

transformers = pytest.importorskip("transformers")


def reference(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_model(folder: Path, kind: str, change: Callable[[Path], object] = lambda _: None, **options: Any) -> str:
    """A random model that transformers has saved, changed afterwards."""
    save(folder / "model", kind, **options)
    change(folder / "model")
    ours = load(folder / "model").build()
    same_logits(ours, reference(folder / "model"))
    return "read"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a folder."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata=METADATA)


def cast(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda state: {name: value.to(dtype) for name, value in state.items()})


def replace(folder: Path, name: str, data: bytes = b"x") -> None:
    """Put another file in the place of the weights."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)


def shards(folder: Path, missing: bool = False) -> None:
    theirs = reference(folder)
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="10KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    if missing:
        parts[0].unlink()


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 4000)


def other_model(folder: Path, kind: str, **sizes: Any) -> str:
    """A model of an architecture that is not implemented here."""
    config = getattr(transformers, f"{kind}Config")(**{**LLAMA, **sizes})
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder / "model")
    return str(load(folder / "model"))


def trainer_state(gelu: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A GPT-2 of transformers, and its tensors as nanoGPT and nano-gpt store them."""
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, activation_function=gelu)).eval()
    state = {name: transposed(name, value) for name, value in theirs.state_dict().items()}
    return theirs, state


def transposed(name: str, value: torch.Tensor) -> torch.Tensor:
    return value.T.contiguous() if re.search(r"c_(attn|proj|fc)\.weight$", name) else value.clone()


def nanogpt(folder: Path, prefix: str = "", named: str = "ckpt.pt", damage: Any = None, **more: Any) -> str:
    theirs, state = trainer_state("gelu")
    sizes = {**GPT2, "block_size": GPT2["n_positions"], "bias": True, "dropout": 0.0}
    del sizes["n_positions"]
    content = {"model": {prefix + name: value for name, value in state.items()}, "model_args": sizes, "iter_num": 5, **more}
    torch.save(content, folder / "ckpt.pt")
    if damage is not None:
        (folder / "ckpt.pt").write_bytes(damage((folder / "ckpt.pt").read_bytes()))
    same_logits(load(folder / named).build(), theirs)
    return "read"


def nano_gpt(folder: Path) -> str:
    theirs, state = trainer_state("gelu_new")
    sizes = {**{key: GPT2[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}, "block_size": GPT2["n_positions"]}
    torch.save({"model_state_dict": state, "config": sizes, "step": 5}, folder / "checkpoint_000005.bin")
    same_logits(load(folder / "checkpoint_000005.bin").build(), theirs)
    return "read"


KEY, VALUE = b"general.architecture", b"gemma3"
GGUF = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(KEY)) + KEY + struct.pack("<IQ", 8, len(VALUE)) + VALUE
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def gguf_files(folder: Path) -> str:
    for kind in ("GPT2", "Llama", "Qwen3"):
        theirs = save(folder / kind, kind)
        export_gguf(str(folder / kind), folder / f"{kind}.gguf")
        same_logits(load(folder / f"{kind}.gguf").build(), theirs)
    return "read"


def adapter(folder: Path, base: str = "", **options: Any) -> str:
    """A LoRA adapter of PEFT's for a random model; `base`: another name for that model."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)
    save(folder / "base", "Llama")
    theirs = peft.get_peft_model(reference(folder / "base"), lora).eval()
    theirs.save_pretrained(folder / "model")
    if base:
        path = folder / "model" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    same_logits(load(folder / "model").build(), theirs)
    return "read"


def only(folder: Path, name: str, data: bytes = b"x", spec: str = "") -> str:
    """A folder with one file."""
    (folder / "model").mkdir()
    (folder / "model" / name).write_bytes(data)
    return str(load(folder / "model" / spec))


def own_run(folder: Path) -> str:
    """A run of one step; its checkpoint is what transformers opens."""
    (folder / "text.txt").write_text("\n".join(WORDS) * 20)
    config = RunConfig(
        device="cpu",
        compile="off",
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=24),
        data=DataConfig(source=str(folder / "text.txt"), tokenizer="byte", cache=str(folder / "cache")),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(steps=1, batch_size=2),
    )
    train(config, folder / "run", quiet=True)
    checkpoint = folder / "run" / "checkpoints" / "step-000001"
    for path in (folder / "run", checkpoint):
        same_logits(load(path).build(), reference(checkpoint))
    return "read"


def on_the_hub(folder: Path) -> str:
    """The files of a model on a local hub."""
    theirs = save(folder / "model", "Llama")
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    constants = pytest.importorskip("huggingface_hub.constants")
    with pytest.MonkeyPatch.context() as patch, serve(folder, patch, constants) as hub:
        hub.models["user/model"] = {**files, "pytorch_model.bin": b"x"}
        same_logits(load("user/model").build(), theirs)
        assert "pytorch_model.bin" not in hub.fetched
    return "read"


def torch_file(folder: Path, name: str, content: object) -> str:
    torch.save(content, folder / name)
    return str(load(folder / name))


def spoil(folder: Path) -> None:
    rewrite(folder, lambda state: {name: value.clone().fill_(torch.nan) for name, value in state.items()})


MODELS: dict[str, Run] = {
    "GPT-2": partial(hf_model, kind="GPT2"),
    "GPT-2 with an untied head, another MLP width, epsilon and GELU": partial(
        hf_model, kind="GPT2", tie_word_embeddings=False, n_inner=40, layer_norm_epsilon=1e-3, activation_function="gelu"
    ),
    "Llama": partial(hf_model, kind="Llama"),
    "Llama with a tied head and another RoPE base": partial(
        hf_model, kind="Llama", tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 300.0}
    ),
    "Qwen3": partial(hf_model, kind="Qwen3"),
    "Qwen3 with a sliding window in every second layer": partial(
        hf_model,
        kind="Qwen3",
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "weights in several `model-*.safetensors`": partial(hf_model, kind="Llama", change=shards),
    "the same with a missing file": partial(hf_model, kind="Llama", change=partial(shards, missing=True)),
    "a model on the hub: `USER/REPO`": on_the_hub,
    "float16 weights": partial(hf_model, kind="GPT2", change=partial(cast, dtype=torch.float16)),
    "bfloat16 weights": partial(hf_model, kind="Llama", change=partial(cast, dtype=torch.bfloat16)),
    "float64 weights": partial(hf_model, kind="Llama", change=partial(cast, dtype=torch.float64)),
    "`pytorch_model.bin`": partial(hf_model, kind="GPT2", change=partial(replace, name="pytorch_model.bin")),
    "`tf_model.h5`": partial(hf_model, kind="GPT2", change=partial(replace, name="tf_model.h5")),
    "`model.safetensors`, named directly": partial(only, name="model.safetensors", spec="model.safetensors"),
    "model folder without `config.json`": partial(only, name="model.safetensors"),
    "a GGUF file of a GPT-2, Llama or Qwen3": gguf_files,
    "a GGUF file of another architecture": partial(only, name="model.gguf", data=GGUF, spec="model.gguf"),
    "a folder with a GGUF file": partial(only, name="model.gguf", data=GGUF),
    "a model folder whose weights are a GGUF file": partial(
        hf_model, kind="Llama", change=partial(replace, name="model.gguf", data=GGUF)
    ),
    "a LoRA adapter of PEFT, and its base model": adapter,
    "the same with `use_dora`": partial(adapter, use_dora=True),
    "the same without its base model": partial(adapter, base="./gone"),
    "Mistral with a sliding window": partial(other_model, kind="Mistral", sliding_window=8),
    "GPT-NeoX": partial(other_model, kind="GPTNeoX"),
    "Qwen2": partial(other_model, kind="Qwen2"),
    "Gemma 2": partial(other_model, kind="Gemma2"),
    "Mixtral": partial(other_model, kind="Mixtral", num_local_experts=2),
    "Llama with scaled RoPE": partial(hf_model, kind="Llama", change=partial(edit, rope_scaling=SCALED)),
    "Llama with attention biases": partial(hf_model, kind="Llama", attention_bias=True),
    "GPT-2 with `relu`": partial(hf_model, kind="GPT2", activation_function="relu"),
    "GPT-2 with attention scaled by layer": partial(hf_model, kind="GPT2", scale_attn_by_inverse_layer_idx=True),
    "a quantized model": partial(
        hf_model, kind="Llama", change=partial(edit, quantization_config={"quant_method": "gptq", "bits": 4})
    ),
    "`config.json` of another model": partial(hf_model, kind="GPT2", change=partial(edit, n_embd=32)),
    "a truncated `model.safetensors`": partial(hf_model, kind="GPT2", change=truncate),
    "a weight that is NaN": partial(hf_model, kind="GPT2", change=spoil),
    "a run folder, or one of its checkpoints": own_run,
    "nanoGPT's `ckpt.pt`": nanogpt,
    "the folder of a `ckpt.pt`": partial(nanogpt, named=""),
    "a `ckpt.pt` of a compiled model": partial(nanogpt, prefix="_orig_mod."),
    "a truncated `ckpt.pt`": partial(nanogpt, damage=lambda data: data[: len(data) // 2]),
    "a `ckpt.pt` with code in its pickle": partial(nanogpt, config=Code()),
    "nano-gpt's `checkpoint_NNNNNN.bin`": nano_gpt,
    "a `state_dict` in a `.pth` file": lambda folder: torch_file(folder, "model.pth", trainer_state("gelu")[1]),
    "`pytorch_model.bin`, named directly": lambda folder: torch_file(folder, "pytorch_model.bin", trainer_state("gelu")[1]),
    "a whole module, as `torch.save(model)` writes it": lambda folder: torch_file(folder, "model.pt", torch.nn.Linear(2, 2)),
}


# ---- Written: transformers opens the folder and finds what was in the original ----


def notes_of(notes: list[str]) -> str:
    return "; ".join(["written", *(f"note: `` {note} ``" for note in notes)])


def hf_export(folder: Path, kind: str, change: Callable[[Path], object] = lambda _: None, **options: Any) -> str:
    theirs = save(folder / "model", kind, **options)
    change(folder / "model")
    notes = export_hf(str(folder / "model"), folder / "out")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report.values())
    assert type(again) is type(theirs)
    same_logits(load(folder / "model").build(), again.eval())
    return notes_of(notes)


def own_export(folder: Path, export: Callable[..., list[str]] = export_hf, spec: str = "byte", **options: Any) -> str:
    """A model made here."""
    tokenizer = build_tokenizer(spec, ["\n".join(WORDS)])
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": tokenizer.vocab_size}
    config = ModelConfig(**{**sizes, **options})
    model = GPT(config, seed=1).eval()
    (folder / "model").mkdir()
    write_model(folder / "model", config, model.state_dict(), tokenizer)
    notes = export(str(folder / "model"), folder / "out")
    if export is export_hf:
        ids = torch.arange(24)[None] % config.vocab_size
        with torch.no_grad():
            torch.testing.assert_close(reference(folder / "out")(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
        return notes_of(notes)
    assert read_meta(folder / "out" / "meta.pkl")[1].encode(WORDS[0]).tolist() == tokenizer.encode(WORDS[0]).tolist()
    return notes_of(notes)


def nanogpt_export(folder: Path, kind: str = "GPT2", **options: Any) -> str:
    theirs = save(folder / "model", kind, **options)
    notes = export_nanogpt(str(folder / "model"), folder / "out")
    content = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    again = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, activation_function="gelu")).eval()
    again.load_state_dict({name: transposed(name, value) for name, value in content["model"].items()})
    if options.get("activation_function") == "gelu":
        with torch.no_grad():
            torch.testing.assert_close(again(tokens()).logits, theirs(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert {key: content["model_args"][key] for key in ("n_layer", "n_head", "n_embd")}.items() <= GPT2.items()
    return notes_of(notes)


def tokenizer_files(folder: Path, kind: str) -> str:
    source = llama_folder(folder / "model") if kind == "llama" else write(folder / "model", library(kind), eos_token="</s>")
    load_tokenizer(source).save(folder)
    return same_ids(load_tokenizer(source), transformers.AutoTokenizer.from_pretrained(folder)).replace("read", "written")


def kept(
    folder: Path, found: Callable[[Path], Any], file: str = "", content: Any = None, model: Any = None, **config: Any
) -> str:
    """Whether a part of a model folder is the same in the exported one."""
    source = model_folder(llama_folder(folder / "model", **config), {"bos_token_id": 1, "eos_token_id": [2, 5]})
    if file:
        (source / file).parent.mkdir(exist_ok=True)
        (source / file).write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    edit(source, **(model or {}))
    export_hf(str(source), folder / "out")
    before, after = found(source), found(folder / "out")
    assert before not in (None, {}, [], [None])
    if before == after:
        return "written"
    return "not written" if after is None else f"written as {after}"


def tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def field(name: str, key: str, *more: str) -> Callable[[Path], Any]:
    """The value of a key in a JSON file, or the values of several."""

    def get(folder: Path) -> Any:
        values = json.loads((folder / name).read_text())
        return [values.get(each) for each in (key, *more)] if more else values.get(key)

    return get


def chat(folder: Path) -> Any:
    return [tokenizer_of(folder).apply_chat_template(one, tokenize=False) for one in CHATS]


def pair_files(folder: Path) -> str:
    """From a vocab.json and a merges.txt comes a tokenizer.json."""
    pair(folder, theirs="GPT2TokenizerFast")
    ours = load_tokenizer(folder / "model")
    ours.save(folder)
    assert same_ids(ours, tokenizer_of(folder), WORDS[:1]) == "read"
    return f"written as {', '.join(f'`{path.name}`' for path in sorted(folder.glob('*.*')))}"


WRITTEN: dict[str, Run] = {
    "GPT-2": partial(hf_export, kind="GPT2"),
    "GPT-2 with an untied head and another MLP width": partial(hf_export, kind="GPT2", tie_word_embeddings=False, n_inner=40),
    "Llama": partial(hf_export, kind="Llama"),
    "Qwen3": partial(hf_export, kind="Qwen3"),
    "Qwen3 with a sliding window in every second layer": partial(
        hf_export,
        kind="Qwen3",
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "a GPT-2 with three different dropouts": partial(hf_export, kind="GPT2", resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.2),
    "a GPT-2 without biases": partial(own_export, bias=False),
    "a vocabulary padded to a multiple of 64": partial(own_export, vocab_multiple=64),
    "a model that transformers does not implement": partial(own_export, family="qwen3", mlp="relu2"),
    "a model without a tokenizer": partial(hf_export, kind="GPT2", change=lambda f: (f / "tokenizer.json").unlink()),
    "an existing folder": partial(hf_export, kind="GPT2", change=lambda folder: (folder.parent / "out").mkdir()),
    "nanoGPT's `ckpt.pt` from a GPT-2 with the exact GELU": partial(nanogpt_export, activation_function="gelu"),
    "nanoGPT's `ckpt.pt` from a GPT-2 with the tanh GELU": nanogpt_export,
    "nanoGPT's `ckpt.pt` from a GPT-2 with an untied head": partial(nanogpt_export, tie_word_embeddings=False),
    "nanoGPT's `ckpt.pt` from a Llama": partial(nanogpt_export, kind="Llama"),
    "nanoGPT's `meta.pkl` of characters": partial(own_export, export=export_nanogpt, spec="char", gelu="erf"),
    "tokenizer files: byte-level BPE": partial(tokenizer_files, kind="byte-level"),
    "tokenizer files: BPE with `<s>` from the post-processor": partial(tokenizer_files, kind="llama"),
    "tokenizer files: Unigram": partial(tokenizer_files, kind="unigram"),
    "tokenizer files of a `vocab.json` and a `merges.txt`": pair_files,
    "names of the tokens bos, eos and unk": partial(kept, found=lambda folder: tokenizer_of(folder).special_tokens_map),
    "the pad token": partial(kept, found=lambda folder: tokenizer_of(folder).pad_token_id, pad_token="<unk>"),
    "`bos_token_id`, and several `eos_token_id`": partial(kept, found=field("config.json", "bos_token_id", "eos_token_id")),
    "a chat template in `tokenizer_config.json`": partial(kept, found=chat, chat_template=TEMPLATE.replace("\\r", "")),
    "a chat template in `chat_template.jinja`": partial(kept, found=chat, file="chat_template.jinja", content=TEMPLATE),
    "several chat templates": partial(
        kept,
        found=lambda folder: tokenizer_of(folder).chat_template,
        chat_template=[{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "{{ messages }}"}],
    ),
    "`special_tokens_map.json`": partial(
        kept,
        found=field("special_tokens_map.json", "pad_token"),
        file="special_tokens_map.json",
        content={"pad_token": "<unk>"},
    ),
    "`generation_config.json`, with settings of others": partial(
        kept,
        found=lambda folder: json.loads((folder / "generation_config.json").read_text()),
        file="generation_config.json",
        content={"eos_token_id": [2, 7], "temperature": 0.6, "my_setting": 3},
    ),
    "`model_max_length`": partial(kept, found=lambda folder: tokenizer_of(folder).model_max_length, model_max_length=48),
    "other settings in `tokenizer_config.json`": partial(
        kept, found=field("tokenizer_config.json", "padding_side", "my_setting"), padding_side="left", my_setting=3
    ),
    "other settings in `config.json`": partial(kept, found=field("config.json", "my_setting"), model={"my_setting": 3}),
    "the dtype of the weights": partial(kept, found=field("config.json", "dtype"), model={"dtype": "bfloat16"}),
}
