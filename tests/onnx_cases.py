"""ONNX's own node cases, and how to run one by functions of nbnorm."""

import importlib
import pkgutil
import warnings

from onnx import helper
from onnx.backend.test.case import node as every


def single_node_cases(adapters):
    """The cases whose graph is one node with an adapter.

    ONNX computes an operator's examples when the operator's module is imported. `collect_testcases` imports them all,
    which takes 6 s of every process that collects tests, most of it for pooling; here it is those of norms.
    """
    names = [module.name for module in pkgutil.iter_modules(every.__path__)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # examples divide by zero
        for name in names:
            if "norm" in name or name == "lrn":
                importlib.import_module(f"{every.__name__}.{name}")
    cases = every._NodeTestCases  # what `collect_testcases` returns
    return [case for case in cases if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in adapters]


def run(adapters, node, inputs, backend):
    """What the node's adapter gives. An attribute that the adapter does not name is a TypeError: none is ignored."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return adapters[node.op_type](*inputs, **attributes, backend=backend)
