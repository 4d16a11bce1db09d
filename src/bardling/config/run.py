"""A complete run: its general settings and one section for each part of the system."""

from dataclasses import dataclass, field
from typing import Literal

from bardling.config.checkpoint import CheckpointConfig
from bardling.config.checks import require_storable
from bardling.config.data import DataConfig
from bardling.config.eval import EvalConfig
from bardling.config.guard import GuardConfig
from bardling.config.model import ModelConfig
from bardling.config.monitor import MonitorConfig
from bardling.config.optim import OptimConfig
from bardling.config.parallel import ParallelConfig
from bardling.config.sample import SampleConfig
from bardling.config.train import TrainConfig
from bardling.config.tune import TuneConfig
from bardling.errors import UserError


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    seed: int = 1337
    """Random seed of initial weights, data order, dropout and samples."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'; auto: the fastest available."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of matrix multiplications (autocast); auto: the fastest that is reliable on the device. Weights stay float32."""
    fp8: bool = False
    """Train the linear layers of blocks in float8 and everything else in bfloat16; needs an NVIDIA Ada, Hopper or newer GPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile; auto: only if the run is long enough to make up for the compilation time."""
    cuda_graphs: bool = False
    """Replay compiled passes as CUDA graphs, for small models where the GPU waits for the CPU; doubles gradient memory."""
    attention: Literal["auto", "fa3", "fa4"] = "auto"
    """Attention kernels on CUDA: PyTorch's own, FlashAttention 3 (Hopper) or 4 (Hopper, Blackwell), installed separately."""
    deterministic: bool = False
    """On CUDA, use only deterministic kernels (slower). CPU runs are always deterministic."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        require_storable(vars(self))
        if self.fp8 and self.precision not in ("auto", "bfloat16"):
            raise UserError(
                f"fp8 = True with precision = {self.precision!r}: fp8 needs bfloat16 for everything else; leave one of them out"
            )
        if self.tune.lora_rank and (self.fp8 or self.optim.name == "muon"):
            setting = "fp8 = True" if self.fp8 else "optim.name = 'muon'"
            raise UserError(f"tune.lora_rank = {self.tune.lora_rank} with {setting}: adapters do not support it; leave it out")
        if self.cuda_graphs and self.compile == "off":
            raise UserError("cuda_graphs = True with compile = 'off': CUDA graphs require compiled code; leave one of them out")
        if self.attention != "auto" and self.model.dropout:
            raise UserError(
                f"attention = {self.attention!r} with model.dropout = {self.model.dropout:g}: these kernels do not support "
                "dropout; leave one of them out"
            )
        # With model.depth, these values are not derived yet.
        ramps = not self.model.depth and self.train.batch_doublings + self.train.context_doublings(self.model.block_size)
        if ramps and self.train.deadline is not None:
            raise UserError(
                f"train.deadline = {self.train.deadline!r} leaves the number of steps open, but the stages of "
                "train.batch_start and train.context_start depend on it: set train.steps instead, or leave these out"
            )
        if self.train.deadline is not None and any(isinstance(start, float) for start in self.data.stages):
            raise UserError(
                f"data.stages = {list(self.data.stages)} with train.deadline = {self.train.deadline!r}: the number of steps is "
                "open, so give the stages as numbers of samples"
            )
        end = self.optim.decay_steps
        fixed = self.train.deadline is None and not self.model.depth  # a deadline sets the steps once their speed is known
        if fixed and end is not None and self.optim.schedule != "constant" and self.optim.warmup_steps >= end:
            raise UserError(
                f"optim.warmup_steps = {self.optim.warmup_steps} leaves no step for the decay, which ends at step {end}: "
                f"lower it to at most {end - 1}, or raise optim.decay_steps"
            )
