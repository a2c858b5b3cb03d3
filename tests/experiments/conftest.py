"""Fixtures of the data tests: a mirror, and an environment that names no folder and no proxy."""

from collections.abc import Iterator

import pytest

from tests.experiments.mirror import Mirror, serve, use_no_proxy


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    use_no_proxy(monkeypatch)
    monkeypatch.delenv("QUANTJAX_DATA", raising=False)
    return monkeypatch


@pytest.fixture
def mirror(bare: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with serve() as running:
        yield running
