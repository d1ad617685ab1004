"""``python -m benchmarks op|model|overhead|memory|roofline|all``: frozen_bn by the side of what is
used instead, in one run, in turns.

  op        one layer on real shapes: forward, backward, both, without gradients, in place
  model     whole networks: training step, forward pass without gradients
  overhead  time a call on a tensor of 1x64x2x2, and of networks on tensors as small
  memory    bytes saved for the backward pass, and peak memory, of layers and networks
  roofline  bytes and launches of the CUDA kernels: counted without a GPU
  all       all of these

Prints tables in Markdown, and saves them beside the rows as JSON. Figures are medians over rounds
in which every contender has its turn, with 20 % and 80 % quantiles.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pandas import DataFrame
from tqdm import tqdm

from frozen_bn import ops

from . import model, model_peers, op, peers, roofline, rows, tables, targets
from .cases import Precision
from .model_peers import WORKLOADS
from .op import Settings
from .rows import Row
from .timing import Plan, apart, cpu_seconds

BENCHMARKS = ("op", "model", "overhead", "memory", "roofline")
RESULTS = Path(__file__).parent / "results"
#: A machine busier with other things than this gives no figures worth having: with two cores and
#: torch's spinning threads a few per cent are too much.
OTHER_LOAD_WORST = 0.03

#: Of a mode of a layer, of a network, and of a call; and the same for ``--quick``.
PLANS = {
    "op": (Plan(0.8, 5, 15), Plan(0.3, 3, 9)),
    "model": (Plan(60, 5, 100), Plan(12, 3, 9)),
    "overhead": (Plan(2.0, 25, 75), Plan(1.0, 15, 25)),
}

#: A name, and what to run.
Job = tuple[str, Callable[[], list[Row]]]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmark", choices=(*BENCHMARKS, "all"))
    add("--quick", action="store_true", help="few and small cases, few rounds")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--json", type=Path, metavar="F", help="default: benchmarks/results/<benchmark>.json")
    add("--seconds", type=float, help="of measuring, a case and mode")
    add("--batch", type=int, help="of layers and networks; default: their own, 1 to 16")
    add("--no-compile", action="store_true", help="leave torch.compile out")

    layers = parser.add_argument_group("layers")
    add = layers.add_argument
    add("--filter", default="", metavar="REGEX", help="those whose name it is found in")
    followers = "let the peers' `+ residual` and ReLU work in place, as in torchvision's ResNet"
    add("--inplace-followers", action="store_true", help=followers)

    networks = parser.add_argument_group("networks")
    add = networks.add_argument
    add("--models", nargs="+", choices=WORKLOADS, help="default: all; quick: one")
    add("--layouts", nargs="+", choices=model.LAYOUTS, help="default: both; quick: one")
    contenders = "those whose name it is found in, and the three that are always there"
    add("--contenders", default="", metavar="REGEX", help=contenders)
    add("--compile-all", action="store_true", help="compile ours and BN in eval() too")
    add = networks.add_mutually_exclusive_group().add_argument
    add("--amp", choices=("bfloat16", "float16"), help="under autocast, not in float32")
    add("--half", action="store_true", help="after model.half()")
    return parser.parse_args(given)


def _settings(options: argparse.Namespace, benchmark: str) -> Settings:
    plan = PLANS[benchmark][options.quick]
    if options.seconds is not None:
        plan = replace(plan, seconds=options.seconds, max_rounds=max(plan.max_rounds, 99))
    autocast = None if options.amp is None else getattr(torch, options.amp)
    return Settings(
        torch.device(options.device),
        plan,
        compiled=not options.no_compile,
        inplace_followers=options.inplace_followers,
        precision=Precision(autocast, options.half),
        contenders=options.contenders,
        all_compiled=options.compile_all,
    )


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What to run, by name."""
    wanted = BENCHMARKS if options.benchmark == "all" else (options.benchmark,)
    quick, settings = options.quick, partial(_settings, options)

    def chosen(name: str) -> bool:
        return re.search(options.filter, name) is not None

    if "overhead" in wanted:
        yield "overhead", partial(op.overhead, settings("overhead"))
        for workload in model_peers.SMALL[: 1 if quick else None]:
            yield workload.name, partial(model.host, workload, settings("overhead"))
    if "op" in wanted:
        for case, in_place in op.cases(quick, options.batch):
            if chosen(case.name):
                yield case.name, partial(op.bench, case, settings("op"), in_place)
    if "memory" in wanted:
        for case in op.memory_cases(quick):
            if chosen(case.name):
                yield f"memory {case.name}", partial(op.memory, case, settings("op"))
    if "model" in wanted or "memory" in wanted:
        for name in options.models or [*WORKLOADS][: 1 if quick else None]:
            workload = WORKLOADS[name]
            workload = replace(workload, batch=options.batch or workload.batch)
            for layout in options.layouts or [*model.LAYOUTS][: 1 if quick else None]:
                job = partial(model.bench, workload, layout, settings("model"), wanted)
                yield f"{name} {layout}", job
    if "roofline" in wanted:
        most = roofline.QUICK_MOST_ELEMENTS if quick else roofline.MOST_ELEMENTS
        for case in roofline.cases(quick):
            if chosen(case.name):
                yield f"counting {case.name}", partial(roofline.bench, case, most)


