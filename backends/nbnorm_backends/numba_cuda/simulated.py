"""A plan run by the simulator, on host arrays."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm_backends.numba_cuda import simulator
from nbnorm_backends.numba_cuda.launch import REALS, Variant
from nbnorm_backends.numba_cuda.plans import Plan


def execute(plan: Plan, inputs: dict[str, Any], *, seed: int = 0, element: Any = None) -> dict[str, NDArray[Any]]:
    """The plan's buffers after its launches, flat.

    Parameters
    ----------
    plan
    inputs : dict of str to flat arrays or `simulator.Pointer`
        x, dy, weight and what else the launches name; running statistics are written.
    seed : int
        Draws the order of blocks and warps.
    element : dtype of x, where x is not among the inputs
    """
    element = inputs["x"].dtype if isinstance(inputs.get("x"), np.ndarray) else element
    real = np.float64 if element == np.float64 else np.float32
    dtypes = {"element": element, "real": real, "int32": np.int32, "int64": np.int64}
    buffers = {
        name: np.zeros(each.size, dtypes[each.type]) if each.zero else simulator.empty(each.size, dtypes[each.type])
        for name, each in plan.buffers.items()
    }
    memory = {**buffers, **inputs}
    for launch in plan.launches:
        args = {name: memory[value] if isinstance(value, str) else value for name, value in launch.args.items()}
        args |= {name: real(args[name]) for name in REALS if name in args}
        factory, names = _factory(launch.variant)
        assert set(names) == set(args), (launch.variant.name, set(names) ^ set(args))
        simulator.launch(factory, launch.grid, launch.block, [args[name] for name in names], seed=seed)
    for name, each in plan.buffers.items():
        assert not each.zero or not buffers[name].any(), name
    return buffers


def _factory(variant: Variant) -> tuple[Any, list[str]]:
    P = simulator.primitives(variant.kind)

    def factory(cuda: Any) -> Any:
        return variant.make(cuda, P)

    return factory, list(
        inspect.signature(factory(simulator.Cuda(simulator.Index(1, 1), simulator.Index(1, 1)))).parameters
    )
