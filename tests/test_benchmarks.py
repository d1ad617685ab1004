"""The benchmarks, on tiny cases: what they save and print, and what counts as worse."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy
import pytest
import torch

tool = pytest.importorskip(
    "benchmarks.__main__",
    reason="needs pandas and timm, and the repository's root as cwd",
)
from torchvision.models.resnet import BasicBlock  # noqa: E402

from benchmarks import cases, compare, model, model_peers, op, peers, rows  # noqa: E402
from benchmarks.timing import Plan  # noqa: E402

CASE = cases.Case("fp32", "contiguous", "residual+relu", (1, 8, 4, 4))
SETTINGS = op.Settings(torch.device("cpu"), Plan(0.01, 3, 3), compiled=False)
TYPES = {
    "benchmark": str, "operation": str, "dtype": str, "layout": str, "shape": list, "mode": str,
    "contender": str, "role": str, "seconds": dict, "ratios": dict, "over_floor": dict,
    "unavoidable_bytes": int, "device": str, "threads": int, "machine": str, "torch": str,
    "frozen_bn": str, "python": str,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick_rounds():
    """A millisecond each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.timing._ROUND_SECONDS", 1e-3)
        yield


@pytest.fixture(scope="module")
def found():
    """Rows of one layer, in all modes."""
    return op.bench(CASE, SETTINGS)


ABOUT = rows.environment("cpu") | {"inplace_followers": False, "other_load": 0.01}


def report(found: list[rows.Row], tmp_path) -> str:
    """What would be printed of them."""
    rows.save(found, ABOUT, tmp_path / "rows.json")
    return tool.report(rows.load(tmp_path / "rows.json"), ABOUT, False)


def table(text: str, title: str) -> dict[str, dict[str, str]]:
    """The cells of the table whose title contains the words, by line and column."""
    part = text[text.index(title) :].split("\n\n")[1]
    head, _, *lines = ([c.strip() for c in line[1:-1].split("|")] for line in part.splitlines())
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


@pytest.fixture
def records(found, tmp_path):
    """As they are in the file."""
    file = tmp_path / "rows.json"
    rows.save(found, ABOUT, file)
    return json.loads(file.read_text())


def test_every_mode_times_every_contender(found):
    names = set(peers.names("cpu", compiled=False))
    assert {"torchvision", "timm", "batch_norm", "detectron2", peers.LIVE} < names
    for mode in cases.MODES:
        assert {row.contender for row in found if row.mode == mode} == names


def test_rows_of_the_file(records):
    for record in records:
        for name, type_ in TYPES.items():
            assert isinstance(record[name], type_), name
        for figures in (record["seconds"], record["over_floor"], *record["ratios"].values()):
            assert figures.keys() == {"median", "q20", "q80"}
            assert figures["q20"] <= figures["median"] <= figures["q80"]
        assert "commit" in record
        if record["role"] == "ours":
            assert record["ratios"][peers.OURS] == {"median": 1, "q20": 1, "q80": 1}


def test_peers_compute_the_same():
    for operation in ("plain", "relu", "residual+relu"):
        case = cases.Case("fp32", "channels_last", operation, (2, 8, 5, 3))
        setup = SETTINGS.setup(case)
        expected = peers.reference(setup.problem)(setup.input, setup.residual)
        for name, contender in peers.contenders(setup.problem).items():
            if peers.role(name) == "peer":
                torch.testing.assert_close(contender(setup.input, setup.residual), expected)


def test_another_result_is_not_timed():
    setup = SETTINGS.setup(CASE)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        op.check(setup, lambda input, residual: torch.relu(input + residual))


def test_the_modes_of_a_set_up_agree():
    setup = SETTINGS.setup(CASE)
    ours = peers.contenders(setup.problem)[peers.OURS]
    forward, full, backward = (setup.call(ours, m)() for m in ("forward", "full", "backward"))
    with torch.no_grad():
        assert torch.equal(setup.call(ours, "no-grad")(), forward)
    assert all(map(torch.equal, full, backward))


