"""A norm of one shape, by nbnorm and by its peers: PyTorch eager and compiled, oneDNN, JAX and ONNX Runtime.

`nbnorm bench` and `asv_bench/peers.py` time these. A framework is imported where one of its calls is made.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import nbnorm
from nbnorm.backend import LEAK
from nbnorm.parallel import thread_count

Array = NDArray[Any]
Run = Callable[[], Any]
EPS = 1e-5
ROW_NORMS = ("layer_norm", "rms_norm")  # over the last axis; the others have channels
TRACKED_NORMS = ("batch_norm", "instance_norm")  # may normalize with running statistics
# An element, for the arrays, the result in float64 with its temporaries, and the peers: what the process grew by for
# gradients of (16384, 1024) beside torch and JAX was 67 in float32 and 129 in float64.
REFERENCE_BYTES = 136


class Unavailable(Exception):
    """Why a peer does not run a case."""


@dataclass(frozen=True)
class Case:
    """A norm, or its gradient, of an array.

    Attributes
    ----------
    op : str
        batch_norm, layer_norm, group_norm, instance_norm or rms_norm; layer and RMS norm are over the last axis.
    shape : tuple of int
    dtype : str
        Weight and bias are float64 beside float64, and float32 beside the others.
    channel_axis : int
    num_groups : int
        For group_norm alone.
    activation : str, optional
    training : bool
        Normalize with x's own statistics; False, for batch and instance norm, with running ones.
    backward : bool
        The pullback in place of the forward: dx, and the gradients of weight and bias.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    channel_axis: int = 1
    num_groups: int = 0
    activation: str | None = None
    training: bool = True
    backward: bool = False

    @property
    def channel(self) -> int:
        """The axis along which weight and bias lie."""
        return (-1 if self.op in ROW_NORMS else self.channel_axis) % len(self.shape)

    @property
    def split(self) -> tuple[int, ...]:
        """The shape, with the channels of groups on an axis of their own."""
        groups = (self.num_groups, -1) if self.num_groups else (self.shape[self.channel],)
        return (*self.shape[: self.channel], *groups, *self.shape[self.channel + 1 :])

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of `split` that are reduced."""
        if self.op in ROW_NORMS:
            return (self.channel,)
        kept = (self.channel,) if self.op == "batch_norm" else (0, self.channel)
        return tuple(axis for axis in range(len(self.split)) if axis not in kept)

    @property
    def bytes(self) -> int:
        """What has to be moved: x and the result, and dy for a gradient."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize * (3 if self.backward else 2)


class Contender(NamedTuple):
    """A call, and how to read y, or dx, in float64 and in x's shape, from what it returns."""

    run: Run
    read: Callable[[Any], Array]

    def error(self, exact: Array) -> float:
        """The largest difference from the exact result."""
        return float(np.abs(self.read(self.run()) - exact).max())


