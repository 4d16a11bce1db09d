"""AdamW is PyTorch's, without the import of its compiler."""

import subprocess
import sys

import torch
from torch import nn

from bardling.optim.adamw import AdamW

WITHOUT_COMPILER = """
import sys
import torch
from bardling.config import OptimConfig
from bardling.optim.build import build_optimizer
for name in ("adamw", "muon"):
    model = torch.nn.ModuleDict({"h": torch.nn.ModuleList([torch.nn.Linear(4, 4)]), "wte": torch.nn.Embedding(4, 4)})
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(name=name), torch.device("cpu"))
    optimizer.zero_grad()
    (model["h"][0](model["wte"](torch.arange(4))) ** 2).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules, "torch.distributed.tensor" in sys.modules)
"""


def test_optimizers_do_not_import_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_updates_are_those_of_pytorch() -> None:
    weights = []
    for made in (AdamW, torch.optim.AdamW):
        weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = made([weight], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        for step in range(5):
            weight.grad = torch.sin(weight.detach() + step)
            optimizer.step()
        optimizer.step(lambda: 0.0)
        weights.append(weight.detach())
    assert torch.equal(*weights)
