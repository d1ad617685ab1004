"""Fused batch normalization with fixed statistics for PyTorch."""

from . import reference
from .config import show_config
from .convert import convert_frozen_bn, unfreeze_bn
from .deploy import fold_for_inference
from .functional import frozen_batch_norm
from .fusion.report import fused_source
from .modules import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from .report import norm_parameters, summary

__version__ = "0.1.0"

__all__ = [
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "convert_frozen_bn",
    "fold_for_inference",
    "frozen_batch_norm",
    "fused_source",
    "norm_parameters",
    "reference",
    "show_config",
    "summary",
    "unfreeze_bn",
]