class Problem:
    """The arrays of a case, nbnorm's call, the exact result, and a copy of as many bytes.

    Raises
    ------
    ValueError
        If they do not fit the machine's memory.
    """

    def __init__(self, case: Case) -> None:
        needed, memory = (
            math.prod(case.shape) * REFERENCE_BYTES,
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )
        if needed > memory:
            raise ValueError(
                f"shape {case.shape} takes {needed / 2**30:.0f} GiB with the exact result in float64; "
                f"this machine has {memory / 2**30:.0f}"
            )
        self.case = case
        rng = np.random.default_rng(0)
        dtype = dtype_of(case.dtype)
        wide = np.float64 if dtype == np.float64 else np.float32

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32)

        channels = case.shape[case.channel]
        self.x, self.dy = normal(*case.shape).astype(dtype), normal(*case.shape).astype(dtype)
        self.weight, self.bias = normal(channels).astype(wide), normal(channels).astype(wide)
        self.mean, self.var = np.zeros(channels, wide), np.ones(channels, wide)
        if not case.training:
            self.mean, self.var = normal(channels).astype(wide), np.exp(normal(channels)).astype(wide)

    def ours(
        self,
        backend: str | None = None,
        put: Callable[[Array], Any] = lambda array: array,
        get: Callable[[Any], Array] = lambda result: result,
    ) -> Contender:
        """Through the public API, with results of its own; on the backend of that name, or the one that is chosen.

        `put` makes arrays of another kind of the problem's, `get` arrays of the host of results.
        """
        x, dy = put(self.x), put(self.dy)
        op, keys = self._call(backend)
        keys = {key: put(value) if isinstance(value, np.ndarray) else value for key, value in keys.items()}
        if self.case.backward:
            pullback = nbnorm.vjp(op, x, **keys)[1]
            return Contender(lambda: pullback(dy), lambda grads: get(grads.x).astype(np.float64))
        return Contender(lambda: op(x, **keys), lambda y: get(y).astype(np.float64))

    def _call(self, backend: str | None) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The norm, and its arguments beside x."""
        op, keys = call(self.case, self.weight, self.bias, self.mean, self.var)
        return op, keys | ({"backend": backend} if backend else {})

    def chosen(self, backend: str | None = None) -> str:
        """The name of the backend of `ours`."""
        op, keys = self._call(backend)
        decision = nbnorm.explain(op, self.x, **keys)
        return str(decision.chosen)

    @cached_property
    def exact(self) -> Array:
        """y, or dx for a gradient, in float64."""
        case = self.case
        along = [-1 if axis == case.channel else 1 for axis in range(len(case.shape))]
        weight, bias, mean, var = (
            param.astype(np.float64).reshape(along) for param in (self.weight, self.bias, self.mean, self.var)
        )
        x = self.x.astype(np.float64)
        keep: dict[str, Any] = {"axis": case.axes, "keepdims": True}
        if case.training:
            x = x.reshape(case.split)
            mean = np.zeros(1) if case.op == "rms_norm" else x.mean(**keep)
            var = ((x - mean) ** 2).mean(**keep)
        rstd = 1 / np.sqrt(var + EPS)
        xhat = (x - mean) * rstd
        z = xhat.reshape(case.shape) * weight + (0.0 if case.op == "rms_norm" else bias)
        if not case.backward:
            return activations().activate(case.activation, z) if case.activation else z
        t = self.dy * weight * (activations().derivative(case.activation, z) if case.activation else 1.0)
        if case.training:
            t = t.reshape(case.split)
            t = t - (0.0 if case.op == "rms_norm" else t.mean(**keep)) - xhat * (t * xhat).mean(**keep)
        return np.asarray(rstd * t).reshape(case.shape)

    def copies(self) -> tuple[str, list[Run]]:
        """Copies of x (sums of x and dy, for a gradient), and who makes them: Numba on all threads, with ordinary and,
        from 16 KiB on, with non-temporal stores; where it is not installed NumPy, on one thread."""
        words = max(self.x.nbytes // 64 * 16, 1)  # whole cache lines
        x, dy = (array.reshape(-1).view(np.uint8)[: words * 4].view(np.float32) for array in (self.x, self.dy))
        other = dy if self.case.backward else None
        try:
            limits, outputs = (import_module(f"nbnorm_backends.numba_cpu.{name}") for name in ("limits", "outputs"))
        except ImportError:
            out = np.empty_like(x)
            return "numpy", [lambda: np.copyto(out, x) if other is None else np.add(x, other, out=out)]
        target = outputs.empty(x.shape, x.dtype)
        streams = (False, True) if outputs.streams(target, words, outputs.SMALL) else (False,)
        return "numba", [partial(limits.move, x, other, target, stream=stream) for stream in streams]


def call(case: Case, weight: Any, bias: Any, mean: Any, var: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The norm of a case, and its arguments beside x; `mean` and `var` are running statistics."""
    keys: dict[str, Any] = {"weight": weight, "bias": bias, "eps": EPS}
    if case.op in ROW_NORMS:
        keys["normalized_shape"] = case.shape[-1]
    else:
        keys["channel_axis"] = case.channel_axis
    if case.op == "group_norm":
        keys["num_groups"] = case.num_groups
    if case.op == "rms_norm":
        del keys["bias"]
    if case.op in TRACKED_NORMS:
        keys["training" if case.op == "batch_norm" else "use_input_stats"] = case.training
        if not case.training or (case.op == "batch_norm" and not case.backward):
            keys |= {"running_mean": mean, "running_var": var}
    return getattr(nbnorm, case.op), keys | ({"activation": case.activation} if case.activation else {})


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's dtype of this name, or that of ml_dtypes."""
    if name == "bfloat16":
        import_module("ml_dtypes")  # tells NumPy the name
    return np.dtype(name)


