"""A study: a model, its data, how to train it, and where to quantize."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import numbers
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from quantjax import errors
from quantjax.arguments import expect
from quantjax.policy import Policy

OnStep = Callable[[int], None]

MEANING = "3"
"""Of a row: counts up where a cell comes to mean something else. 2: the float baseline is float
behind quantized outputs and biases. 3: rules that a policy names stay."""


_EXAMPLES = {
    "name": '"digits"',
    "identity": '"digits, CNN 16-32, 30 epochs"',
    "policy": "qj.uniform_policy(), or qj.Policy([qj.rule(qj.weighted(), scheme)])",
    "train_steps": "300",
}
_CALLED_WITH = {
    "apply": ("params", "inputs"),
    "train": ("seed", "on_step"),
    "calibration": (),
    "test": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a sweep varies the widths of.

    Attributes:
      name: what results are filed under.
      apply: ``(params, inputs) -> logits``; any JAX function.
      train: ``(seed, on_step) -> params``; calls ``on_step(1)`` after each of ``train_steps``. What
        it returns is kept for the next run where it is made of dicts with string keys and lists.
      train_steps: for the progress bar.
      calibration: batches of inputs, in order.
      test: inputs and integer labels, never seen in training or calibration.
      policy: where to quantize; its formats' containers bound the widths.
      identity: text that changes whenever anything changes that the results depend on: data,
        model, training, and the code of range rules, selectors, formats and estimators of your
        own, which the sweep knows by their names, fields and numbers only. Results of another
        identity are never mixed in.

    Raises:
      ArgumentError, SweepError: a field of another kind, a name that is no folder's, a function
        that cannot be called as said.
    """

    name: str
    apply: Callable[[Any, jax.Array], jax.Array]
    train: Callable[[int, OnStep], Any]
    train_steps: int
    calibration: Callable[[], Sequence[jax.Array]]
    test: Callable[[], tuple[jax.Array, jax.Array]]
    policy: Policy
    identity: str

    def __post_init__(self) -> None:
        kinds = {"name": str, "identity": str, "policy": Policy, "train_steps": numbers.Real}
        for name, kind in kinds.items():
            fix = f"{name}={_EXAMPLES[name]}"
            expect(getattr(self, name), kind, argument=name, where="a study", fix=fix)
        own = Path(self.name)
        if not own.parts or own.is_absolute() or ".." in own.parts or not self.name.isprintable():
            raise errors.SweepError(
                f"a study called {self.name!r:.80}",
                where="a study",
                why="results are filed in a folder of that name, and by it",
                fix=f"name={_EXAMPLES['name']}",
            )
        for name, given in _CALLED_WITH.items():
            _check_callable(self, name, given)

    def fingerprint(self) -> str:
        """Short digest of the identity, the policy, and the versions and backend that compute."""
        computed_by = [version("jax"), version("quantjax"), jax.default_backend()]
        text = "\n".join([MEANING, self.name, self.identity, repr(self.policy.rules), *computed_by])
        without_addresses = re.sub(r" at 0x[0-9a-f]+", "", text)
        return hashlib.sha256(without_addresses.encode()).hexdigest()[:12]


def _check_callable(study: Study, name: str, given: tuple[str, ...]) -> None:
    """Raise ``SweepError`` for what is no function of these arguments, as far as can be seen."""
    function = getattr(study, name)
    why = f"it is {type(function).__name__}"
    if callable(function):
        try:
            inspect.signature(function).bind(*given)
        except TypeError as error:
            why = str(error)
        except ValueError:  # a builtin function, which has no signature
            return
        else:
            return
    called = f"{name}({', '.join(given)})"
    raise errors.SweepError(
        f"{name} cannot be called as {called}",
        where=f"study {study.name}",
        why=why,
        fix=f"{name}=a function that is called as {called}",
    )
