"""What a run records about its environment: the machine and versions of each start, and the data it trains on."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import torch

from bardling.checkpoint.run_folder import RunFolder
from bardling.config import RunConfig
from bardling.data.tokens.corpus import Corpus
from bardling.data.tokens.shards import TokenDataset
from bardling.distributed.context import Context
from bardling.distributed.device import device_name
from bardling.files.reading import read_json_object


def dataset_record(dataset: TokenDataset) -> str:
    """JSON that lets a resumed run verify that it reads the same data."""
    facts = _dataset_facts(dataset)
    if isinstance(dataset, Corpus):
        facts["sources"] = [{"name": part.name, **_dataset_facts(part.dataset)} for part in dataset.train]
        if dataset.val != dataset.train:
            facts["validation"] = [_dataset_facts(part.dataset) for part in dataset.val]
    return json.dumps(facts, indent=2) + "\n"


def _dataset_facts(dataset: TokenDataset) -> dict[str, Any]:
    return {
        "path": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "split_rule": dataset.manifest.source.get("split_rule", 1),
        "train_documents": dataset.manifest.train.documents,
        "train_tokens": len(dataset.split("train")),
        "val_tokens": len(dataset.split("val")),
    }


def environment_facts(context: Context, step: int, fingerprint: str, continues: str | None = None) -> dict[str, Any]:
    """Facts about this start of the run that explain its metrics later.

    Args:
        fingerprint: `config_fingerprint` of the settings as the user gave them.
        continues: another trainer's checkpoint that the run continues, if it has none of its own yet.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": step,
        "bardling": version("bardling"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(context.device),
        "processes": context.world_size,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": sys.argv,
        "jobs": job_ids(),
        "asked": fingerprint,
        "continues": continues,
    }


def recorded_starts(folder: RunFolder) -> list[dict[str, Any]]:
    """The facts of every start of the run, in order; a start whose record is damaged is empty."""
    starts = read_json_object(folder.environment_file).get("starts") if folder.environment_file.is_file() else None
    return [start if isinstance(start, dict) else {} for start in starts] if isinstance(starts, list) else []


def continued_checkpoint(folder: RunFolder) -> str | None:
    """The checkpoint of another trainer that a run was started to continue; it matters until the run has its own."""
    checkpoint = next((start.get("continues") for start in recorded_starts(folder)), None)
    return checkpoint if isinstance(checkpoint, str) else None


def job_ids() -> list[str]:
    """Names of the job that this process belongs to; they stay the same when torchrun or Slurm restarts the command."""
    slurm, elastic = os.environ.get("SLURM_JOB_ID"), os.environ.get("TORCHELASTIC_RUN_ID")
    names = [f"slurm {slurm}"] if slurm else []
    if elastic:  # without --rdzv-id, torchrun calls every job "none"; its process id identifies it instead
        names.append(f"torchrun {elastic}" if elastic != "none" else f"torchrun {platform.node()} {os.getppid()}")
    return names


def config_fingerprint(config: RunConfig) -> str:
    """A hash of the configuration as the user gave it, before `auto` is resolved."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:16]


def started_by_this_job(folder: RunFolder, fingerprint: str) -> bool:
    """Whether this job started the run in `folder` with the same settings; the same command then continues it.

    A Slurm job may run a command twice on purpose, so this applies to it only after a requeue.
    """
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    jobs = {name for name in job_ids() if restarted or not name.startswith("slurm ")}
    if not jobs or not folder.config_file.is_file():
        return False
    return any(
        start.get("asked") == fingerprint and jobs.intersection(start.get("jobs") or ()) for start in recorded_starts(folder)
    )


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
