"""That a check in a fresh process can fail."""

from __future__ import annotations

import pytest
from fresh import run_fresh


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("assert 1 == 2, 'told'", "AssertionError: told"),
        ("raise SystemExit(1)", "SystemExit"),
        ("import os; os._exit(3)", "it died, exit code 3"),
        ("import time; time.sleep(60)", "no answer in 0.5 s"),
    ],
)
def test_a_failure_is_told(code, told):
    with pytest.raises(AssertionError, match=told):
        run_fresh(code, timeout=0.5 if "sleep" in code else 60)


def test_it_is_fresh():
    code = (
        "import os, sys; print(os.environ['A'], 'torch' in sys.modules, 'frozen_bn' in sys.modules)"
    )
    assert run_fresh(code, A="b") == "b True False\n"
