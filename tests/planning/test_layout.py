"""The sizes of the device mesh, which planning knows without torch."""

import subprocess
import sys

from bardling.planning.layout import AXES, DATA_AXES, Layout


def test_sizes_are_in_the_order_of_the_axes():
    layout = Layout(replicate=2, shard=3, tensor=5, pipeline=7)
    assert dict(zip(AXES, layout.sizes, strict=True)) == {"replicate": 2, "shard": 3, "tensor": 5, "pipeline": 7}
    assert layout.world_size == 2 * 3 * 5 * 7
    assert layout.data_size == 2 * 3
    assert set(DATA_AXES) < set(AXES)


def test_unused_axes_have_size_one():
    assert (Layout().sizes, Layout().world_size, Layout().data_size) == ((1, 1, 1, 1), 1, 1)
    assert Layout(tensor=4).data_size == 1


def test_planning_imports_no_torch():
    code = (
        "import importlib, pkgutil, sys, bardling.planning as planning\n"
        "for module in pkgutil.iter_modules(planning.__path__): importlib.import_module(f'bardling.planning.{module.name}')\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
