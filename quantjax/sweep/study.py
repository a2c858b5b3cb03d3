"""A study: a model, its data, how to train it, and where to quantize."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax

from quantjax.policy import Policy

OnStep = Callable[[int], None]

MEANING = "3"
"""Of a row: counts up where a cell comes to mean something else. 2: the float baseline is float
behind quantized outputs and biases. 3: rules that a policy names stay."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a sweep varies the widths of.

    Attributes:
      name: what results are filed under.
      apply: ``(params, inputs) -> logits``; any JAX function.
      train: ``(seed, on_step) -> params``; calls ``on_step(1)`` after each of ``train_steps``.
      train_steps: for the progress bar.
      calibration: batches of inputs, in order.
      test: inputs and integer labels, never seen in training or calibration.
      policy: where to quantize; its formats' containers bound the widths.
      identity: text that changes whenever anything changes that the results depend on: data,
        model, training, and the code of range rules, selectors, formats and estimators of your
        own, which the sweep knows by their names and fields only. Results of another identity are
        never mixed in.
    """

    name: str
    apply: Callable[[Any, jax.Array], jax.Array]
    train: Callable[[int, OnStep], Any]
    train_steps: int
    calibration: Callable[[], Sequence[jax.Array]]
    test: Callable[[], tuple[jax.Array, jax.Array]]
    policy: Policy
    identity: str

    def fingerprint(self) -> str:
        """Short digest of the identity, the policy, and the versions and backend that compute."""
        computed_by = [version("jax"), version("quantjax"), jax.default_backend()]
        text = "\n".join([MEANING, self.name, self.identity, repr(self.policy.rules), *computed_by])
        without_addresses = re.sub(r" at 0x[0-9a-f]+", "", text)
        return hashlib.sha256(without_addresses.encode()).hexdigest()[:12]
