"""Runs checks in two real processes that talk by gloo, all checks in the same two: starting a
process takes seconds. A check that fails, or hangs, says so by its name."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[int], None]

WORLD = 2
_COLLECTIVE_TIMEOUT = timedelta(seconds=30)
_TIMEOUT = 150.0  # of everything


class Checks:
    """Checks by name, each a function of the rank, to be registered where their module is imported,
    which each process does. The order is that of the registration."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def add(self, name: str, check: Check) -> None:
        assert name not in self._checks, name
        self._checks[name] = check

    def __call__(self, check: Check) -> Check:
        self.add(check.__name__, check)
        return check

    def names(self) -> list[str]:
        return [*self._checks]

    def work(self, rank: int, folder: Path) -> None:
        """What a process does. It ends with the first failure: the other one would wait for it."""
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=WORLD,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        for name, check in self._checks.items():
            (folder / f"{rank} {name}").write_text("it hangs")
            torch.manual_seed(0)
            try:
                check(rank)
                dist.barrier()
            except BaseException:
                (folder / f"{rank} {name}").write_text(traceback.format_exc())
                raise
            (folder / f"{rank} {name}").write_text("passed")
        dist.destroy_process_group()

    def run(self, work: Callable[[int, Path], None], folder: Path) -> Results:
        """All, in fresh processes: ``work`` is :meth:`work`, as a function that can be imported."""
        context = mp.start_processes(
            work, (folder,), WORLD, join=False, daemon=True, start_method="spawn"
        )
        deadline = time.monotonic() + _TIMEOUT
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    break
        except Exception as error:  # told by name below
            (folder / "error").write_text(str(error))
        for process in context.processes:
            process.kill()
            process.join()
        return Results(folder)


class Results:
    """What became of the checks, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def assert_passed(self, name: str) -> None:
        texts = [self._told(f"{rank} {name}") for rank in range(WORLD)]
        if any(text is None for text in texts):
            pytest.fail(f"not reached, one before it failed: {self._told('error')}", pytrace=False)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text != "passed"]
        if failed:
            pytest.fail("\n".join(failed), pytrace=False)

    def _told(self, name: str) -> str | None:
        path = self._folder / name
        return path.read_text() if path.exists() else None
