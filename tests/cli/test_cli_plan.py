import subprocess
import sys
from pathlib import Path

import pytest

from bardling.cli.plan import run
from bardling.errors import UserError

GPT2 = """
[model]
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50257
bias = false

[train]
batch_size = 480
micro_batch = 12
steps = 600_000
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "gpt2[red].toml"  # brackets are markup in rich
    path.write_text(GPT2)
    return str(path)


@pytest.mark.parametrize("columns", [80, 120])
def test_numbers_are_not_truncated(
    recipe: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    run([recipe, "--gpu", "A100-40GB", "--gpus", "8", "--mfu", "0.3", "--dataset_tokens", "9.0e9"])
    text = capsys.readouterr().out
    for figure in ("124,337,664", "84,953,088", "874,944,921,600", "491,520", "1.49 GB", "312 TFLOP/s", "3d21h", "32.8"):
        assert figure in text, figure
    assert "[red]" in text.replace("\n", "")
    assert "…" not in text


def test_overrides_budget_and_sweep(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([recipe, "--gpu", "H100-SXM", "--model.n_layer", "24", "--budget_hours", "10", "--sweep"])
    text = capsys.readouterr().out
    assert "24 layers" in text
    assert "The budget is enough for" in text
    assert "1e26" in text


def test_a_device_outside_the_table_needs_its_peak(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--gpu Imaginary: unknown device"):
        run([recipe, "--gpu", "Imaginary"])
    run([recipe, "--gpu", "Imaginary", "--peak_tflops", "100", "--memory_gb", "2"])
    text = capsys.readouterr().out
    assert "100 TFLOP/s" in text
    assert "as given" in text
    assert "does not fit" in text


def test_an_ambiguous_device_is_an_error(recipe: str) -> None:
    with pytest.raises(UserError, match="H100-SXM or H100-PCIe or H100-NVL"):
        run([recipe, "--gpu", "h100"])


def test_this_machine_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    run(["quickstart", "--device", "cpu", "--precision", "float32"])
    assert "measured just now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no recipe given"),
        (["quickstart", "--gpu", "L4", "--memory_gb", "-1"], "memory_gb"),
        (["quickstart", "--mfuu", "1"], "--mfu"),
    ],
)
def test_errors_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(argv)
    assert "\n" not in str(error.value)


def test_a_named_device_needs_no_torch(recipe: str) -> None:
    code = "import sys; from bardling.cli import plan; plan.run(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, recipe, "--gpu", "L4"], check=True, stdout=subprocess.DEVNULL)
