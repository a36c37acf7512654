"""A small convolutional network in NumPy, each layer with its forward and its backward.

Activations are (N, C, H, W). A layer's `backward` belongs to its last `forward`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.special import log_softmax

import nbnorm

Array = NDArray[Any]
Statistics = Literal["training", "running", "batch"]
KERNEL = 3


class Layer(ABC):
    """One step of the network.

    Attributes
    ----------
    parameters : arrays that training changes, in place
    gradients : one for each parameter, as the last `backward` left them
    """

    parameters: Sequence[Array] = ()
    gradients: Sequence[Array] = ()

    @abstractmethod
    def forward(self, x: Array) -> Array:
        """The layer's output."""

    @abstractmethod
    def backward(self, dy: Array) -> Array:
        """The gradient of the input; those of the parameters go to `gradients`."""


class Affine(Layer):
    """A layer with a weight, drawn by He's rule for ReLU networks, and a bias."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int], dtype: DTypeLike) -> None:
        outputs, inputs = shape
        self.weight = (rng.standard_normal((outputs, inputs)) * np.sqrt(2.0 / inputs)).astype(dtype)
        self.bias = np.zeros(outputs, dtype)
        self.parameters = self.weight, self.bias


class Convolution(Affine):
    """3x3, stride 1, zero padding: height and width stay. One matrix product per image (im2col)."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int, dtype: DTypeLike) -> None:
        super().__init__(rng, (outputs, inputs * KERNEL * KERNEL), dtype)

    def forward(self, x: Array) -> Array:
        n, c, h, w = self.shape = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (KERNEL, KERNEL), (2, 3))  # (n, c, h, w, 3, 3)
        self.columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(n, c * KERNEL * KERNEL, h * w)
        y: Array = self.weight @ self.columns + self.bias[:, None]
        return y.reshape(n, -1, h, w)

    def backward(self, dy: Array) -> Array:
        n, c, h, w = self.shape
        dy = dy.reshape(n, -1, h * w)
        self.gradients = (dy @ self.columns.transpose(0, 2, 1)).sum(axis=0), dy.sum(axis=(0, 2))
        dcolumns = (self.weight.T @ dy).reshape(n, c, KERNEL, KERNEL, h, w)
        padded = np.zeros((n, c, h + 2, w + 2), dy.dtype)
        for i in range(KERNEL):
            for j in range(KERNEL):
                padded[:, :, i : i + h, j : j + w] += dcolumns[:, :, i, j]
        return padded[:, :, 1:-1, 1:-1]


class Dense(Affine):
    """A linear map of everything that a sample has: (N, C, H, W) to (N, outputs)."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int, dtype: DTypeLike) -> None:
        super().__init__(rng, (outputs, inputs), dtype)

    def forward(self, x: Array) -> Array:
        self.shape, self.flat = x.shape, x.reshape(len(x), -1)
        y: Array = self.flat @ self.weight.T + self.bias
        return y

    def backward(self, dy: Array) -> Array:
        self.gradients = dy.T @ self.flat, dy.sum(axis=0)
        dx: Array = dy @ self.weight
        return dx.reshape(self.shape)


class ReLU(Layer):
    """max(x, 0)"""

    def forward(self, x: Array) -> Array:
        self.positive = x > 0
        return np.where(self.positive, x, x.dtype.type(0))

    def backward(self, dy: Array) -> Array:
        return dy * self.positive


class MeanPool(Layer):
    """The mean of each 2x2 block."""

    def forward(self, x: Array) -> Array:
        n, c, h, w = x.shape
        y: Array = x.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))
        return y

    def backward(self, dy: Array) -> Array:
        return np.repeat(np.repeat(dy, 2, axis=2), 2, axis=3) / 4


class BatchNorm(Layer):
    """`nbnorm.BatchNorm` as a layer of the network, with a stopwatch.

    Attributes
    ----------
    statistics : what normalizes
        "training": the batch's, which the running statistics then take in; "running": the running statistics;
        "batch": the batch's, and the running statistics stay as they are.
    seconds : time spent in forward and backward so far
    """

    def __init__(self, channels: int, dtype: DTypeLike) -> None:
        self.norm = nbnorm.BatchNorm(channels, dtype=dtype)
        self.parameters = [array for array in (self.norm.weight, self.norm.bias) if array is not None]
        self.statistics: Statistics = "training"
        self.seconds = 0.0

    def forward(self, x: Array) -> Array:
        start = time.perf_counter()
        self.norm.train(self.statistics != "running")
        self.norm.tracking = self.statistics == "training"
        y: Array = self.norm(x)
        self.seconds += time.perf_counter() - start
        return y

    def backward(self, dy: Array) -> Array:
        start = time.perf_counter()
        dx: Array = self.norm.backward(dy)
        self.seconds += time.perf_counter() - start
        self.gradients = self.norm.grads["weight"], self.norm.grads["bias"]
        return dx


class Network:
    """conv 1-16, norm, ReLU, conv 16-32, norm, ReLU, 2x2 mean, dense: 8x8 images to ten logits.

    Parameters
    ----------
    seed : int
        Of the initial weights: one seed gives one set of weights, with and without batch norm.
    batch_norm : bool
    dtype : dtype of parameters and activations
    """

    def __init__(self, seed: int, *, batch_norm: bool, dtype: DTypeLike = np.float32) -> None:
        rng = np.random.default_rng(seed)

        def block(inputs: int, outputs: int) -> list[Layer]:
            norm: list[Layer] = [BatchNorm(outputs, dtype)] if batch_norm else []
            return [Convolution(rng, inputs, outputs, dtype), *norm, ReLU()]

        self.layers = [*block(1, 16), *block(16, 32), MeanPool(), Dense(rng, 32 * 4 * 4, 10, dtype)]
        self.norms = [layer for layer in self.layers if isinstance(layer, BatchNorm)]

    def forward(self, images: Array, statistics: Statistics = "training") -> Array:
        """Logits (N, 10); `statistics` as for `BatchNorm`."""
        for norm in self.norms:
            norm.statistics = statistics
        x = images
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dlogits: Array) -> Array:
        """Leave every parameter's gradient with its layer; returns that of the images."""
        dy = dlogits
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    @property
    def parameters(self) -> list[Array]:
        """Those of all layers, in order."""
        return [parameter for layer in self.layers for parameter in layer.parameters]

    @property
    def gradients(self) -> list[Array]:
        """One for each parameter, as the last `backward` left them."""
        return [gradient for layer in self.layers for gradient in layer.gradients]

    @property
    def norm_seconds(self) -> float:
        """Time spent in normalization so far, forward and backward."""
        return sum(norm.seconds for norm in self.norms)


def cross_entropy(logits: Array, labels: NDArray[np.intp]) -> tuple[float, Array]:
    """The mean cross-entropy of softmax(logits), and its gradient."""
    log_probability = log_softmax(logits, axis=1)
    rows = np.arange(len(labels))
    dlogits = np.exp(log_probability)
    dlogits[rows, labels] -= 1
    return -float(log_probability[rows, labels].mean()), dlogits / len(labels)
