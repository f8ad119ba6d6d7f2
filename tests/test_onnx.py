"""ONNX's operator Attention by this library: the onnx project's own node tests."""

import doctest
import warnings
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", minversion="1.23")

from onnx import TensorProto, helper  # noqa: E402
from onnx.backend.test.case.node import collect_testcases  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from test_docs import run_python_of  # noqa: E402

import fastattn  # noqa: E402
import fastattn.onnx  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of NumPy, while onnx computes what it expects
    # The expanded ones are graphs of other operators.
    CASES = [case for case in collect_testcases("Attention") if "expanded" not in case.name]


def test_there_are_cases():
    assert len(CASES) > 50


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node(case, monkeypatch):
    calls = []
    real = fastattn.attention

    def counted(*args, **keywords):
        calls.append(keywords)
        return real(*args, **keywords)

    monkeypatch.setattr(fastattn, "attention", counted)
    evaluator = ReferenceEvaluator(case.model, new_ops=[fastattn.onnx.Attention])
    for inputs, expected in case.data_sets:
        names = [x.name for x in case.model.graph.input]
        results = evaluator.run(None, dict(zip(names, inputs, strict=True)))
        for result, want in zip(results, expected, strict=True):
            assert result.dtype == want.dtype
            # What is expected of bfloat16 was rounded to its 8 bits after each step: scores of up to 3 by 3 * 2**-9,
            # which e to their power shows as a share, and then probabilities and results by 2**-9 each;
            # this library's by as much once.
            rtol = max(case.rtol, 6 * 2.0**-9) if want.dtype.name == "bfloat16" else case.rtol
            np.testing.assert_allclose(result.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=case.atol)
    assert calls


def model(shapes, **attributes):
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    node = helper.make_node("Attention", list(shapes), ["out"], **attributes)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "attention", inputs, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def run(shapes, **attributes):
    evaluator = ReferenceEvaluator(model(shapes, **attributes), new_ops=[fastattn.onnx.Attention])
    return evaluator.run(None, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})


def test_three_axes_need_the_number_of_heads():
    with pytest.raises(ValueError, match="Q has 3 axes"):
        run({"Q": [1, 5, 8], "K": [1, 5, 8], "V": [1, 5, 8]})


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"Q has shape \(1, 5, 8\)"):
        run({"Q": [1, 5, 8], "K": [1, 5, 8], "V": [1, 5, 8]}, q_num_heads=3, kv_num_heads=2)


PAGE = Path(__file__).parent.parent / "docs" / "onnx.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
def test_python_in_its_page():
    run_python_of(PAGE)


def test_its_docstring():
    (test,) = doctest.DocTestFinder(recurse=False).find(fastattn.onnx, "onnx", globs={})
    assert doctest.DocTestRunner().run(test).failed == 0
