"""The sizes of the device mesh, which planning knows without torch."""

import subprocess
import sys

import pytest

from bardling.config import ModelConfig, ParallelConfig
from bardling.config.recipes import load_recipe
from bardling.errors import UserError
from bardling.planning.activations import ActivationBytes
from bardling.planning.layout import (
    AXES,
    DATA_AXES,
    Layout,
    check_pipeline,
    choose_layout,
    frees_weights,
    idle_fraction,
    sharded_bytes,
    stage_layers,
    stage_of,
)
from bardling.planning.memory import MemoryPlan
from bardling.planning.plan import plan


def test_sizes_are_in_the_order_of_the_axes():
    sizes = {"replicate": 2, "shard": 3, "tensor": 5, "pipeline": 7, "context": 11}
    layout = Layout(**sizes)
    assert dict(zip(AXES, layout.sizes, strict=True)) == sizes
    assert layout.world_size == 2 * 3 * 5 * 7 * 11
    assert layout.data_size == 2 * 3
    assert set(DATA_AXES) < set(AXES)


def test_unused_axes_have_size_one():
    assert (Layout().sizes, Layout().world_size, Layout().data_size) == ((1, 1, 1, 1, 1), 1, 1)
    assert Layout(tensor=4).data_size == 1


def test_planning_imports_no_torch():
    code = (
        "import importlib, pkgutil, sys, bardling.planning as planning\n"
        "for module in pkgutil.iter_modules(planning.__path__): importlib.import_module(f'bardling.planning.{module.name}')\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def given(processes, **sizes):
    return choose_layout(ParallelConfig(**sizes), processes, processes, None, None)[0].sizes


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({"pipeline": 8}, (1, 1, 1, 8)),
        ({"pipeline": 2}, (4, 1, 1, 2)),
        ({"pipeline": 2, "replicate": 4}, (4, 1, 1, 2)),
        ({"pipeline": 2, "layout": "fsdp"}, (1, 4, 1, 2)),
        ({"pipeline": 2, "shard": 2}, (2, 2, 1, 2)),
    ],
)
def test_a_pipeline_leaves_the_other_processes_to_the_data(sizes, layout):
    assert given(8, **sizes) == Layout(*layout).sizes


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"pipeline": 3}, "a multiple of 3 processes, but there are 8: nearest possible: --parallel.pipeline 2"),
        ({"pipeline": 4, "replicate": 4}, "nearest possible: --parallel.pipeline 2"),
        ({"pipeline": 16}, "nearest possible: --parallel.pipeline 8"),
    ],
)  # fmt: skip
def test_a_pipeline_must_divide_the_processes(sizes, problem):
    with pytest.raises(UserError, match=problem):
        given(8, **sizes)


@pytest.mark.parametrize(
    ("layout", "model", "problem"),
    [
        (Layout(pipeline=4), {"n_layer": 3}, "n_layer = 3: nearest possible: --parallel.pipeline 2 --parallel.replicate 2"),
        (Layout(pipeline=2), {"tied": True}, "the head is tied to the embedding, .*: set --model.tied False, or leave"),
        (Layout(pipeline=2), {"value_embeddings": 1}, "set model.value_embeddings = 0, or leave"),
        (Layout(shard=2, pipeline=2), {}, "nearest possible: --parallel.shard 1 --parallel.replicate 2"),
        (Layout(tensor=2, pipeline=2), {}, "nearest possible: --parallel.tensor 1 --parallel.replicate 2"),
    ],
)  # fmt: skip
def test_impossible_pipelines_name_the_nearest_possible(layout, model, problem):
    with pytest.raises(UserError, match=problem):
        check_pipeline(ModelConfig(**{"n_layer": 4, "n_head": 2, "n_embd": 8, "vocab_size": 9, "tied": False, **model}), layout)


def test_stages_are_as_even_as_possible():
    assert stage_layers(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    assert stage_layers(2, 2) == [range(1), range(1, 2)]
    names = ("transformer.wte", "transformer.wpe", "transformer.h.3.ln_1", "transformer.ln_f", "lm_head")
    assert [stage_of(f"{name}.weight", 7, 3) for name in names] == [0, 0, 1, 2, 2]


def test_a_pipeline_fills_and_drains():
    assert [idle_fraction(4, passes) for passes in (1, 3, 12)] == [0.75, 0.5, 0.2]


def test_gathered_weights_are_freed_between_passes_if_they_do_not_fit():
    needed = MemoryPlan(weights=400, gradients=400, optimizer=800, activations=ActivationBytes(100, 0, 0, 0), trained=400)
    assert sharded_bytes(needed, Layout(shard=4)) == 500
    assert sharded_bytes(needed, Layout(shard=4), whole_weights=True) == 800
    assert sharded_bytes(needed, Layout(shard=4), whole_weights=True, whole_gradients=True) == 1100

    def frees(memory, whole_gradients=False, **settings):
        return frees_weights(ParallelConfig(**settings), Layout(shard=4), needed, memory, whole_gradients=whole_gradients)

    assert [frees(memory) for memory in (880, 900, None)] == [True, False, True]
    assert frees(900, whole_gradients=True)
    assert frees(10_000, offload=True)
    assert frees(10_000, reshard=True)
    assert not frees(10, reshard=False)


def test_a_plan_shards_what_does_not_fit_on_a_device():
    config = load_recipe("gpt2-xl")
    one = plan(config, device_name="RTX-4090")
    eight = plan(config, world_size=8, device_name="RTX-4090")
    assert any("does not fit" in note for note in one.notes)
    assert str(eight.layout) == "FSDP2 (shard 8)"
    assert not any("does not fit" in note for note in eight.notes)
    assert eight.batch.data_size == 8
    assert eight.flops_per_second == pytest.approx(8 * one.flops_per_second)
