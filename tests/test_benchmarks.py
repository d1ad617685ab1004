"""The benchmarks, on tiny cases: what they save, print and draw, and what counts as worse."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

tool = pytest.importorskip(
    "benchmarks.__main__",
    reason="needs rich, timm and matplotlib, and the repository's root as cwd",
)
from torchvision.models.resnet import BasicBlock  # noqa: E402

from benchmarks import cases, compare, model, model_peers, op, peers, pictures, rows, targets  # noqa: E402
from benchmarks.timing import Plan, Quantiles, Timing  # noqa: E402

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


@pytest.fixture
def records(found, tmp_path):
    """As they are in the file."""
    file = tmp_path / "rows.json"
    about = rows.environment("cpu") | {"inplace_followers": False}
    rows.save([replace(row, environment=about) for row in found], file)
    assert [row.key for row in rows.load(file)] == [row.key for row in found]
    return json.loads(file.read_text())


def test_every_mode_times_every_contender(found):
    names = set(op.names(SETTINGS))
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
    with pytest.raises(AssertionError, match="the output differs"):
        op.check(setup, lambda input, residual: torch.relu(input + residual))


def test_the_modes_of_a_set_up_agree():
    setup = SETTINGS.setup(CASE)
    ours = peers.contenders(setup.problem)[peers.OURS]
    forward, full, backward = (setup.call(ours, m)() for m in ("forward", "full", "backward"))
    with torch.no_grad():
        assert torch.equal(setup.call(ours, "no-grad")(), forward)
    assert all(map(torch.equal, full, backward))


def test_in_place_overhead_and_memory():
    in_place = op.bench_in_place(cases.Case("fp32", "contiguous", "relu", (1, 8, 4, 4)), SETTINGS)
    assert {row.mode for row in in_place} == {"in place"}
    overhead = op.overhead(SETTINGS)
    assert {row.benchmark for row in overhead} == {"overhead"}
    found = {row.contender: row for row in op.memory(CASE, SETTINGS)}
    nbytes = CASE.numel * 4
    assert found[peers.OURS].saved_bytes < nbytes < found["batch_norm"].saved_bytes
    everything = in_place + overhead + list(found.values())
    assert len(tool.measured_tables(everything)) == 8
    assert targets.verdicts(everything)


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
    return WithLogits(*model_peers._chain(8, lambda: BasicBlock(8, 8))[:4])


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_network_in_every_precision(precision):
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
    titles = [table.title for table in tool.measured_tables(found)]
    assert all(str(precision) in title for title in titles)
    assert sum("casts" in title for title in titles) == bool(casts)
    assert targets.verdicts(found)


def test_the_precision_is_asked_for():
    for given, name in (
        ([], "fp32"),
        (["--amp", "float16"], "fp16 autocast"),
        (["--half"], "fp16"),
    ):
        options = tool.arguments(["model", "--quick", *given])
        ((_, job),) = tool.jobs(options, torch.device("cpu"))
        assert str(job.args[2].precision) == name


def test_detectron2s_formula_is_the_layer():
    norm = torch.nn.BatchNorm2d(8).eval()
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 1.5)
    frozen = model_peers._frozen_as(model_peers._Detectron2, norm)
    for x in (torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3, requires_grad=True)):
        torch.testing.assert_close(frozen(x), norm(x))


def test_ratios_are_of_the_same_round():
    ours, other = Timing((1.0, 2.0, 40.0)), Timing((2.0, 4.0, 80.0))
    assert ours.over(other) == Quantiles(0.5, 0.5, 0.5)
    made = rows.timed(("op", "plain", "fp32", "contiguous", (1, 1, 1, 1)), "full",
                      {peers.OURS: ours, peers.FLOOR: other}, peers.role)  # fmt: skip
    assert made[1].ratios[peers.OURS].median == 0.5
    assert made[1].over_floor.median == 1 and made[0].over_floor.median == 0.5


def test_everything_is_written(monkeypatch, tmp_path, capsys):
    sized = cases.Case("fp32", "contiguous", "relu", cases.SIZES[0])
    monkeypatch.setattr(op, "cases", lambda quick, batch: [(CASE, False), (sized, False)])
    file = tmp_path / "new" / "op.json"
    given = ["op", "--no-compile", "--quick", "--seconds", "0.01", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *given])
    tool.main()
    names = {path.name for path in file.parent.iterdir()}
    assert names == {"op.json", "op.md", "op-speed.png", "op-roofline.png"}
    output = capsys.readouterr().out
    assert "frozen_bn / fastest peer" in output and "targets" in output
    assert "| layer |" in file.with_suffix(".md").read_text()
    assert pictures.memory(rows.load(file), tmp_path / "none.png") is None


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
