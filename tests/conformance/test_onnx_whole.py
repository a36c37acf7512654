"""ONNX's own node cases for LRN, LpNormalization and MeanVarianceNormalization, on every CPU backend."""

from collections import Counter

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import nbnorm
from onnx_cases import run, single_node_cases


def lrn(x, *, size, alpha=1e-4, beta=0.75, bias=1.0, backend):
    # Of a window of even size, ONNX has the larger half behind the channel and nbnorm before it, as PyTorch.
    x = x if size % 2 else x[:, ::-1]
    y = nbnorm.local_response_norm(x, size, alpha, beta, bias, backend=backend)
    return y if size % 2 else y[:, ::-1]


def lp_normalization(x, *, axis=-1, p=2, backend):
    return nbnorm.normalize(x, p, axis, backend=backend)


def mean_variance_normalization(x, *, axes=(0, 2, 3), backend):
    # ONNX divides by std + 1e-9: sqrt(var + 1e-18) is the same where std is 0, and to 1e-9 / std elsewhere.
    return nbnorm.layer_norm(x, axis=axes, eps=1e-18, backend=backend)


ADAPTERS = {
    "LRN": lrn,
    "LpNormalization": lp_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
}


CASES = single_node_cases(ADAPTERS)


def test_count():
    assert Counter(case.model.graph.node[0].op_type for case in CASES) == {
        "LRN": 2,
        "LpNormalization": 6,
        "MeanVarianceNormalization": 1,
    }
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, backend, record_property):
    (node,) = case.model.graph.node
    for inputs, (expected,) in case.data_sets:
        np.testing.assert_allclose(run(ADAPTERS, node, inputs, backend), expected, case.rtol, case.atol, strict=True)
    record_property("conformance", f"ONNX whole and other norm node cases, {backend}")


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8])
def test_windows_of_every_size(size, backend):
    """The collected cases have size 3 alone; the oracle is ONNX's reference evaluator."""
    x = np.random.default_rng(18).normal(size=(5, 5, 2, 3)).astype("f4")
    node = helper.make_node("LRN", ["x"], ["y"], size=size, alpha=0.7, beta=0.6, bias=1.5)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph([node], "lrn", info[:1], info[1:]))
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(run(ADAPTERS, node, (x,), backend), expected, rtol=1e-5, strict=True)
