"""The program of one process: train small models in several layouts, and write what happened as JSON.

    torchrun --nproc-per-node 4 layout_program.py CASES.json RESULTS.json

Each case names a layout, a model and an optimizer; `case_config` and `steps` are also what the tests compare with.
"""

import gc
import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from bardling.config import ModelConfig, OptimConfig
from bardling.data.batches.loader import Batch
from bardling.distributed.context import SINGLE, Context, distributed
from bardling.distributed.device import Precision
from bardling.planning.layout import Layout
from bardling.training.build import Assembly, Execution, build
from bardling.training.objective import NextToken
from bardling.training.step import StepSettings, seed_dropout, train_step

STEPS, SEQUENCES, LENGTH, VOCABULARY = 20, 8, 32, 101
SEED = 3


def assemble(case: dict, context: Context) -> Assembly:
    """The model and optimizer of a case, at step 0."""
    family = case.get("family", "gpt2")
    options = {"bias": True} if family == "gpt2" else {"n_kv_head": 2}
    model = ModelConfig(
        family=family,
        n_layer=2,
        n_head=4,
        n_embd=case.get("width", 48),
        block_size=LENGTH,
        vocab_size=VOCABULARY,
        vocab_multiple=case.get("vocab_multiple", 1),
        tied=case.get("tied", True),
        dropout=case.get("dropout", 0.0),
        **options,
    )
    optim = OptimConfig(name=case.get("optim", "adamw"), lr=1e-2, muon_precision="float32", ema_decay=0.9)
    execution = Execution(
        Precision(case.get("precision", "float32"), "", "cpu"),
        compiled=case.get("compiled", False),
        recompute=case.get("recompute", False),
        reshard=case.get("reshard", True),
    )
    return build(model, optim, execution, context, seed=SEED)


def whole(assembly: Assembly, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named by parameters, whole. Collective."""
    shards = assembly.state.shards
    found = tensors if shards is None else {name: shards.gather(name, tensor) for name, tensor in tensors.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of all bytes."""
    parts = b"".join(name.encode() + tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(parts).hexdigest()


def live_bytes() -> int:
    """Bytes of the storages of all tensors of this process."""
    gc.collect()
    storages = {}
    for tensor in (item for item in gc.get_objects() if issubclass(type(item), Tensor)):  # asks no item for its class
        local = getattr(tensor, "_local_tensor", tensor)
        if local.is_meta:
            continue
        if type(local) in (Tensor, nn.Parameter):  # the compiler's own have no memory
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def train(case: dict, context: Context) -> dict:
    """Train for some steps; losses, gradient norms, weights and memory."""
    before = live_bytes()
    assembly = assemble(case, context)
    state = assembly.state
    state.model.train()
    result = {"initial": digest(whole(assembly, state.parameters)), "losses": [], "norms": []}
    precision = Precision(case.get("precision", "float32"), "", "cpu")
    accumulates = case.get("whole_gradients", False)
    settings = StepSettings(NextToken(), precision, context, grad_clip=0.5, whole_gradients=accumulates)
    generator = torch.Generator().manual_seed(0)
    for step in range(case.get("steps", STEPS)):
        tokens = torch.randint(
            VOCABULARY // 4, (SEQUENCES, LENGTH + 1), generator=generator
        )  # of few ids, which is learnt fast
        own = tokens.chunk(context.data_size)[context.data_rank]
        passes = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in own.chunk(2)]
        seed_dropout(SEED, step, context.dropout_rank)
        found = train_step(state, passes, settings, forward=assembly.forward, lr=1e-2)
        assert state.ema is not None
        state.ema.update(step)
        result["losses"].append(found.loss.item())
        result["norms"].append(found.grad_norm.item())
        result["memory"] = live_bytes() - before
    saved = state.saved()
    result["saved"] = sum(
        tensor.nbytes for tensors in (saved.model_state, saved.optimizer_tensors) for tensor in tensors.values()
    )
    result["scale"] = None if state.scaler is None else state.scaler.get_scale()
    result["weights"] = [float(tensor.double().sum()) for tensor in whole(assembly, state.parameters).values()]
    result["averages"] = [float(tensor.double().sum()) for tensor in whole(assembly, state.ema.tensors()).values()]
    return result


def main(cases: Path, results: Path) -> None:
    """Run every case in all processes together; the first one writes the results of all ranks."""
    torch.set_num_threads(1)
    with distributed("cpu") as context:
        found = []
        for case in json.loads(cases.read_text()):
            own = train(case, context.arranged(Layout(*case["layout"])))
            ranks: list[dict | None] = [None] * context.world_size
            torch.distributed.all_gather_object(ranks, own)
            found.append(ranks)
        if context.is_primary:
            results.write_text(json.dumps(found))


def alone(case: dict) -> dict:
    """The same in one process."""
    return train({**case, "compiled": False}, SINGLE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
