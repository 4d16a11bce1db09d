"""Metrics logged to TensorBoard and Weights & Biases, read back from the files that these libraries write."""

import functools
import json
import math
import os
import struct
import subprocess
import sys
import time
from importlib.metadata import EntryPoint

import pytest

from bardling import extensions
from bardling.config import MonitorConfig, RunConfig
from bardling.config.recipes import config_to_dict, config_to_toml
from bardling.errors import UserError
from bardling.extensions import SINKS
from bardling.monitor import RunInfo
from bardling.monitor import services as services_module
from bardling.monitor.records import TaskRecord, TrainRecord, ValRecord
from bardling.monitor.services import Services, check_services
from bardling.monitor.tensorboard import TensorBoardSink
from bardling.monitor.wandb import WandbSink


def run_info(folder, step=0, report=lambda text: None, **monitor):
    config = RunConfig(monitor=MonitorConfig(**monitor))
    return RunInfo(folder, step, config.monitor, config_to_dict(config), config_to_toml(config), report)


def train_record(step, loss=None):
    """A record whose loss identifies the step."""
    return TrainRecord(
        step=step,
        loss=1.0 / step if loss is None else loss,
        bits_per_byte=2.0 / step,
        lr=1e-3,
        grad_norm=0.5,
        epoch=0.1,
        tokens=64 * step,
        tokens_per_second=1000.0,
        mfu=None,
        memory_bytes=10**8,
        seconds_left=3.0,
        time=1.7e9 + step,
    ).as_dict()


def task_record(step, task):
    return TaskRecord(step, task, {"acc": 0.5}, items=7).as_dict()


def val_record(step):
    return ValRecord(step, 3.0 / step, 4.0 / step, 20.0, True).as_dict()


# --- TensorBoard


@pytest.fixture
def read_events():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        return events

    return read


def test_tensorboard_has_every_metric_at_its_step(tmp_path, read_events):
    sink = TensorBoardSink(run_info(tmp_path))
    for step in (1, 2, 3):
        sink.log(train_record(step))
    sink.log(val_record(3))
    for task in ("one", "two"):
        sink.log(task_record(3, task))
    sink.sample(3, "To be", [" or not\n```\n# no heading"])
    sink.close()
    events = read_events(tmp_path / "tensorboard")
    expected = {f"train/{name}" for name in train_record(1)} | {f"val/{name}" for name in val_record(3)}
    expected |= {f"task/{task}/{name}" for task in ("one", "two") for name in ("acc", "items")}
    expected -= {"train/kind", "train/step", "train/time", "val/kind", "val/step"}
    assert set(events.Tags()["scalars"]) == expected
    assert [(event.step, event.wall_time) for event in events.Scalars("train/loss")] == [(s, 1.7e9 + s) for s in (1, 2, 3)]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([1.0, 0.5, 1 / 3])
    assert [(event.step, event.value) for event in events.Scalars("val/best")] == [(3, 1.0)]
    [sample] = events.Tensors("sample/1/text_summary")
    text = sample.tensor_proto.string_val[0].decode()
    assert sample.step == 3
    assert text == "    To be or not\n    ```\n    # no heading"
    [config] = events.Tensors("config/text_summary")
    assert "[model]" in config.tensor_proto.string_val[0].decode()


def test_tensorboard_shows_the_config_as_hyperparameters(tmp_path, read_events):
    from tensorboard.plugins.hparams import plugin_data_pb2

    TensorBoardSink(run_info(tmp_path)).close()
    data = read_events(tmp_path / "tensorboard").SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
    assert found["optim.lr"].number_value == RunConfig().optim.lr
    assert found["device"].string_value == "auto"
    assert found["optim.betas"].string_value == str(list(RunConfig().optim.betas)), "only plain types are allowed"
    assert found["cuda_graphs"].bool_value == RunConfig().cuda_graphs


def test_tensorboard_drops_steps_after_the_checkpoint_on_resume(tmp_path, read_events):
    first = TensorBoardSink(run_info(tmp_path))
    for step in range(1, 8):
        first.log(train_record(step, loss=100.0 + step))
    first.close()
    resumed = TensorBoardSink(run_info(tmp_path, step=4))  # from the checkpoint of step 4
    for step in range(5, 10):
        resumed.log(train_record(step, loss=200.0 + step))
    resumed.close()
    losses = [(event.step, event.value) for event in read_events(tmp_path / "tensorboard").Scalars("train/loss")]
    assert losses == [(s, 100.0 + s) for s in range(1, 5)] + [(s, 200.0 + s) for s in range(5, 10)]


