"""``python -m benchmarks op|model|overhead|memory|roofline|all``: frozen_bn by the side of what is
used instead, in one run, in turns.

  op        one layer on real shapes: forward, backward, both, without gradients, in place
  model     whole networks: training step, forward pass without gradients
  overhead  time a call on a tensor of 1x64x2x2, and of networks on tensors as small
  memory    bytes saved for the backward pass, and peak memory, of layers and networks
  roofline  bytes and launches of the CUDA kernels: counted without a GPU
  all       all of these

Prints tables, and saves the rows as JSON, the tables as Markdown and pictures beside it. Figures
are medians over rounds in which every contender has its turn, with 20 % and 80 % quantiles.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from frozen_bn import ops

from . import model, model_peers, op, peers, pictures, roofline, targets
from .cases import Precision
from .model_peers import WORKLOADS
from .op import Settings
from .rows import Row, environment, save
from .tables import Table, measured_tables, wide_console
from .timing import OtherLoad, Plan, apart

BENCHMARKS = ("op", "model", "overhead", "memory", "roofline")
RESULTS = Path(__file__).parent / "results"
#: A machine busier with other things than this gives no figures worth having.
OTHER_LOAD_WORST = 0.03

#: Of a mode of a layer, of a network, and of a call; and the same for ``--quick``.
PLANS = {
    "op": (Plan(0.8, 5, 15), Plan(0.3, 3, 9)),
    "model": (Plan(60, 5, 100), Plan(12, 3, 9)),
    "overhead": (Plan(2.0, 25, 75), Plan(1.0, 15, 25)),
}

Job = tuple[str, Callable[[], list[Row]]]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=(*BENCHMARKS, "all"))
    parser.add_argument("--quick", action="store_true", help="few and small cases, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--json", type=Path, metavar="F", help="default: benchmarks/results/<benchmark>.json"
    )
    parser.add_argument("--seconds", type=float, help="of measuring, a case and mode")
    parser.add_argument(
        "--filter", default="", metavar="REGEX", help="layers whose name it is found in"
    )
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, help="default: all; quick: one")
    parser.add_argument(
        "--layouts", nargs="+", choices=model.LAYOUTS, help="of networks; default: both; quick: one"
    )
    parser.add_argument(
        "--batch", type=int, help="of layers and networks; default: their own, 1 to 16"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--amp", choices=("bfloat16", "float16"), help="networks: under autocast, not in float32"
    )
    precision.add_argument("--half", action="store_true", help="networks: after model.half()")
    parser.add_argument(
        "--contenders",
        default="",
        metavar="REGEX",
        help="networks: those whose name it is found in, besides the three that are always there",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-all", action="store_true", help="networks: compile ours and BN in eval() too"
    )
    parser.add_argument(
        "--inplace-followers",
        action="store_true",
        help="let the peers' `+ residual` and ReLU work in place, as in torchvision's ResNet",
    )
    return parser.parse_args(given)


def _plan(options: argparse.Namespace, benchmark: str) -> Plan:
    plan = PLANS[benchmark][options.quick]
    if options.seconds is None:
        return plan
    return replace(plan, seconds=options.seconds, max_rounds=max(plan.max_rounds, 99))


def jobs(options: argparse.Namespace, device: torch.device) -> Iterator[Job]:
    """What to run, by name."""
    wanted = BENCHMARKS if options.benchmark == "all" else (options.benchmark,)
    autocast = None if options.amp is None else getattr(torch, options.amp)
    precision = Precision(autocast, options.half)

    def chosen(name: str) -> bool:
        return re.search(options.filter, name) is not None

    def settings(benchmark: str) -> Settings:
        plan = _plan(options, benchmark)
        followers = options.inplace_followers
        compiled = not options.no_compile
        more = options.contenders, options.compile_all
        return Settings(device, plan, compiled, followers, precision, *more)

    if "overhead" in wanted:
        yield "overhead", partial(op.overhead, settings("overhead"))
        for workload in model_peers.SMALL[: 1 if options.quick else None]:
            yield workload.name, partial(model.host, workload, settings("overhead"))
    if "op" in wanted:
        for case, in_place in op.cases(options.quick, options.batch):
            if chosen(case.name):
                run = op.bench_in_place if in_place else op.bench
                yield case.name, partial(run, case, settings("op"))
    if "memory" in wanted:
        for case in op.memory_cases(options.quick):
            if chosen(case.name):
                yield f"memory {case.name}", partial(op.memory, case, settings("op"))
    if "model" in wanted or "memory" in wanted:
        models = options.models or [*WORKLOADS][: 1 if options.quick else None]
        layouts = options.layouts or [*model.LAYOUTS][: 1 if options.quick else None]
        for name in models:
            workload = WORKLOADS[name]
            workload = replace(workload, batch=options.batch or workload.batch)
            for layout in layouts:
                run_model = partial(model.bench, workload, layout, settings("model"), wanted)
                yield f"{name} {layout}", run_model
    if "roofline" in wanted:
        most = roofline.QUICK_MOST_ELEMENTS if options.quick else roofline.MOST_ELEMENTS
        for case in roofline.cases(options.quick):
            if chosen(case.name):
                yield f"counting {case.name}", partial(roofline.bench, case, most)


def run(options: argparse.Namespace) -> list[Row]:
    """All rows that the options select, under a progress bar on stderr."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    load, todo, rows = OtherLoad(), list(jobs(options, device)), []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # No refresh thread, which would not go together with forks.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(todo))
        for name, job in todo:
            progress.update(task, description=name, refresh=True)
            # The emulator is loaded once; what takes processes of its own takes them itself.
            once = name.startswith(("counting", "memory"))
            rows += job() if once else apart(job, device)
            progress.update(task, advance=1, refresh=True)
    about = environment(options.device) | {
        "inplace_followers": options.inplace_followers,
        "other_load": load.share(),
    }
    return [replace(row, environment=about) for row in rows]


