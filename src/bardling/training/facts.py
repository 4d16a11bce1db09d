"""What the decisions of `resolve` depend on besides the configuration: the data, earlier starts of the run, and the machine.

Each fact is looked up once, when it is first needed. The primary process measures for all, so that all processes decide alike.
"""

import os
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from bardling.checkpoint.contents import Checkpoint
from bardling.checkpoint.load import Loaded, latest_checkpoint, load
from bardling.checkpoint.run_folder import RunFolder
from bardling.config import DataConfig, RunConfig
from bardling.data.tokens.corpus import open_corpus, reopen_corpus
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.distributed.context import Context
from bardling.distributed.device import bfloat16_speedup, compiler_problem, free_memory, matmul_flops
from bardling.distributed.heartbeat import LONG_PATIENCE, UNLIMITED_PATIENCE
from bardling.planning.layout import Layout
from bardling.training.environment import continued_checkpoint
from bardling.training.shared_folder import require_same_tokens


@dataclass
class Facts:
    context: Context
    folder: RunFolder
    resumed: bool = False
    continue_from: str | None = None  # another trainer's checkpoint, whose training the run continues
    given: AbstractSet[str] | None = None  # dotted names of settings the user gave; None: those that differ from the default
    started_at: float = field(default_factory=time.monotonic)  # when this start began (s), for `train.deadline`
    _datasets: dict[DataConfig, TokenDataset] = field(default_factory=dict)
    _loaded: dict[str, Loaded] = field(default_factory=dict)
    _arranged: dict[Layout, Context] = field(default_factory=dict)

    @cached_property
    def previous(self) -> RunConfig | None:
        """The configuration with which a resumed run has trained: its checkpoint's, because config.toml can be edited."""
        if self.checkpoint is not None:
            return self.folder.trained_config(self.checkpoint.training["step"])
        return self.folder.config() if self.resumed else None

    def dataset(self, data: DataConfig, context: int = 0) -> TokenDataset:
        """The dataset; conversations are packed for a `context` (tokens).

        If it has to be prepared first, one process prepares it and the others wait.

        Raises:
            UserError: the data does not exist, is damaged, or is not the data that the resumed run started with.
        """
        data = data.without_weights()
        if data not in self._datasets:
            self.context.activity("preparing the data", UNLIMITED_PATIENCE)
            record = self.folder.dataset_record() if self.previous else {}
            if self.previous and data.source != self.previous.data.source:  # the user names a place where the data is now
                record.pop("path", None)
            if self.previous:
                found = reopen_corpus(data, record, self.folder.path, context=context)
            else:
                found = open_corpus(data, context=context)
            require_same_tokens(self.context, found)
            self._datasets[data] = found
            self.context.activity("setting up", LONG_PATIENCE)
        return self._datasets[data]

    def arranged(self, layout: Layout) -> Context:
        """The context with the mesh of a layout, which all processes form together once."""
        if layout not in self._arranged:
            self._arranged[layout] = self.context.arranged(layout)
        return self._arranged[layout]

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The latest valid checkpoint of a resumed run; None if it stopped before its first one."""
        return latest_checkpoint(self.folder, self.context) if self.resumed else None

    @cached_property
    def origin(self) -> str | None:
        """The checkpoint of another trainer whose training the run continues."""
        return self.continue_from or (continued_checkpoint(self.folder) if self.resumed else None)

    @cached_property
    def continued(self) -> str | None:
        """The same, as long as the run has no checkpoint of its own."""
        return None if self.origin is None or self.checkpoint is not None else str(Path(self.origin).absolute())

    def start(self, init: str) -> Loaded | None:
        """The weights to start from: the checkpoint to continue, else `init`; None if the run has a checkpoint of its own."""
        origin = self.continued or init
        if not origin or self.checkpoint is not None:
            return None
        if origin not in self._loaded:
            self._loaded[origin] = load(origin, training=bool(self.continued))
        return self._loaded[origin]

    @cached_property
    def own_tokenizer(self) -> Tokenizer | None:
        return load_tokenizer(self.folder.path) if self.resumed and (self.folder.path / "tokenizer.json").is_file() else None

    @cached_property
    def processes_per_node(self) -> int:
        """How many processes share a machine, as torchrun says."""
        stated = os.environ.get("LOCAL_WORLD_SIZE", "")
        return int(stated) if stated.isdecimal() and int(stated) else self.context.world_size

    @cached_property
    def device_memory(self) -> int | None:
        """Memory of the smallest device of all (bytes); of a CPU, a process's share of what is free. None: unknown."""
        device = self.context.device
        if device.type == "cuda":
            size: int | None = torch.cuda.get_device_properties(device).total_memory
        else:
            free = free_memory(device)
            size = None if free is None else free // self.processes_per_node
        smallest = -self.context.largest(-(0 if size is None else size >> 20))  # megabytes
        return (smallest << 20) or None

    def bfloat16_speedup(self, device: torch.device) -> float:
        return self.context.on_primary(lambda: bfloat16_speedup(device))

    def matmul_flops(self, device: torch.device, dtype: torch.dtype) -> float:
        return self.context.on_primary(lambda: matmul_flops(device, dtype))

    def compiler_problem(self, device: torch.device, *, compiles: bool) -> str | None:
        """Why compilation fails in any process that compiles; None if it works. Each process tries on its own machine."""
        self.context.activity("compiling for the first time", LONG_PATIENCE)
        problem = compiler_problem(device) if compiles else None
        failed = self.context.any(problem is not None)
        self.context.activity("setting up", LONG_PATIENCE)
        return problem or ("it fails in another process" if failed else None)
