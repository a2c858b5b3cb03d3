"""Which weights can be followed in parameter space, and where they are in an optimizer's tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantjax import errors
from quantjax.planning import Plan
from quantjax.selectors import Selector
from quantjax.transforms.stored import StoredWeight, stored_weights


def followed_weights(plan: Plan, select: Selector | None) -> list[StoredWeight]:
    """The weights to follow; those that are selected must be such that can be."""
    stored = {weight.entry.site.name: weight for weight in stored_weights(plan)}
    chosen: list[StoredWeight] = []
    rows = tuple(entry.site for entry in plan.sites)
    select = None if select is None else select.resolved(rows)
    for entry in plan.quantized:
        if not any(operand.is_weight for operand in entry.quantized):
            continue
        if select is not None and not select.matches(entry.site):
            continue
        weight = stored.get(entry.site.name)
        reason = _obstacle(weight)
        if weight is not None and not reason:
            chosen.append(weight)
        elif select is not None:
            raise errors.TrainingError(
                "the codes of a weight cannot be followed at a parameter",
                where=f"site {entry.site.name} ({entry.site.op.value})",
                why=reason,
                fix="select= without this site",
            )
    _check_chosen(chosen, select)
    return chosen


def _obstacle(weight: StoredWeight | None) -> str:
    """Why a weight cannot be followed; empty where it can."""
    if weight is None:
        return "it is computed from parameters, or its range is live"
    quantizer = weight.operand.quantizer
    assert quantizer is not None
    if quantizer.format.largest_centered_code(symmetric=quantizer.symmetric) is None:
        return f"the levels of {quantizer.format.name} are no integers"
    if not quantizer.format.is_elementwise(()):
        return f"the codes of {quantizer.format.name} differ from width to width"
    if quantizer.estimator.transform is not None:
        return f"{quantizer.estimator.name} rounds a function of it"
    return ""


def _check_chosen(chosen: Iterable[StoredWeight], select: Selector | None) -> None:
    sites: dict[str, str] = {}
    for weight in chosen:
        name = weight.entry.site.name
        if weight.path in sites:
            raise errors.TrainingError(
                f"the parameter {weight.path} is the weight of two sites",
                where=f"{sites[weight.path]} and {name}",
                why="each has QParams of its own, and a parameter has one value",
                fix=f"select=qj.path({name!r})",
            )
        sites[weight.path] = name
    if not sites:
        asked = f"'{select}' selects" if select is not None else "the plan has"
        raise errors.TrainingError(
            f"{asked} no weight whose codes can be followed",
            where="qj.training.freeze_oscillations",
            why="it has to be one parameter, in integer codes, with a fixed range",
            fix="plan with qj.weight_quantizer(bits=4) for such weights",
        )


def places_in(paths: list[str], leaves: Mapping[str, Any]) -> dict[str, str]:
    """Where the planned parameters are in a tree that is the planned one, a part of it, or more."""
    first = paths[0]
    heads = ["", *(first[: i + 1] for i, letter in enumerate(first) if letter == "/")]
    for head in heads:
        if not all(path.startswith(head) for path in paths):
            continue
        within = [path[len(head) :] for path in paths]
        around = [leaf.removesuffix(within[0]) for leaf in leaves if leaf.endswith(within[0])]
        for outer in sorted(around, key=len):  # as little around it as there is
            whole = not outer or outer.endswith("/")
            if whole and all(outer + path in leaves for path in within):
                return {path: outer + part for path, part in zip(paths, within, strict=True)}
    raise errors.TrainingError(
        f"the parameter {first}, or one of {len(paths) - 1} others, is not in the tree",
        where="qj.training.freeze_oscillations",
        why=f"the tree has {', '.join(list(leaves)[:6]) or 'no leaf'}",
        fix="init with the parameters that were planned for, or select= the sites among them",
    )
