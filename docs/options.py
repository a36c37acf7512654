"""The table of docs/options.md: ``python docs/options.py`` prints it.

Each cell is what `nbnorm.explain` answers for a call with that option: the backends themselves are asked.
"""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np

import nbnorm
from nbnorm.backend import ACTIVATIONS

BACKENDS = ("numpy", "numba")
DTYPES = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
SHAPE = (2, 4, 3, 3)
OPS = {
    nbnorm.batch_norm: {"training": True},
    nbnorm.instance_norm: {},
    nbnorm.group_norm: {"num_groups": 2},
    nbnorm.layer_norm: {"axis": (1, 2, 3)},
    nbnorm.rms_norm: {"axis": (1, 2, 3)},
    nbnorm.batch_renorm: {"training": True},
    nbnorm.add_layer_norm: {"axis": (1, 2, 3)},
    nbnorm.add_rms_norm: {"axis": (1, 2, 3)},
    nbnorm.weight_standardization: {},
    nbnorm.local_response_norm: {"size": 3},
    nbnorm.normalize: {},
}


def options(x):
    """What may be added to a call, by its name in the table."""
    found = {"alone": {}, "mask": {"mask": x > 0}}
    for order in ("norm_act", "act_norm"):
        found |= {f"{name}, {order}": {"activation": name, "order": order} for name in ACTIVATIONS}
    found["residual"] = {"residual": x}
    found["mask, activation and residual"] = {"mask": x > 0, "activation": "gelu", "residual": x}
    found["axis=1"] = {"axis": 1}
    found["ghost_batch_size"] = {"ghost_batch_size": 1}
    return found


def cells(op, name):
    """One row: an answer for each backend and dtype, or none where the operation has no such option."""
    found = []
    for backend in BACKENDS:
        for dtype in DTYPES.values():
            x = np.zeros(SHAPE, dtype)
            added = options(x)[name]
            parameters = inspect.signature(op).parameters.values()
            if not set(added) <= {
                parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
            }:
                return None
            given = [x]
            if op is nbnorm.batch_renorm:
                given += [np.zeros(4, np.float32), np.ones(4, np.float32)]
            elif op in (nbnorm.add_layer_norm, nbnorm.add_rms_norm):
                given.append(x)
            found.append(answer(nbnorm.explain(op, *given, **(OPS[op] | added), backend=backend)))
    return found


def answer(decision):
    if decision.chosen is None:
        return f"refused: {decision.rejected[0][1]}"
    return "fused" if decision.fused else "composed"


def table():
    """The rows, where those of all activations agree as one."""
    heads = [f"{backend} {dtype}" for backend in BACKENDS for dtype in DTYPES]
    lines = [f"| operation | option | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for op in OPS:
        rows = {name: found for name in options(np.zeros(SHAPE)) if (found := cells(op, name)) is not None}
        for order in ("norm_act", "act_norm"):
            each = [f"{name}, {order}" for name in ACTIVATIONS]
            if each[0] in rows and all(rows[name] == rows[each[0]] for name in each):
                merged = {f"each of the 7 activations, {order}" if n == each[0] else n: r for n, r in rows.items()}
                rows = {name: row for name, row in merged.items() if name not in each}
        lines += [f"| {op.__name__} | {name} | {' | '.join(row)} |" for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