def run(todo: Sequence[Job], device: torch.device) -> list[Row]:
    """All rows of the jobs, under a progress bar on stderr."""
    found = []
    tqdm.monitor_interval = 0  # no thread, which would not go together with forks
    for name, job in (progress := tqdm(todo, disable=None)):
        progress.set_description(name)
        # The emulator is loaded once; what takes processes of its own takes them itself.
        once = name.startswith(("counting", "memory"))
        found += job() if once else apart(job, device)
    return found


def notes(found: DataFrame, about: dict[str, Any], compiled: bool) -> Iterator[str]:
    """What was measured, where, and what was left out."""
    share = about["other_load"]
    yield ", ".join(f"{key} {value}" for key, value in about.items() if key != "other_load")
    explained = []
    if found["benchmark"].isin(("op", "overhead", "memory")).any():
        explained.append((peers.EXPLAINED, peers.left_out(about["device"], compiled)))
    if (found["mode"] == "step").any():
        explained.append((model_peers.EXPLAINED, model_peers.left_out(compiled)))
    for text, missing in explained:
        yield text
        for name, why in missing.items():
            yield f"Left out: {name} ({why})."
    if (found["benchmark"] == "roofline").any():
        yield f"```text\n{roofline.EXPLAINED}```\n\n{roofline.verdict(found)}"
    worthless = ": TIMES ARE WORTHLESS." if share > OTHER_LOAD_WORST else "."
    yield f"Other processes took {share:.0%} of the machine meanwhile{worthless}"


def report(found: DataFrame, about: dict[str, Any], compiled: bool) -> str:
    """In Markdown."""
    made = [*tables.measured(found), *roofline.tables(found), *targets.tables(found)]
    return "\n\n".join([*notes(found, about, compiled), *map(tables.markdown, made)])


def main() -> None:
    options = arguments()
    if options.benchmark != "roofline":
        if options.device in ops.unavailable:
            raise SystemExit(f"no kernels for {options.device}: {ops.unavailable[options.device]}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no kernels for cuda: torch finds no GPU")
    file = options.json or RESULTS / f"{options.benchmark}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    before, todo = cpu_seconds(), list(jobs(options))
    if not todo:
        raise SystemExit(f"no case matches --filter {options.filter!r}")
    found = run(todo, torch.device(options.device))
    about = rows.environment(options.device)
    others, total = (now - then for now, then in zip(cpu_seconds(), before, strict=True))
    about["inplace_followers"] = options.inplace_followers
    about["other_load"] = max(others / total, 0.0)
    rows.save(found, about, file)
    text = report(rows.load(file), about, not options.no_compile)
    file.with_suffix(".md").write_text(text)
    print(text)
    print(f"\nsaved: {file}, {file.with_suffix('.md')}")


if __name__ == "__main__":
    main()
