"""What README.md, CONTRIBUTING.md and docs/ tell people to do, and to look for, is there."""

from __future__ import annotations

import doctest
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize_

import frozen_bn
from frozen_bn import convert

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]

pytestmark = pytest.mark.skipif(not README.exists(), reason="away from the sources")


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_is_read_in_two_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 140
    assert len(text.split()) <= 900


@pytest.fixture
def names():
    """What the pages take for granted."""
    torchvision = pytest.importorskip("torchvision")
    checkpoint = torchvision.models.resnet50().state_dict()
    model = randomize_(torchvision.models.resnet18())
    x, identity = torch.randn(2, 2, 64, 8, 8).unbind()
    bn = model.layer1[0].bn2
    vectors = ("running_mean", "running_var", "weight", "bias")
    return {
        "torch": torch,
        "torchvision": torchvision,
        "model": model,
        "checkpoint": checkpoint,
        "images": torch.randn(1, 3, 64, 64),
        "bn": bn,
        "x": x,
        "identity": identity,
    } | {name: getattr(bn, name) for name in vectors}


@pytest.mark.parametrize("page", [README, DOCS / "guide.md"], ids=lambda page: page.name)
def test_python_runs_as_printed(page, names, capsys):
    """And the last `y` is what the layer computes, followed by a sum and ReLU."""
    assert len(blocks(page)) >= 3
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
    bn, x, identity = (names[name] for name in ("bn", "x", "identity"))
    torch.testing.assert_close(names["y"], torch.relu(bn.eval()(x) + identity))
    assert "frozen, merged with add + relu" in capsys.readouterr().out


def test_help_of_the_converter_fits_a_screen_and_a_half():
    text = pydoc.plain(pydoc.render_doc(frozen_bn.convert_frozen_bn))
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines()[3:])) <= 104  # below the signature
    tried = doctest.testmod(convert)
    assert tried.attempted >= 5 and tried.failed == 0


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
    for name in re.findall(r"`((?:csrc|docs|examples|frozen_bn|tests)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def anchors(page: Path) -> set[str]:
    """Of its headings, as mkdocs and viewers of repositories spell them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    """mkdocs checks those of docs/ too, but not what is in HTML."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_documentation_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text()
    for name in set(frozen_bn.__all__) - {"reference"}:
        assert f'id="frozen_bn.{name}"' in api, name


def test_every_figure_of_the_front_page_is_one_of_the_results():
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import published
    finally:
        sys.path.remove(str(ROOT))
    h100 = published.figures("Whole networks, H100", "ResNet-50")
    cpu = published.figures("Whole networks", "MobileNetV2")
    resnet50 = published.figures("Whole networks", "ResNet-50")
    peak = published.figures("Memory", "peak of a step")
    ours, theirs = "frozen_bn, fuse=True", "torchvision's FrozenBatchNorm2d"
    live = "BN in eval()"
    figure = r"(?<!Python )(?<!PyTorch )\b\d\.\d\d\b|(?<=\s)\d{3}(?=\s)"
    figures = re.findall(figure, README.read_text())
    known = {f"{value:.2f}" for column in (h100, cpu, resnet50) for value in column.values()}
    known |= {f"{value:.0f}" for value in peak.values()}
    assert {f"{h100[ours]:.2f}", f"{cpu[ours]:.2f}", f"{peak[ours]:.0f}"} <= {*figures}
    assert {f"{h100[theirs]:.2f}", f"{cpu[live]:.2f}", f"{peak[live]:.0f}"} <= {*figures}
    assert {*figures} <= known
    made = {f"{name}-{theme}.png" for name in published.DRAWINGS for theme in ("light", "dark")}
    assert made == {path.name for path in (DOCS / "images").glob("*.png")}


def test_workflows_name_actions_by_hash_and_targets_that_exist():
    yaml = pytest.importorskip("yaml")
    targets = re.findall(r"^([a-z-]+)[:%]", (ROOT / "Makefile").read_text(), re.MULTILINE)
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [file.stem for file in files] == ["ci", "nightly", "publish", "wheels"]
    for file in files:
        jobs = yaml.safe_load(file.read_text())["jobs"].values()
        for step in (step for job in jobs for step in job.get("steps", [])):
            if action := step.get("uses"):
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
            for target in re.findall(r"^make ([a-z-]+)$", step.get("run", ""), re.MULTILINE):
                assert target in targets
            for script in re.findall(r"bash (\S+)", step.get("run", "")):
                assert (ROOT / script).exists(), script


def test_the_changelog_is_of_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text()
    found = re.search(r"^## \[([\d.]+)\] - (\S+)$", changes, re.MULTILINE)
    assert found is not None and found[1] == frozen_bn.__version__
    assert found[2] == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", found[2])


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
