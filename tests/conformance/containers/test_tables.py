"""Golden site tables: what the interpreter finds in every container, word for word.

To renew them after an intended change, run this file with ``QUANTJAX_RENEW_GOLDEN=1`` and read the
difference before committing it::

    QUANTJAX_RENEW_GOLDEN=1 scripts/test tests/conformance/containers/test_tables.py
"""

import os
from pathlib import Path

import pytest

from tests.conformance.containers.cases import CASES, build

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Path:
    """The file of a case: ``golden/raw-layers.txt``."""
    return GOLDEN / f"{name.replace('/', '-')}.txt"


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", CASES)
def test_the_table_is_the_golden_one(name):
    table = f"{build(name).table}\n"
    if os.environ.get("QUANTJAX_RENEW_GOLDEN"):
        golden(name).write_text(table, encoding="utf-8")
    assert golden(name).is_file(), f"{golden(name)} is missing; this module says how to renew it"
    assert table == golden(name).read_text(encoding="utf-8")


def test_there_is_no_file_without_a_case():
    assert sorted(GOLDEN.iterdir()) == sorted(map(golden, CASES))
