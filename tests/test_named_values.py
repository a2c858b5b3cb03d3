"""What ``help`` says of values, which have no text of their own at run time."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import quantjax as qj


@pytest.mark.parametrize("room", [qj.ranges, qj.estimators, qj.rounding])
def test_help_of_a_module_lists_its_values_and_where_their_texts_stand(room: ModuleType) -> None:
    """``help`` of the value itself shows its class."""
    kinds = qj.ranges.RangeRule, qj.ranges.FitRule, qj.estimators.Estimator, qj.rounding.Rounding
    values = {name: value for name, value in vars(room).items() if isinstance(value, kinds)}
    rows = [line for line in (room.__doc__ or "").splitlines() if line.startswith("| ``")]
    named = {name: row for row in rows for name in re.findall(r"``(\w+)``", row.split(" | ")[0])}
    assert named.keys() == values.keys()
    for name, row in named.items():
        file = Path(room.__file__ or "")
        file = file.parent / row.split("|")[-2].strip() if file.name == "__init__.py" else file
        assert re.search(rf'^{name} = [\s\S]*?\n"""', file.read_text(), re.MULTILINE)
