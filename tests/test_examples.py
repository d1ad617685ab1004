"""Every script in examples/ runs, for a step or two, and does what it says."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

FOLDER = Path(__file__).parent.parent / "examples"
WORLD = 2

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="away from the sources")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process, where torch is imported already; returns what it prints.
    Nothing is downloaded: the statistics that it freezes are those of new layers, and it warns."""

    def run(name: str, options: str, *, warns: bool = True) -> str:
        monkeypatch.setattr("sys.argv", [name, *options.split()])
        path = str(FOLDER / name)
        if warns:
            with pytest.warns(UserWarning, match="never trained"):
                runpy.run_path(path, run_name="__main__")
        else:
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", output)]


def test_examples_are_short_and_each_is_run_here():
    scripts = sorted(FOLDER.glob("*.py"))
    assert len(scripts) == 6
    for script in scripts:
        assert len(script.read_text().splitlines()) < 60, script.name
        assert f'"{script.name}"' in Path(__file__).read_text(), script.name


def test_cuda_graphs(run):
    pytest.importorskip("torchvision")
    output = run("cuda_graphs.py", "--weights none --batch 2 --size 32 --steps 2 --amp")
    assert "steps/s on" in output


def test_finetune_resnet(run):
    pytest.importorskip("torchvision")
    output = run("finetune_resnet.py", "--model resnet18 --weights none --size 32 --steps 8")
    assert "20 frozen, 0 skipped" in output and "two branches + relu" in output
    found = losses(output)
    assert len(found) == 8 and min(found[4:]) < found[0]


def test_train_faster_rcnn(run):
    pytest.importorskip("torchvision")
    model = "fasterrcnn_mobilenet_v3_large_320_fpn"
    output = run("train_faster_rcnn.py", f"--model {model} --weights none --size 64 --steps 2")
    assert len(losses(output)) == 2
    assert re.search(r"^\d+ boxes found$", output, re.MULTILINE)


def test_freeze_and_thaw(run):
    pytest.importorskip("torchvision")
    options = "--epochs 3 --freeze 1 --thaw 2 --steps 1 --size 32"
    output = run("freeze_and_thaw.py", options, warns=False)
    epochs = re.findall(r"^epoch \d: (\w+), .* moved ([\d.]+)$", output, re.MULTILINE)
    classes, moved = zip(*epochs, strict=True)
    assert classes == ("BatchNorm2d", "FrozenBatchNorm2d", "BatchNorm2d")
    assert [float(distance) > 0 for distance in moved] == [True, False, True]


def test_export_onnx(run, tmp_path):
    for needed in ("torchvision", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    file = tmp_path / "model.onnx"
    output = run("export_onnx.py", f"--weights none --size 32 --output {file}")
    assert "0 normalization layers left" in output
    error = re.search(r"onnxruntime differs by (\S+)", output)
    assert error is not None and float(error[1]) < 1e-4
    assert file.exists()


def train_as_rank(rank: int, port: int, folder: Path) -> None:
    """What torchrun does: a process a rank, with these variables. What it prints is in a file."""
    torch.set_num_threads(1)  # or it may hang, forked from a process that used several
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{WORLD}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    script = FOLDER / "timm_ddp_ema.py"
    sys.argv = [script.name, "--model", "resnet18", "--size", "32", "--steps", "2"]
    with (folder / f"{rank}").open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_timm_ddp_ema(tmp_path):
    pytest.importorskip("timm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, they need not import everything again; but CUDA does not outlive a fork.
    method = "spawn" if torch.cuda.is_available() else "fork"
    context = mp.start_processes(
        train_as_rank, (port, tmp_path), WORLD, join=False, daemon=True, start_method=method
    )
    assert context is not None
    deadline = time.monotonic() + 300  # where the machine is busy
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline
    finally:
        for process in context.processes:
            process.kill()
    outputs = [(tmp_path / f"{rank}").read_text() for rank in range(WORLD)]
    for rank, output in enumerate(outputs):
        assert f"rank {rank}: statistics moved by 0.0" in output
    assert len(losses(outputs[0])) == 2
