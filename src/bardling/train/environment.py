"""What a run writes down about its surroundings: the machine and versions of each start, and the data it trains on."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import bardling
from bardling.checkpoint.runfolder import RunFolder, read_json
from bardling.config import RunConfig
from bardling.configfile import config_to_toml
from bardling.data.shards import TokenDataset
from bardling.distributed.context import Context
from bardling.distributed.device import device_name
from bardling.errors import UserError


def dataset_record(dataset: TokenDataset) -> str:
    """JSON that lets a resumed run check that it reads the same data."""
    facts = {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "train_documents": dataset.manifest.train.documents,
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


def environment_facts(context: Context, step: int, asked: str, continues: str | None = None) -> dict[str, Any]:
    """Facts about this start of the run that explain its figures later.

    Args:
        asked: `asked_fingerprint` of its settings.
        continues: the checkpoint that the run goes on with, if it has none of its own yet.
    """
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
        "jobs": job_ids(),
        "asked": asked,
        "continues": continues,
    }


def continued_checkpoint(folder: RunFolder) -> str | None:
    """The checkpoint with which a run went on that was begun so; it matters for as long as the run has none of its own."""
    if not folder.environment_file.is_file():
        return None
    starts = read_json(folder.environment_file).get("starts")
    first = starts[0] if isinstance(starts, list) and starts else None
    found = first.get("continues") if isinstance(first, dict) else None
    return found if isinstance(found, str) else None


def job_ids() -> list[str]:
    """Names of the job that this process belongs to, which stay when torchrun or Slurm starts the same command again."""
    slurm, elastic = os.environ.get("SLURM_JOB_ID"), os.environ.get("TORCHELASTIC_RUN_ID")
    names = [f"slurm {slurm}"] if slurm else []
    if elastic:  # without --rdzv-id torchrun calls every job "none"; the one that started this process is known by its number
        names.append(f"torchrun {elastic}" if elastic != "none" else f"torchrun {platform.node()} {os.getppid()}")
    return names


def asked_fingerprint(config: RunConfig) -> str:
    """A short name of what was asked for, before anything was decided."""
    return hashlib.sha256(config_to_toml(config).encode()).hexdigest()[:16]


def began_by_this_job(path: Path, asked: str) -> bool:
    """Whether `path` holds a run that this same job began with the same settings: starting it again means to go on with it.

    A Slurm job may start a command twice by intention; it counts only after a requeue.
    """
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    jobs = {name for name in job_ids() if restarted or not name.startswith("slurm ")}
    folder = RunFolder(path)
    if not jobs or not folder.config_file.is_file() or not folder.environment_file.is_file():
        return False
    starts = read_json(folder.environment_file).get("starts")
    return isinstance(starts, list) and any(
        isinstance(start, dict) and start.get("asked") == asked and jobs.intersection(start.get("jobs") or ())
        for start in starts
    )


def _git_commit() -> str | None:
    """The commit of the folder that the command was given in, if it is a git checkout."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
