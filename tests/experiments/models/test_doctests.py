"""The examples in docstrings of models and importers; pytest collects only those of quantjax."""

import doctest

import pytest

from experiments.models import attention, decoder, kv_cache, lstm
from experiments.pretrained import evaluate, resnet, state_dict, tokenizer


@pytest.mark.parametrize(
    "module",
    [attention, decoder, kv_cache, lstm, evaluate, resnet, state_dict, tokenizer],
    ids=lambda module: module.__name__,
)
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
