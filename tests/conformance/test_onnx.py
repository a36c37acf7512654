"""ONNX's own node cases for the five normalization operators that nbnorm has, on every CPU backend.

`collect_testcases` also gives each operator's function body as a case (`*_expanded`); those are graphs of primitives
without a normalization node, so they are not counted.
"""

from collections import Counter

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import nbnorm
from onnx_cases import run, single_node_cases


def batch_normalization(x, scale, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0, backend):
    if not training_mode:
        return (nbnorm.batch_norm(x, mean, var, scale, bias, eps=epsilon, backend=backend),)
    y, batch = nbnorm.batch_norm(
        x, weight=scale, bias=bias, training=True, eps=epsilon, return_moments=True, backend=backend
    )
    # ONNX's momentum weighs the old value, and its running variance takes the batch's biased one.
    running_mean = momentum * mean + (1 - momentum) * batch.mean
    running_var = momentum * var + (1 - momentum) * batch.var(ddof=0)
    return y, running_mean.astype(mean.dtype), running_var.astype(var.dtype)


def layer_normalization(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=TensorProto.FLOAT, backend):
    y, moments = nbnorm.layer_norm(x, x.shape[axis:], scale, bias, epsilon, return_moments=True, backend=backend)
    inv_std_dev = 1 / np.sqrt(moments.var() + epsilon)
    shape = x.shape[:axis] + (1,) * len(x.shape[axis:])
    stash = helper.tensor_dtype_to_np_dtype(stash_type)  # the type of Mean and InvStdDev, whatever x's
    return y, moments.mean.reshape(shape).astype(stash), inv_std_dev.reshape(shape).astype(stash)


def group_normalization(x, scale, bias, *, num_groups, epsilon=1e-5, backend):
    # Opset 18 has one scale and one bias per group, later opsets one per channel.
    repeats = x.shape[1] // scale.size
    weight, bias = np.repeat(scale, repeats), np.repeat(bias, repeats)
    return (nbnorm.group_norm(x, num_groups, weight, bias, epsilon, backend=backend),)


def instance_normalization(x, scale, bias, *, epsilon=1e-5, backend):
    return (nbnorm.instance_norm(x, weight=scale, bias=bias, eps=epsilon, backend=backend),)


def rms_normalization(x, scale, *, axis=-1, epsilon=1e-5, backend):
    return (nbnorm.rms_norm(x, x.shape[axis:], scale, epsilon, backend=backend),)


ADAPTERS = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
}


CASES = single_node_cases(ADAPTERS)


def test_count():
    assert Counter(case.model.graph.node[0].op_type for case in CASES) == {
        "BatchNormalization": 4,
        "GroupNormalization": 2,
        "InstanceNormalization": 2,
        "LayerNormalization": 19,
        "RMSNormalization": 19,
    }
    assert len(CASES) == 46


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, backend, record_property):
    (node,) = case.model.graph.node
    for inputs, expected in case.data_sets:
        outputs = run(ADAPTERS, node, inputs, backend)
        for name, output, wanted in zip(node.output, outputs, expected, strict=True):
            np.testing.assert_allclose(output, wanted, case.rtol, case.atol, err_msg=name, strict=True)
    record_property("conformance", f"ONNX node cases, {backend}")


def test_group_normalization_18_scales_per_group(backend):
    """No collected case has opset 18's parameters; the oracle is the function body by which ONNX defines it."""
    rng = np.random.default_rng(18)
    x, scale, bias = rng.normal(size=(3, 6, 2, 5)), np.array([2.0, -3.0]), np.array([0.5, 1.0])
    names, shapes = ("x", "scale", "bias"), (x.shape, scale.shape, bias.shape)
    node = helper.make_node("GroupNormalization", names, ["y"], num_groups=2, epsilon=1e-2)
    graph = helper.make_graph(
        [node],
        "group_normalization_18",
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, shape) for name, shape in zip(names, shapes)],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, x.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x, "scale": scale, "bias": bias})
    (y,) = run(ADAPTERS, node, (x, scale, bias), backend)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13, strict=True)
