"""Normalization for arrays of any framework: one API, pluggable backends, statistics that merge without loss."""

import importlib
from typing import TYPE_CHECKING

from nbnorm import conventions
from nbnorm.arrays import Array
from nbnorm.backend import Backend, Grads
from nbnorm.bank import StatsBank
from nbnorm.conventions import Convention, State
from nbnorm.derived import (
    add_layer_norm,
    add_rms_norm,
    batch_renorm,
    lengths_to_mask,
    norm_dropout,
    weight_standardization,
)
from nbnorm.dispatch import BackendInfo, Decision, backends, trace, use_backend
from nbnorm.engine import Pullback, SecondPullback
from nbnorm.errors import BackendError, StateError
from nbnorm.fold import fold_batch_norm
from nbnorm.layers import GroupNorm, LayerNorm, RMSNorm
from nbnorm.microbatch import MicroBatchNorm
from nbnorm.operation import explain, vjp
from nbnorm.ops import batch_norm, group_norm, instance_norm, layer_norm, moments, rms_norm
from nbnorm.parallel import threads
from nbnorm.plan import Plan, plan
from nbnorm.recalibrate import recalibrate
from nbnorm.running import RunningStatistics
from nbnorm.statistics import Moments
from nbnorm.tracking import BatchNorm, InstanceNorm, Token
from nbnorm.welford import Welford
from nbnorm.whole import local_response_norm, normalize

if TYPE_CHECKING:
    from nbnorm import exchange
    from nbnorm import state as state
else:

    def __getattr__(name):
        """Modules for files, of which most programs read none: the import takes 56 ms without them, 64 with them."""
        if name in ("exchange", "state"):
            return importlib.import_module(f"nbnorm.{name}")
        raise AttributeError(f"module 'nbnorm' has no attribute {name!r}")


__version__ = "0.5.0"

__all__ = [
    "Array",
    "Backend",
    "BackendError",
    "BackendInfo",
    "BatchNorm",
    "Convention",
    "Decision",
    "Grads",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "MicroBatchNorm",
    "Moments",
    "Plan",
    "Pullback",
    "RMSNorm",
    "RunningStatistics",
    "SecondPullback",
    "State",
    "StateError",
    "StatsBank",
    "Token",
    "Welford",
    "add_layer_norm",
    "add_rms_norm",
    "backends",
    "batch_norm",
    "batch_renorm",
    "conventions",
    "exchange",
    "explain",
    "fold_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "lengths_to_mask",
    "local_response_norm",
    "moments",
    "norm_dropout",
    "normalize",
    "plan",
    "recalibrate",
    "rms_norm",
    "threads",
    "trace",
    "use_backend",
    "vjp",
    "weight_standardization",
]
