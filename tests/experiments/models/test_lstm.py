"""The recurrent language model: against NumPy, and what a recurrence is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments.models.errors import ModelShapeError
from experiments.models.lstm import LanguageLSTM
from tests.experiments.models.oracles import in_double, lstm, tokens, variables_of

MODEL = LanguageLSTM(vocabulary=11, width=4, hidden=6, layers=2)
TOKENS = tokens(1, 11, 3, 7)
VARIABLES = variables_of(MODEL, TOKENS)


def test_logits_are_those_of_numpy():
    params = in_double(VARIABLES["params"])
    x = params["embedding"]["embedding"][np.asarray(TOKENS)]
    for index in range(2):
        x = lstm(params[f"layer{index}"], x)
    expected = x @ params["linear"]["kernel"] + params["linear"]["bias"]
    np.testing.assert_allclose(jax.jit(MODEL.apply)(VARIABLES, TOKENS), expected, atol=1e-5)


def test_a_token_changes_what_follows_it_alone():
    other = TOKENS.at[:, 3].add(1) % 11
    before, after = (jax.jit(MODEL.apply)(VARIABLES, text) for text in (TOKENS, other))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert not np.allclose(before[:, 3:], after[:, 3:], atol=1e-4)


def test_time_steps_share_their_sites():
    short, long = (
        [s.name for s in qj.sites(MODEL.apply, VARIABLES, TOKENS[:, :length])] for length in (3, 7)
    )
    assert short == long
    for gate in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho"):
        assert any(f"layer0/{gate}/kernel" in name for name in short)
    assert "params/linear/kernel" in short


@pytest.mark.parametrize(
    "text",
    [jnp.zeros(3, jnp.int32), jnp.zeros((2, 3)), jnp.int32(0)],
    ids=["rank", "float", "scalar"],
)
def test_other_tokens_are_refused(text):
    with pytest.raises(ModelShapeError, match="try:"):
        MODEL.apply(VARIABLES, text)
