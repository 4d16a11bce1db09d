"""What a run writes down about its surroundings: the machine and versions of each start, and the data it trains on."""

import json
import platform
import subprocess
import sys
import time
from typing import Any

import torch

import bardling
from bardling.checkpoint.runfolder import RunFolder
from bardling.data.shards import TokenDataset
from bardling.distributed.context import Context
from bardling.distributed.device import device_name
from bardling.errors import UserError


def dataset_record(dataset: TokenDataset) -> str:
    """JSON that lets a resumed run check that it reads the same data."""
    facts = {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "train_tokens": len(dataset.split("train")),
        "val_tokens": len(dataset.split("val")),
    }
    return json.dumps(facts, indent=2) + "\n"


def check_dataset(dataset: TokenDataset, folder: RunFolder) -> None:
    """Refuse to go on with other data than the run began with."""
    before = folder.dataset_record()
    if before.get("fingerprint") != dataset.fingerprint:
        raise UserError(
            f"{dataset.path}: is not the dataset that {folder.path} began with (fingerprint {dataset.fingerprint}, was "
            f"{before.get('fingerprint')}): restore the data, or start a new run"
        )


def environment_facts(context: Context, step: int) -> dict[str, Any]:
    """Facts about this start of the run that explain its figures later."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": step,
        "bardling": bardling.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(context.device),
        "processes": context.world_size,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _git_commit() -> str | None:
    """The commit of the folder that the command was given in, if it is a git checkout."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
