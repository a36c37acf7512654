"""ONNX's own node cases, and how to run one by functions of nbnorm."""

import warnings

from onnx import helper
from onnx.backend.test.case.node import collect_testcases


def single_node_cases(adapters):
    """The cases whose graph is one node with an adapter.

    Takes about 6 s, once in a process, most of it for the examples of pooling: ONNX computes every operator's examples
    on import, and `collect_testcases(op_type)` filters only the first call of a process, by one operator, and is hardly
    faster.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # other operators' examples overflow and divide by zero
        cases = collect_testcases()
    return [case for case in cases if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in adapters]


def run(adapters, node, inputs, backend):
    """What the node's adapter gives. An attribute that the adapter does not name is a TypeError: none is ignored."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return adapters[node.op_type](*inputs, **attributes, backend=backend)
