"""What every error has to say."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from quantjax import errors


@contextmanager
def refused(kind: type[errors.QuantjaxError], *fragments: str) -> Iterator[None]:
    """The block raises ``kind``, whose text holds all fragments and an edit to try."""
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    missing = [f for f in (*fragments, "\n  try:   ") if f not in text]
    assert not missing, f"{missing} missing from:\n{text}"
    assert caught.value.fix.strip()