def test_in_place_overhead_and_memory(tmp_path):
    small = cases.Case("fp32", "contiguous", "relu", (1, 8, 4, 4))
    in_place = op.bench(small, SETTINGS, in_place=True)
    assert {row.mode for row in in_place} == {"in place"}
    overhead = op.overhead(SETTINGS)
    assert {row.benchmark for row in overhead} == {"overhead"}
    found = {row.contender: row for row in op.memory(CASE, SETTINGS)}
    nbytes = CASE.numel * 4
    assert found[peers.OURS].saved_bytes < nbytes < found["batch_norm"].saved_bytes
    assert "**memory of a layer" in report([*found.values()], tmp_path)
    text = report([*in_place, *overhead, *found.values()], tmp_path)
    titles = ("op, in place", "overhead, no-grad", "overhead, chain of 16", "memory of a layer")
    for title in titles:
        assert text.count(f"**{title}") == 1
    saved = table(text, "memory of a layer")[CASE.name]
    assert saved["frozen_bn"].startswith("0.0, ") and {"timm", "batch_norm, live"} < saved.keys()
    assert {
        "in place: every layer / fastest peer <= 0.333",
        "overhead, plain, no-grad / batch_norm <= 0.8",
    } < table(text, "targets").keys()


def test_tables_of_known_times(tmp_path):
    times = {peers.OURS: 2e-3, peers.FLOOR: 1e-3, "torchvision": 8e-3, "batch_norm": 6e-3}
    rounds = {name: numpy.full(3, time) for name, time in times.items()}
    made = rows.timed(rows.problem_of("op", CASE), "full", rounds, peers.role)
    text = report([replace(row, unavoidable_bytes=40_000_000) for row in made], tmp_path)
    assert [*table(text, "op, full: measured")[CASE.name].values()] == [
        CASE.name,
        "2.00 (2.00-2.00)",
        "1.00, 2.00 (2.00-2.00)",
        "8.00, 0.25 (0.25-0.25)",
        "6.00, 0.33 (0.33-0.33)",
        "0.33 (0.33-0.33), batch_norm",
    ]
    assert [*table(text, "geometric means")["full fp32 contiguous"].values()][1:] == [
        "1",
        "2.00 (2.00-2.00)",
        "0.33 (0.33-0.33)",
    ]
    assert [*table(text, "GB/s")[f"full {CASE.name}"].values()][1:] == ["20", "40", "5", "7"]
    promised = table(text, "targets")
    assert promised["full: every layer / floor <= 1.05"]["missed"] == "1 of 1"
    assert promised["full: every layer / fastest peer <= 0.909"]["missed"] == "0 of 1"


PRECISIONS = [
    pytest.param(cases.AS_IT_IS, marks=pytest.mark.long),
    cases.Precision(autocast=torch.bfloat16),
    pytest.param(cases.Precision(autocast=torch.float16), marks=pytest.mark.long),
    pytest.param(cases.Precision(half=True), marks=pytest.mark.long),
]


class WithLogits(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x).mean((2, 3)).repeat(1, 200)


def tiny() -> torch.nn.Module:
    return WithLogits(*model_peers._chain(8, BasicBlock, 8, 8)[:4])


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_network_in_every_precision(precision, tmp_path):
    workload = model_peers.Workload("tiny", tiny, 1, 8)
    settings = replace(SETTINGS, precision=precision)
    found = model.bench(workload, "channels_last", settings, ("model", "memory"))
    names = {row.contender for row in found}
    assert {model_peers.DETECTRON2, model_peers.TORCHVISION, model_peers.FUSED} < names
    assert {row.dtype for row in found} == {str(precision)}
    assert {row.mode for row in found} == {model.STEP, model.NO_GRAD}
    casts = {row.contender: row.details for row in found if row.benchmark == "casts"}
    assert bool(casts) == (precision != cases.AS_IT_IS)
    if precision.autocast is not None:  # torchvision's class widens, and what follows narrows
        ours, floor = casts[model_peers.FUSED], casts[model_peers.DELETED]
        assert ours == floor
        assert casts[model_peers.TORCHVISION]["mixed"] > floor["mixed"] == 0
        assert casts[model_peers.TORCHVISION]["cast_bytes"] > floor["cast_bytes"]
    text = report(found, tmp_path)
    name = f"{precision} channels_last tiny 1x3x8x8"
    for title, heading in ((name, "/ BN deleted"), (f"memory of {name}", "saved MiB")):
        lines = table(text, f"**{title}: measured")
        assert lines.keys() == names and heading in lines[model_peers.FUSED]
    assert (f"**casts in a step of {name}:" in text) == bool(casts)
    assert f"{name}: step / BN deleted <= 1" in table(text, "targets")


