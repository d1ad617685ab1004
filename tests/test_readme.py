"""What README.md and CONTRIBUTING.md tell people to do, and to look for, is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize_

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

pytestmark = pytest.mark.skipif(not PAGES[0].exists(), reason="away from the sources")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[0].read_text(), re.DOTALL)


def test_python_in_the_readme_runs_as_printed():
    torchvision = pytest.importorskip("torchvision")
    checkpoint = torchvision.models.resnet50().state_dict()
    x, identity = torch.randn(2, 2, 4, 8, 8).unbind()
    names = {
        "torch": torch,
        "torchvision": torchvision,
        "model": randomize_(torchvision.models.resnet18()),
        "checkpoint": checkpoint,
        "images": torch.randn(1, 3, 64, 64),
        "x": x,
        "identity": identity,
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
    }
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    torch.testing.assert_close(names["y"], torch.relu(x / (1 + 1e-5) ** 0.5 + identity))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_targets_that_are_named_exist(page):
    text = page.read_text()
    targets = re.findall(r"^([a-z-]+)[:%]", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.MULTILINE):
        assert next(filter(None, target)) in targets
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert (ROOT / "tests" / name).exists(), name
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        assert any(
            (ROOT / module.replace(".", "/")).with_suffix(s).exists() for s in (".py", "")
        ), module


def test_the_import_is_cheap():
    """Of processor time, beyond that of torch: under 100 ms."""
    code = (
        "import time, torch\n"
        "start = time.process_time()\n"
        "import frozen_bn\n"
        "print(time.process_time() - start)"
    )
    tries = (
        float(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
        for _ in range(3)
    )
    assert any(seconds < 0.1 for seconds in tries)  # no more of them than it takes