def activations() -> Any:
    """The float64 activations, which take 0.1 s to import."""
    return import_module("nbnorm.activations")


# ---- PyTorch and oneDNN ----------------------------------------------------------------------------------------------


def tensor(array: Array, device: str = "cpu") -> Any:
    """An array as a torch tensor; in host memory without a copy."""
    torch = import_module("torch")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


class _Tensors:
    """A problem's tensors, the channels of images on axis 1, and its forward as a function of x."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.torch = import_module("torch")
        self.torch.set_num_threads(thread_count())
        self.tensor = partial(tensor, device=device)
        case = self.case = problem.case
        self.x, self.dy = (self.tensor(array) for array in (problem.x, problem.dy))
        if case.op not in ROW_NORMS:
            self.x, self.dy = self.x.movedim(case.channel, 1), self.dy.movedim(case.channel, 1)
        self.weight, self.bias = self.tensor(problem.weight), self.tensor(problem.bias)
        self.mean, self.var = self.tensor(problem.mean.copy()), self.tensor(problem.var.copy())
        if case.op == "rms_norm" or (device != "cpu" and case.op in ("layer_norm", "group_norm")):  # they take no other
            self.weight, self.bias = self.weight.to(self.x.dtype), self.bias.to(self.x.dtype)

    def read(self, result: Any) -> Array:
        y = result[0] if isinstance(result, tuple) else result
        y = y.to_dense() if y.is_mkldnn else y
        y = y.detach().double().cpu()
        return np.asarray((y if self.case.op in ROW_NORMS else y.movedim(1, self.case.channel)).numpy())

    def forward(self) -> Callable[[Any], Any]:
        F = import_module("torch.nn.functional")
        case, w, b, mean, var = self.case, self.weight, self.bias, self.mean, self.var
        size, running = (case.shape[-1],), (None, None) if case.training else (mean, var)
        norm: Callable[[Any], Any] = {
            "batch_norm": lambda x: F.batch_norm(x, mean, var, w, b, case.training, 0.1, EPS),
            "layer_norm": lambda x: F.layer_norm(x, size, w, b, EPS),
            "rms_norm": lambda x: F.rms_norm(x, size, w, EPS),
            "group_norm": lambda x: F.group_norm(x, case.num_groups, w, b, EPS),
            "instance_norm": lambda x: F.instance_norm(x, *running, w, b, case.training, 0.1, EPS),
        }[case.op]
        if case.activation is None:
            return norm
        name = case.activation.removesuffix("_tanh")
        act = partial(F.gelu, approximate="tanh") if case.activation == "gelu_tanh" else getattr(F, name)
        return lambda x: act(norm(x))

    def backward(self, problem: Problem) -> Callable[[Any, Any], Any] | None:
        """The function of dy and x that autograd would call, where there is one for the whole gradient; autograd
        itself takes 18 us more. On a GPU there are several, and autograd knows which."""
        case, w, b, aten = self.case, self.weight, self.bias, self.torch.ops.aten
        if case.activation is not None or case.op not in ("batch_norm", "layer_norm") or self.x.device.type != "cpu":
            return None
        x, every = problem.x.astype(np.float64), [True, True, True]
        mean = x.mean(case.axes, keepdims=True)
        rstd = 1 / np.sqrt(((x - mean) ** 2).mean(case.axes, keepdims=True) + EPS)
        m, r = (self.tensor(np.ascontiguousarray(part, problem.weight.dtype)) for part in (mean, rstd))
        if case.op == "layer_norm":
            return lambda dy, x: aten.native_layer_norm_backward(dy, x, (x.shape[-1],), m, r, w, b, every)
        m, r, mean, var, train = m.reshape(-1), r.reshape(-1), self.mean, self.var, case.training
        return lambda dy, x: aten.native_batch_norm_backward(dy, x, w, mean, var, m, r, train, EPS, every)


def torch_eager(problem: Problem, device: str = "cpu") -> Contender:
    return _torch(problem, device, lambda function: function)


def torch_compile(problem: Problem, device: str = "cpu") -> Contender:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise Unavailable(f"torch.compile needs a C++ compiler, and there is no {compiler}")
    torch: Any = import_module("torch")
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # a pullback is called again and again
    return _torch(problem, device, partial(torch.compile, fullgraph=True))


def _torch(problem: Problem, device: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Contender:
    data = _Tensors(problem, device)
    x, dy = data.x, data.dy
    if not problem.case.backward:
        forward = wrap(data.forward())
        return Contender(lambda: forward(x), data.read)
    if backward := data.backward(problem):
        function = wrap(backward)
        return Contender(lambda: function(dy, x), data.read)
    leaves = [x, data.weight] if problem.case.op == "rms_norm" else [x, data.weight, data.bias]
    for leaf in leaves:
        leaf.requires_grad_()
    y = wrap(data.forward())(x)
    return Contender(lambda: data.torch.autograd.grad(y, leaves, dy, retain_graph=True), data.read)


def onednn(problem: Problem) -> Contender:
    case = problem.case
    if case.op != "batch_norm" or case.backward or case.channel != 1 or len(case.shape) < 4 or case.dtype != "float32":
        raise Unavailable("torch hands oneDNN the forward of batch_norm alone, of float32 images, channels first")
    if case.activation not in (None, "relu"):
        raise Unavailable("of the activations, oneDNN is compared with relu alone")
    data = _Tensors(problem, "cpu")
    blocked, forward = data.x.to_mkldnn(), data.forward()
    return Contender(lambda: forward(blocked), data.read)


# ---- JAX -------------------------------------------------------------------------------------------------------------


def jax(problem: Problem) -> Contender:
    jax, jnp = import_module("jax"), import_module("jax.numpy")
    case = problem.case
    along = [-1 if axis == case.channel else 1 for axis in range(len(case.shape))]
    known: dict[str | None, Callable[[Any], Any]] = {
        None: lambda z: z,
        "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=LEAK),
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    }
    act = known.get(case.activation) or getattr(jax.nn, str(case.activation))

    def forward(x: Any, weight: Any, bias: Any) -> Any:
        wide = x.astype(weight.dtype)
        if case.training:
            wide = wide.reshape(case.split)
            m = 0.0 if case.op == "rms_norm" else wide.mean(case.axes, keepdims=True)
            r = jax.lax.rsqrt(((wide - m) ** 2).mean(case.axes, keepdims=True) + EPS)
        else:
            m, r = mean, jax.lax.rsqrt(var + EPS)
        z = ((wide - m) * r).reshape(x.shape) * weight
        return act(z if case.op == "rms_norm" else z + bias).astype(x.dtype)

    def precise() -> Any:  # float64 is a mode of JAX
        return jax.enable_x64(True) if case.dtype == "float64" else nullcontext()

    def read(result: Any) -> Array:
        return np.asarray(result[0] if case.backward else result).astype(np.float64)

    with precise():
        x, dy = jnp.asarray(problem.x), jnp.asarray(problem.dy)
        weight, bias, mean, var = (
            jnp.asarray(param.reshape(along)) for param in (problem.weight, problem.bias, problem.mean, problem.var)
        )
        if case.backward:
            function = jax.jit(lambda pullback, dy: pullback(dy))
            given: tuple[Any, ...] = jax.jit(lambda *given: jax.vjp(forward, *given)[1])(x, weight, bias), dy
        else:
            function, given = jax.jit(forward), (x, weight, bias)
    if case.dtype != "float64":
        return Contender(lambda: jax.block_until_ready(function(*given)), read)

    def run() -> Any:
        with precise():
            return jax.block_until_ready(function(*given))

    return Contender(run, read)


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


def onnxruntime(problem: Problem) -> Contender:
    case = problem.case
    if case.backward or (case.op == "batch_norm" and case.training):
        raise Unavailable("ONNX Runtime is for inference: no gradients, and batch_norm by running statistics alone")
    if case.op == "instance_norm" and not case.training:
        raise Unavailable("ONNX has no instance_norm by running statistics")
    if case.dtype != "float32":
        raise Unavailable("ONNX Runtime is compared in float32: in half types what runs on a CPU is emulated")
    if case.op not in ROW_NORMS and case.channel != 1:
        raise Unavailable("ONNX has channels on axis 1 alone")
    onnx, ort = import_module("onnx"), import_module("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    feeds = {"x": problem.x, "weight": problem.weight, "bias": problem.bias}
    known: dict[str, tuple[int, dict[str, Any]]] = {
        "batch_norm": (17, {}),
        "layer_norm": (17, {"axis": -1}),
        "rms_norm": (23, {"axis": -1}),
        "group_norm": (21, {"num_groups": case.num_groups}),
        "instance_norm": (17, {}),
    }
    opset, attributes = known[case.op]
    if case.op == "batch_norm":
        feeds |= {"mean": problem.mean, "var": problem.var}
    if case.op == "rms_norm":
        del feeds["bias"]
    name = {"rms_norm": "RMSNormalization"}.get(case.op, case.op.partition("_")[0].title() + "Normalization")
    nodes = [helper.make_node(name, list(feeds), ["z" if case.activation else "y"], epsilon=EPS, **attributes)]
    if case.activation == "silu":
        nodes += [helper.make_node("Sigmoid", ["z"], ["s"]), helper.make_node("Mul", ["z", "s"], ["y"])]
    elif case.activation:
        opset = max(opset, 20)  # Gelu
        functions: dict[str, tuple[str, dict[str, Any]]] = {
            "relu": ("Relu", {}),
            "leaky_relu": ("LeakyRelu", {"alpha": LEAK}),
            "gelu": ("Gelu", {}),
            "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
            "sigmoid": ("Sigmoid", {}),
            "tanh": ("Tanh", {}),
        }
        act, settings = functions[case.activation]
        nodes.append(helper.make_node(act, ["z"], ["y"], **settings))
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info(key, kind, array.shape) for key, array in feeds.items()],
        [helper.make_tensor_value_info("y", kind, case.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = thread_count()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Contender(lambda: session.run(None, feeds), lambda found: np.asarray(found[0]).astype(np.float64))


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """How to get its call, which raises `Unavailable` for a case that it does not run, and what must be installed."""

    call: Callable[[Problem], Contender]
    packages: tuple[str, ...]

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


PEERS = {
    "torch": Peer(torch_eager, ("torch",)),
    "torch.compile": Peer(torch_compile, ("torch",)),
    "onednn": Peer(onednn, ("torch",)),
    "jax": Peer(jax, ("jax",)),
    "onnxruntime": Peer(onnxruntime, ("onnxruntime", "onnx")),
}
