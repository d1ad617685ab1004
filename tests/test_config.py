"""What `python -m frozen_bn` tells a user in trouble to do next. Its table: test_operators.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frozen_bn import config, node, ops

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
H100, A10 = (9, 0), (8, 6)


@pytest.fixture
def machine(monkeypatch):
    """Makes believe: which halves are live, and why not; what was built; which GPUs there are."""

    def pretend(
        *,
        live: tuple[str, ...] = ("cpu", "cuda"),
        unavailable: dict[str, str] | None = None,
        architectures: str = "9.0+PTX",
        why: str = "that of the GPU here",
        gpus: tuple[tuple[int, int], ...] = (),
        why_no_node: str = "",
    ) -> None:
        monkeypatch.setattr(ops, "live", set(live))
        monkeypatch.setattr(ops, "unavailable", unavailable or {})
        monkeypatch.setattr(config, "_built", lambda: {"architectures": architectures, "why": why})
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(node, "why_not", why_no_node)

    return pretend


def the_only(paragraphs: list[str]) -> str:
    (paragraph,) = paragraphs
    return paragraph


def test_nothing_to_do_where_all_is_well(machine):
    machine(gpus=(H100,))
    assert config.advice() == []
    machine(live=("cpu",), unavailable={"cuda": "not built"})  # and no GPU
    assert config.advice() == []


def test_source_folder_with_nothing_compiled(tmp_path):
    (tmp_path / "setup.py").touch()
    text = config._without_kernels(tmp_path / "frozen_bn")
    assert "source folder" in text and "python -P" in text and "make build" in text


@pytest.mark.parametrize("compiler", [None, "/usr/bin/c++"])
def test_installed_without_kernels(tmp_path, machine, monkeypatch, compiler):
    monkeypatch.setattr(config.shutil, "which", lambda name: compiler)
    machine(live=(), unavailable={"cpu": "cannot import name '_C'"})
    text = config._without_kernels(tmp_path)
    assert ("install a C++ compiler (g++)" in text) == (compiler is None)
    assert REBUILD in text


def test_kernels_that_do_not_load(tmp_path, machine):
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    machine(live=(), unavailable={"cpu": "undefined symbol: aoti_torch_x"})
    text = config._without_kernels(tmp_path)
    assert "undefined symbol" in text and "cpython-39" in text and "torch 2.10" in text
    assert REBUILD in text


def test_no_kernels_is_the_only_trouble_told(machine):
    machine(live=(), unavailable={"cpu": "no", "cuda": "no"}, why_no_node="no", gpus=(H100,))
    assert "kernels" in the_only(config.advice()) or "source folder" in the_only(config.advice())


def test_cuda_half_that_was_not_built(machine):
    why = "no CUDA toolkit (nvcc) found"
    machine(live=("cpu",), unavailable={"cuda": "not built"}, gpus=(H100,), why=why)
    text = the_only(config.advice())
    assert why in text and "CUDA toolkit 13" in text and f"FORCE_CUDA=1 {REBUILD}" in text
    machine(live=("cpu",), unavailable={"cuda": "not built"}, gpus=(H100,), why="FROZEN_BN_CUDA=0")
    assert "unset it" in the_only(config.advice())


def test_cuda_half_that_does_not_load(machine):
    missing = "libcudart.so.12: cannot open shared object file"
    machine(live=("cpu",), unavailable={"cuda": missing}, gpus=(H100,))
    assert missing in the_only(config.advice()) and REBUILD in the_only(config.advice())


@pytest.mark.parametrize(
    ("gpu", "architectures", "runs"),
    [
        (H100, "9.0", True),
        (A10, "8.0", True),  # code of the same major version
        (A10, "8.9;9.0+PTX", False),
        (A10, "7.5+PTX;9.0", True),  # PTX of an earlier one
        ((12, 0), "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX", True),
        ((10, 3), "9.0;9.0a+PTX", True),
        (A10, "Hopper", True),  # a name: not known to be wrong
    ],
)
def test_a_gpu_that_nothing_was_compiled_for(machine, gpu, architectures, runs):
    machine(gpus=(gpu,), architectures=architectures)
    if runs:
        assert config.advice() == []
    else:
        assert f"TORCH_CUDA_ARCH_LIST=8.6 {REBUILD}" in the_only(config.advice())


def test_autograd_node_for_another_torch(machine):
    machine(why_no_node="the compiled one is for torch 2.13")
    text = the_only(config.advice())
    assert "torch 2.13" in text and "Results are the same" in text and REBUILD in text
    machine(why_no_node="FROZEN_BN_NODE=0")  # as asked for
    assert config.advice() == []


def test_the_command_is_in_the_documentation():
    page = Path(__file__).parent.parent / "docs" / "install.md"
    if not page.exists():
        pytest.skip("away from the sources")
    assert config.REBUILD in page.read_text()