def test_the_precision_is_asked_for():
    for given, name in (
        ([], "fp32"),
        (["--amp", "float16"], "fp16 autocast"),
        (["--half"], "fp16"),
    ):
        options = tool.arguments(["model", "--quick", *given])
        ((_, job),) = tool.jobs(options)
        assert str(job.args[2].precision) == name


def test_detectron2s_formula_is_the_layer():
    norm = torch.nn.BatchNorm2d(8).eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 1.5)
    frozen = model_peers._frozen_as(model_peers._Detectron2, norm)
    for x in (torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3, requires_grad=True)):
        torch.testing.assert_close(frozen(x), norm(x))


def test_ratios_are_of_the_same_round():
    ours, other = numpy.array([1.0, 2.0, 40.0]), numpy.array([2.0, 4.0, 80.0])
    made = rows.timed(("op", "plain", "fp32", "contiguous", (1, 1, 1, 1)), "full",
                      {peers.OURS: ours, peers.FLOOR: other}, peers.role)  # fmt: skip
    half = {"median": 0.5, "q20": 0.5, "q80": 0.5}
    assert made[1].ratios[peers.OURS] == made[0].over_floor == half
    assert made[0].seconds == {"median": 2.0, "q20": pytest.approx(1.4), "q80": pytest.approx(24.8)}


def test_everything_is_written(monkeypatch, tmp_path, capsys):
    sized = cases.Case("fp32", "contiguous", "relu", cases.SIZES[0])
    monkeypatch.setattr(op, "cases", lambda quick, batch: [(CASE, False), (sized, False)])
    file = tmp_path / "new" / "op.json"
    given = ["op", "--no-compile", "--quick", "--seconds", "0.01", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *given])
    tool.main()
    assert {path.name for path in file.parent.iterdir()} == {"op.json", "op.md"}
    output = capsys.readouterr().out
    assert output.startswith(file.with_suffix(".md").read_text())
    assert "frozen_bn / fastest peer" in table(output, "op, full: measured")[CASE.name]
    assert float(table(output, "GB/s")[f"full {sized.name}"]["floor"]) >= 0
    assert float(table(output, "ns an element")["full, elements: 4096"]["frozen_bn"]) > 0
    assert "full: every layer / floor <= 1.05" in table(output, "targets")


def slower(records: list[dict], factor: float) -> list[dict]:
    """All of ours, by a factor."""
    changed = copy.deepcopy(records)
    for record in changed:
        if record["role"] == "peer":
            for figures in record["ratios"].values():
                for name in figures:
                    figures[name] *= factor
    return changed


def steady(records: list[dict]) -> list[dict]:
    """Without the scatter of a run as short as this."""
    changed = copy.deepcopy(records)
    for record in changed:
        for figures in record["ratios"].values():
            figures |= {"q20": figures["median"] * 0.98, "q80": figures["median"] * 1.02}
    return changed


def run_compare(old, new, tmp_path) -> int:
    files = [tmp_path / name for name in ("old.json", "new.json")]
    for file, content in zip(files, (old, new), strict=True):
        file.write_text(json.dumps(content))
    return compare.main([*map(str, files)])


@pytest.mark.parametrize(("factor", "status"), [(1, 0), (0.5, 0), (1.08, 0), (1.2, 1)])
def test_what_is_worse(records, tmp_path, capsys, factor, status):
    records = steady(records)
    assert run_compare(records, slower(records, factor), tmp_path) == status
    output = capsys.readouterr().out
    assert output.count("WORSE") == (4 if status else 0)  # one a mode
    assert "of 4 ratios worsened" in output


def test_what_scatters_is_not_worse(records, tmp_path):
    scattered = steady(records)
    for record in scattered:
        for figures in record["ratios"].values():
            figures["q80"] = figures["median"] * 1.5
    assert run_compare(scattered, slower(scattered, 1.2), tmp_path) == 0


def test_a_slower_machine_is_not_worse(records, tmp_path, capsys):
    """Nor one with other times altogether: only ratios count."""
    other = steady(records)
    for record in other:
        record["machine"] = "another"
        record["seconds"] = {name: 10 * figure for name, figure in record["seconds"].items()}
    assert run_compare(steady(records), other, tmp_path) == 0
    assert "not alike: machine" in capsys.readouterr().out


def test_files_without_a_common_line(records, tmp_path, capsys):
    other = [record | {"threads": -1} for record in records]
    assert run_compare(records, other, tmp_path) == 2
    assert "nothing to compare" in capsys.readouterr().err