# --- Weights & Biases


def wandb_rows(folder):
    """Rows of all offline logs of a run folder, in order: [{name: value}], and the header records.

    A service process writes the logs, on a busy machine even after the client has finished: waits for their last record.
    """
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    logs, end = list(folder.glob("wandb/offline-run-*/*.wandb")), time.monotonic() + 60
    while time.monotonic() < end and not all(_complete(path.read_bytes(), pb) for path in logs):
        time.sleep(0.1)
    rows, runs = [], []
    for path in sorted(logs, key=lambda path: path.stat().st_mtime_ns):
        for record in _records(path.read_bytes(), pb):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
            if kind == "run":
                runs.append(record.run)
    return rows, runs


def _complete(data, pb):
    """Whether a log ends with the record that closes the run."""
    from google.protobuf.message import DecodeError

    try:
        return len(data) > 7 and any(record.WhichOneof("record_type") == "exit" for record in _records(data, pb))
    except (DecodeError, struct.error):  # half a record
        return False


def _records(data, pb):
    """The protocol buffers in a log in LevelDB's format: 32 KiB blocks of chunks (checksum, length, kind)."""
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            return
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            yield pb.Record.FromString(parts)
            parts = b""


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A function that makes the `RunInfo` of an offline run; the working directory is another folder and stays empty."""
    pytest.importorskip("wandb")
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    yield functools.partial(run_info, run, wandb="offline", wandb_project="plays")
    assert list(elsewhere.iterdir()) == []


def test_wandb_has_every_metric_at_its_step(offline):
    messages = []
    info = offline(report=messages.append)
    run, sink = info.folder, WandbSink(info)
    for step in (1, 2):
        sink.log(train_record(step))
    sink.log(val_record(2))
    for task in ("one", "two"):
        sink.log(task_record(2, task))
    sink.sample(2, "To be", [" or not"])
    sink.log(train_record(3, loss=math.nan))
    sink.close()
    rows, [header] = wandb_rows(run)
    for row, record in zip(rows[:3], [train_record(1), train_record(2), val_record(2)], strict=True):
        kind = record["kind"]
        expected = {f"{kind}/{name}": value for name, value in record.items() if name not in ("kind", "step")}
        assert {name: value for name, value in row.items() if not name.startswith("_")} == {**expected, "step": record["step"]}
    found = [(row["step"], row[f"task/{task}/acc"]) for row, task in zip(rows[3:5], ("one", "two"), strict=True)]
    assert found == [(2, 0.5)] * 2
    assert rows[5]["step"] == 2
    assert rows[6]["train/loss"] == "NaN" or math.isnan(rows[6]["train/loss"])
    table = json.loads(next(run.glob("wandb/offline-run-*/files/media/table/*.json")).read_text())
    assert table["data"] == [[2, "To be", " or not"]]
    assert (header.project, header.display_name) == ("plays", "run")
    settings = {item.key: json.loads(item.value_json) for item in header.config.update}
    assert settings["model"]["n_layer"] == RunConfig().model.n_layer
    assert len(messages) == 1
    assert "wandb sync" in messages[0]


def test_wandb_resumes_the_same_record_and_sends_nothing_twice(offline):
    info = offline()
    first = WandbSink(info)
    for step in range(1, 8):
        first.log(train_record(step))
    first.log(val_record(5))
    first.close()
    resumed = WandbSink(info)  # from the checkpoint of step 4
    for step in range(5, 10):
        resumed.log(train_record(step))
    for step in (5, 10):
        resumed.log(val_record(step))
    resumed.close()
    rows, headers = wandb_rows(info.folder)
    assert len(headers) == 2
    assert len({header.run_id for header in headers}) == 1
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 10))
    assert [row["step"] for row in rows if "val/loss" in row] == [5, 10]
    assert [row["_step"] for row in rows] == list(range(len(rows)))  # W&B accepts rows in increasing order only


def test_a_damaged_record_of_the_run_id_is_named(offline):
    info = offline()
    for text in ("{", '{"id": "../x", "rows": 0, "done": {}}', '{"id": "abc", "rows": "1", "done": {}}', "[]"):
        (info.folder / "wandb.json").write_text(text)
        with pytest.raises(UserError, match=r"wandb\.json: is damaged: remove it"):
            WandbSink(info)


def in_a_fresh_process(code, tmp_path, **env):
    """Run code in a process without the user's API keys and with empty standard input."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    clean |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), **env}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=clean,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )


