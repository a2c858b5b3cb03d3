"""The test cases that ONNX ships for its quantization operators, bit for bit.

Inputs and expected outputs are those of the installed package; nothing is copied.
"""

import re
import warnings
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from quantjax.packing import pack
from tests.conformance.onnx_nodes import (
    FORMATS,
    OPERATORS,
    array,
    codes_of,
    concerned,
    element_type,
    find_cases,
    numpy_helper,
    run,
    shipped,
)

pytestmark = pytest.mark.thinned(3)

DOUBLES = r"test_cast(like)?_(FLOAT_to_DOUBLE|DOUBLE_to_FLOAT)(_expanded)?"
EXPANDED = r"test_dynamicquantizelinear\w*_expanded"

SKIPPED: Mapping[str, str] = {
    EXPANDED: "the operator's definition in Min, Div, Round and others, none of which quantizes; "
    "the data are those of the case without _expanded",
    DOUBLES: "both types are wider than any format here",
}
"""Patterns of names, and why these cases are not ours."""

CASES = find_cases()


def reason(name: str) -> str | None:
    """Why a case is skipped."""
    return next((why for names, why in SKIPPED.items() if re.fullmatch(names, name)), None)


RUN = tuple(name for name in CASES if reason(name) is None)


def patterns(x: np.ndarray) -> np.ndarray:
    """The bits of each entry; those of NaN are all alike."""
    if element_type(x) in FORMATS:
        bits = np.asarray(codes_of(x))
    else:
        bits = np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")
    is_nan = np.isnan(x.astype(np.float64))
    return np.where(is_nan, np.int64(-(2**40)), bits.astype(np.int64))


@pytest.mark.parametrize("name", RUN)
def test_case(name):
    (_, expected), *more = CASES[name].data_sets
    assert not more
    outputs = run(CASES[name])
    assert len(outputs) == len(expected)
    for got, want in zip(outputs, map(array, expected), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert_array_equal(patterns(got), patterns(want))
        format = FORMATS.get(element_type(want))
        if format is not None and format.code_bits < 8:  # the bytes that ONNX stores
            flat = codes_of(got).reshape(-1)
            stored, _ = pack(flat, format.code_bits, signed=flat.dtype == jnp.int8)
            assert np.asarray(stored).tobytes() == numpy_helper.from_array(want).raw_data


def names_of(pattern: str) -> list[str]:
    """The cases that a line of ``SKIPPED`` names."""
    return [name for name in CASES if re.fullmatch(pattern, name)]


def test_each_case_is_run_or_skipped_for_a_reason():
    skipped = [name for pattern in SKIPPED for name in names_of(pattern)]
    assert sorted([*RUN, *skipped]) == sorted(CASES)  # none twice, none in both
    assert all(names_of(pattern) and why.strip() for pattern, why in SKIPPED.items())
    nodes = {node.op_type for name in RUN for node in CASES[name].model.graph.node}
    assert nodes == set(OPERATORS)


def test_what_is_skipped_is_as_its_reason_says():
    for name in names_of(EXPANDED):
        case, same = CASES[name], CASES[name.removesuffix("_expanded")]
        assert len(case.model.graph.node) > 1
        for arrays, others in zip(case.data_sets[0], same.data_sets[0], strict=True):
            for x, y in zip(map(array, arrays), map(array, others), strict=True):
                assert_array_equal(patterns(x), patterns(y))
    for name in names_of(DOUBLES):
        x, y = (array(values[0]) for values in CASES[name].data_sets[0])
        assert not {element_type(x), element_type(y)} & set(FORMATS)


@pytest.mark.slow
def test_no_case_is_overlooked():
    """``find_cases`` imports only the modules that name the operators; here are all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert concerned(shipped.collect_testcases()).keys() == CASES.keys()
