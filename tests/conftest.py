"""Fixtures of every test, and the devices that numeric tests run on."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest
import torch
from covering import covering
from emulator import runtime
from emulator.replace import pythons_node
from helpers import CPU_LEVELS

import frozen_bn
from frozen_bn import node as nodes

#: Besides the CPU: the CUDA kernels in an emulator, and on a GPU where there is one.
ACCELERATORS = ["emulated"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def walk_through_new_objects_only() -> None:
    """What a file before has imported and kept is no garbage of this one: with it, each collection
    took seconds, and there were hundreds."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.freeze()  # pytest is about to collect garbage ten times over


def pytest_configure(config: pytest.Config) -> None:
    text = "with each instruction set of this machine, where `device` is the CPU"
    config.addinivalue_line("markers", f"every_cpu_level: {text}")
    text = "of its rows, so many that any n values of parameters meet in one; the rest are `long`"
    config.addinivalue_line("markers", f"covering(n): {text}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        every_level = metafunc.definition.get_closest_marker("every_cpu_level")
        cpu = CPU_LEVELS if every_level else ["cpu"]
        metafunc.parametrize("device", [*cpu, *ACCELERATORS], indirect=True)
    if "node" in metafunc.fixturenames:
        metafunc.parametrize("node", ["compiled", "python"], indirect=True)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """There are no float64 kernels to emulate: frozen_bn runs plain PyTorch for it on CUDA. And it
    is Python's node that finds the emulator."""

    def parameters(item: pytest.Item) -> dict[str, object]:
        return item.callspec.params if hasattr(item, "callspec") else {}

    def emulates_nothing(item: pytest.Item) -> bool:
        given = parameters(item)
        others = (given.get("dtype") == torch.float64, given.get("node") == "compiled")
        return given.get("device") == "emulated" and any(others)

    for item in items:
        emulated = parameters(item).get("device") == "emulated"
        if emulated and item.get_closest_marker("long_emulated"):
            item.add_marker(pytest.mark.long)

    config.hook.pytest_deselected(items=[item for item in items if emulates_nothing(item)])
    items[:] = [item for item in items if not emulates_nothing(item)]
    mark_what_others_cover(items)


def mark_what_others_cover(items: list[pytest.Item]) -> None:
    """As `long`."""
    products: dict[object, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering"):
            products.setdefault((item.parent, item.originalname), []).append(item)
    for rows in products.values():
        (strength,) = rows[0].get_closest_marker("covering").args
        soon = [row for row in rows if not row.get_closest_marker("long")]
        chosen = covering(([*row.callspec.params.values()] for row in soon), strength)
        for row in {*soon} - {soon[number] for number in chosen}:
            row.add_marker(pytest.mark.long)


@functools.cache
def the_emulator(wide: bool = False) -> runtime.Emulator:
    """One a process; with ``wide``, of kernels forced to 64-bit index arithmetic. Skips the test
    where there is none."""
    if not runtime.available():
        pytest.skip("needs a CUDA toolkit (nvcc)")
    return runtime.Emulator(runtime.build(wide=wide))


@pytest.fixture
def emulator() -> runtime.Emulator:
    return the_emulator()


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the whole test over one autograd node."""
    if request.param == "compiled":
        if nodes.compiled is None:
            pytest.skip(nodes.why_not)
        yield request.param
    else:
        with pythons_node():
            yield request.param


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the whole test on one device; new tensors are made there."""
    if request.param == "emulated":
        with the_emulator().active():
            yield request.param
    elif request.param == "cuda":
        # In float32, as they are compared: TensorFloat-32 has the digits of half precision.
        with torch.backends.cudnn.flags(allow_tf32=False), torch.device("cuda"):
            yield request.param
    else:
        best = CPU_LEVELS[-1]
        frozen_bn._C.select_cpu_level(best if request.param == "cpu" else request.param)
        yield request.param
        frozen_bn._C.select_cpu_level(best)
