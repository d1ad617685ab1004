"""Fresh processes, in which frozen_bn has yet to be imported. They are forks of one that has
imported torch and nothing else: that takes seconds."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])

#: FROZEN_BN_NODE for what the fixture ``node`` says.
CHOOSES = {"compiled": "1", "python": "0"}


def _work(code: str, environment: dict[str, str], answer: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
    except BaseException:
        error = traceback.format_exc()
    answer.send((printed.getvalue(), error))


def run_fresh(code: str, timeout: float = 60, **environment: str) -> str:
    """What ``code`` prints in a process of its own, with these variables in its environment.

    Raises:
        AssertionError: it failed (with its traceback), or it died or took longer than ``timeout``
            seconds.
    """
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_work, args=(code, os.environ | environment, sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"no answer in {timeout} s"
        printed, error = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"it died, exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    assert error is None, error
    return printed
