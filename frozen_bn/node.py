"""Which autograd node serves: the compiled one (csrc/node.cpp) where it fits the running torch,
else Python's (functional.py, pair.py). Both do the same; the compiled one in less time."""

from __future__ import annotations

import os
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import ops


def _minor(version: str) -> str:
    """Of torch: what its C++ interface stays the same within."""
    return ".".join(version.split(".")[:2])


def _load() -> tuple[Any, str]:
    """The module and nothing, or None and why."""
    if os.environ.get("FROZEN_BN_NODE") == "0":
        return None, "FROZEN_BN_NODE=0"
    if "cpu" not in ops.live:
        return None, "no operators"
    if not Path(__file__).with_name("_node" + sysconfig.get_config_var("EXT_SUFFIX")).exists():
        return None, "the compiled one was not built"
    from . import _C

    # Before it is loaded: the symbols it wants may be missing, or other than they were.
    built = _C.build_info()["torch"]
    if _minor(built) != _minor(torch.__version__):
        return None, f"the compiled one is for torch {_minor(built)}"
    try:
        return import_module("frozen_bn._node"), ""
    except ImportError as error:
        return None, str(error)


compiled, why_not = _load()
