"""Axis names that nothing would use are refused."""

import pytest

import quantjax as qj
from quantjax import errors
from tests.models import mlp, planned
from tests.refused import refused


@pytest.mark.parametrize("name", ["data", ("data", "model")])
def test_an_axis_name_without_statistics_is_refused(name):
    case = mlp()
    plan = planned(case, qj.uniform_policy())
    with refused(errors.ArgumentError, "an axis name", "observe=True"):
        qj.fake_quantize(case.f, plan, axis_name=name)
    qj.fake_quantize(case.f, plan, observe=True, axis_name=name)
