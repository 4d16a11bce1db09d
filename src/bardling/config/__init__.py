"""Every setting of a run: one file per section, composed in `RunConfig`.

What belongs here: frozen dataclasses whose fields document their unit and default, checks within and between sections,
architecture families, and reading and writing recipes (TOML). What does not: anything that needs the dataset, the device or
torch (see `training/resolve.py`). Importing this package imports nothing heavy, so `bardling --help` starts fast.
"""

from bardling.config.checkpoint import CheckpointConfig as CheckpointConfig
from bardling.config.data import DataConfig as DataConfig
from bardling.config.data import SourceConfig as SourceConfig
from bardling.config.eval import EvalConfig as EvalConfig
from bardling.config.guard import GuardConfig as GuardConfig
from bardling.config.model import ModelConfig as ModelConfig
from bardling.config.monitor import MonitorConfig as MonitorConfig
from bardling.config.optim import OptimConfig as OptimConfig
from bardling.config.parallel import ParallelConfig as ParallelConfig
from bardling.config.run import RunConfig as RunConfig
from bardling.config.sample import SampleConfig as SampleConfig
from bardling.config.train import TrainConfig as TrainConfig
from bardling.config.tune import TuneConfig as TuneConfig
