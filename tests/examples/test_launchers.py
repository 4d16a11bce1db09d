"""Slurm, SkyPilot and Kubernetes start the same command; a stand-in for torchrun records what each of them asks for."""

import os
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = '#!/bin/bash\nprintf "%s\\n" "$@" > "$LOGS/torchrun.log"\n'
SRUN = '#!/bin/bash\nshift\nexec "$@"\n'
SCONTROL = "#!/bin/bash\necho node7; echo node8\n"


def asked(folder, script, environment, *argv):
    """The arguments of torchrun."""
    for name, text in (("torchrun", TORCHRUN), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "LOGS": str(folder)}
    done = subprocess.run([*script, *argv], env={**os.environ, **path, **environment}, timeout=60, check=True)
    assert done.returncode == 0
    return (folder / "torchrun.log").read_text().splitlines()


@pytest.fixture
def launched(tmp_path):
    """What each launcher asks torchrun for, with the same recipe, folder and options on two nodes of eight GPUs."""
    found = {}
    slurm = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    script = ["bash", str(EXAMPLES / "slurm" / "train.sbatch")]
    found["slurm"] = asked(tmp_path, script, slurm, "gpt2-xl", "/shared/a", "--parallel.layout", "fsdp")

    task = yaml.safe_load((EXAMPLES / "skypilot" / "train.yaml").read_text())
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": str(task["num_nodes"])}
    sky |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "sky-31"}
    own = {"RECIPE": "gpt2-xl", "RUN": "/shared/a", "OPTIONS": "--parallel.layout fsdp"}
    assert own.keys() == task["envs"].keys()
    found["skypilot"] = asked(tmp_path, ["bash", "-c", task["run"]], {**sky, **own})

    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes" / "train.yaml").read_text()))
    service, job = documents
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]} | own
    found["kubernetes"] = asked(tmp_path, container["command"], variables)
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    return found


def test_all_launchers_start_the_same_command(launched):
    places = ("--rdzv-endpoint=", "--rdzv-id=")
    commands = {name: [item for item in found if not item.startswith(places)] for name, found in launched.items()}
    assert commands["slurm"] == commands["skypilot"] == commands["kubernetes"]
    assert commands["slurm"][:2] == ["--nnodes=2", "--nproc-per-node=8"]
    assert commands["slurm"][-7:] == ["bardling", "train", "gpt2-xl", "--out", "/shared/a", "--parallel.layout", "fsdp"]


def test_each_meets_at_its_first_node(launched):
    ends = {name: next(item for item in found if item.startswith("--rdzv-endpoint=")) for name, found in launched.items()}
    assert ends == {
        "slurm": "--rdzv-endpoint=node7:20031",
        "skypilot": "--rdzv-endpoint=10.0.0.1:29400",
        "kubernetes": "--rdzv-endpoint=bardling-0.bardling:29400",
    }