def test_online_without_a_key_is_one_line_and_no_prompt(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "from bardling.config import MonitorConfig\n"
        "from bardling.errors import UserError\n"
        "from bardling.monitor.services import check_services\n"
        "try: check_services(MonitorConfig(wandb='online'))\n"
        "except UserError as error: print(error)\n"
    )
    done = in_a_fresh_process(code, tmp_path)
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert "no API key" in done.stdout
    assert "--monitor.wandb offline" in done.stdout


def test_an_unreachable_server_keeps_the_record_in_the_run_folder(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    code = (
        "from pathlib import Path\n"
        "from bardling.config import MonitorConfig\n"
        "import bardling.monitor.wandb as module\n"
        "from bardling.monitor import RunInfo\n"
        "from bardling.monitor.services import Services\n"
        "module.INIT_SECONDS = 2.0\n"
        "services = Services(RunInfo(Path('run'), 0, MonitorConfig(wandb='online'), {}, '', print))\n"
        "services.log({'kind': 'train', 'step': 1, 'loss': 2.5})\n"
        "services.close()\n"
    )
    # A local port on which nothing listens.
    done = in_a_fresh_process(code, tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be reached") == 1
    rows, _ = wandb_rows(tmp_path / "run")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 2.5)]


# --- both


@pytest.mark.parametrize(
    ("package", "config"), [("tensorboard", MonitorConfig(tensorboard=True)), ("wandb", MonitorConfig(wandb="offline"))]
)
def test_a_missing_package_names_the_extra(package, config, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(UserError, match=rf"pip install 'bardling\[{package}\]'"):
        check_services(config)


class _Failing:
    """A service whose calls fail from the second one on."""

    title, package = "TensorBoard", "tensorboard"

    def __init__(self, run):
        self.records = []

    def log(self, record):
        if self.records:
            raise OSError("network\nis down")
        self.records.append(record)

    def close(self):
        raise AssertionError("a service that failed must not be used again")


def test_a_service_that_fails_is_reported_once_and_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(services_module, "SERVICES", (_Failing,))
    messages = []
    services = Services(run_info(tmp_path, report=messages.append, tensorboard=True))
    for step in (1, 2, 3):
        services.log(train_record(step))
    services.close()
    assert len(messages) == 1
    assert "TensorBoard failed" in messages[0]
    assert "network is down" in messages[0]


class _Broken:
    """A sink of an extension: only the methods of `Sink`, which fail."""

    def __init__(self, run):
        if run.step:
            raise RuntimeError("no server")

    def log(self, record):
        raise RuntimeError("no server")


@pytest.mark.parametrize("step", [0, 3], ids=["logging", "opening"])
def test_a_sink_of_an_extension_that_fails_is_reported_by_its_name(tmp_path, monkeypatch, step):
    monkeypatch.setitem(SINKS._registered, "mine", _Broken)
    messages = []
    services = Services(run_info(tmp_path, step, report=messages.append, sinks=("mine",)))
    services.log(train_record(1))
    services.log(train_record(2))
    (message,) = messages
    assert message.startswith("the sink 'mine' failed")
    assert message.endswith("no server")


def test_a_sink_whose_package_cannot_be_imported_is_found_before_the_run_starts(monkeypatch):
    point = EntryPoint("broken", "no_such_package:Sink", "bardling.sinks")
    monkeypatch.setattr(extensions, "entry_points", lambda **query: [point])
    with pytest.raises(UserError, match=r"monitor.sinks = 'broken': no_such_package:Sink cannot be loaded"):
        check_services(MonitorConfig(sinks=("broken",)))


def test_a_service_that_cannot_start_does_not_stop_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file is in the way")
    messages = []
    services = Services(run_info(tmp_path, report=messages.append, tensorboard=True))
    services.log(train_record(1))
    services.close()
    assert len(messages) == 1


def test_without_services_nothing_is_made(tmp_path):
    services = Services(run_info(tmp_path))
    services.log(train_record(1))
    services.sample(1, "", ["text"])
    services.flush()
    services.close()
    assert list(tmp_path.iterdir()) == []