def notes(rows: Sequence[Row], compiled: bool) -> list[str]:
    """What was measured, where, and what was left out."""
    about, benchmarks = rows[0].environment, {row.benchmark for row in rows}
    found = [", ".join(f"{key} {value}" for key, value in about.items() if key != "other_load")]
    if benchmarks & {"op", "overhead", "memory"}:
        missing = peers.left_out(about["device"], compiled)
        found += [peers.EXPLAINED, *(f"Left out: {n} ({why})." for n, why in missing.items())]
    if any(row.mode == "step" for row in rows):
        missing = model_peers.left_out(compiled)
        found += [model_peers.EXPLAINED, *(f"Left out: {n} ({w})." for n, w in missing.items())]
    share = about["other_load"]
    if share is not None:
        busy = f"Other processes took {share:.0%} of the machine meanwhile"
        found.append(busy + (": TIMES ARE WORTHLESS." if share > OTHER_LOAD_WORST else "."))
    return found


def tables(rows: Sequence[Row]) -> list[Table]:
    found = measured_tables(rows)
    if any(row.benchmark == "roofline" for row in rows):
        found += [roofline.ours_table(rows), roofline.peers_table(rows)]
    if verdicts := targets.verdicts(rows):
        found.append(targets.targets_table(verdicts))
    return found


def markdown(rows: Sequence[Row], compiled: bool) -> str:
    parts = [f"{note}\n" for note in notes(rows, compiled)]
    parts += [table.markdown() for table in tables(rows)]
    if any(row.benchmark == "roofline" for row in rows):
        parts += ["```text", roofline.EXPLAINED + "```", roofline.verdict(rows), ""]
    return "\n".join(parts)


def show(rows: Sequence[Row], compiled: bool) -> None:
    console = wide_console()
    for note in notes(rows, compiled):
        console.print(note, markup=False)
    for table in tables(rows):
        console.print(table.rich())
    for verdict in targets.verdicts(rows):
        for miss in verdict.misses:
            console.print(f"misses {verdict.target}: {miss}", markup=False)
    if any(row.benchmark == "roofline" for row in rows):
        console.print(roofline.EXPLAINED, roofline.verdict(rows), sep="\n", markup=False)


def main() -> None:
    options = arguments()
    if options.benchmark != "roofline":
        if options.device in ops.unavailable:
            raise SystemExit(f"no kernels for {options.device}: {ops.unavailable[options.device]}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no kernels for cuda: torch finds no GPU")
    file = options.json or RESULTS / f"{options.benchmark}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = run(options)
    if not rows:
        raise SystemExit(f"no case matches --filter {options.filter!r}")
    save(rows, file)
    show(rows, not options.no_compile)
    file.with_suffix(".md").write_text(markdown(rows, not options.no_compile))
    for saved in (file, file.with_suffix(".md"), *pictures.draw(rows, file)):
        print(f"saved: {saved}")


if __name__ == "__main__":
    main()
