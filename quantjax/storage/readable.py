"""A policy, the sites that it was planned for, and QParams, in one JSON file that people can read.

A file of version 1 is an object with the keys ``schema`` (``"quantjax.quantization"``),
``version``, and any of ``policy``, ``sites`` and ``qstate``. Configuration is written as
:func:`quantjax.storage.codec.encode` writes it; an array as ``{"shape": [...], "values": [...]}``,
its float32 values in row-major order, each with the fewest digits that give the same bits back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quantjax import errors
from quantjax.affine import QParams
from quantjax.arguments import expect
from quantjax.interpreter import Site
from quantjax.planning import Plan, first_difference, plan, site_text
from quantjax.policy import Policy
from quantjax.storage.arrays import decode_array, encode_array
from quantjax.storage.codec import Json, decode_known, encode
from quantjax.storage.document import read_document, write_document
from quantjax.storage.known import with_extra
from quantjax.storage.tree import check_keys, check_there, decode_tree, encode_tree
from quantjax.table import SiteTable
from quantjax.transforms.calibrate import QState

QUANTIZATION_SCHEMA = "quantjax.quantization"
QUANTIZATION_VERSION = 1


class Quantization(NamedTuple):
    """What a file holds; None for what it does not.

    Attributes:
      policy: the rules.
      sites: the rows that it was planned for, in program order.
      qstate: QParams by site and operand.
    """

    policy: Policy | None = None
    sites: tuple[Site, ...] | None = None
    qstate: QState | None = None


def save_quantization(
    path: str | os.PathLike[str],
    *,
    policy: Policy | None = None,
    plan: Plan | None = None,
    qstate: Mapping[str, Mapping[str, QParams]] | None = None,
) -> None:
    """Write a policy, a plan or QParams to one JSON file, whole or not at all.

    Args:
      path: the file; an older one is replaced once the new one is complete.
      policy: the rules; ``plan`` brings its own.
      plan: from ``qj.plan``; its sites are written, so that loading can tell another model.
      qstate: from ``qj.calibrate``; float32 arrays of known values, bit by bit.

    Raises:
      StorageError: nothing to write, a plan of another policy, values that no file can hold, or a
        path that cannot be written.

    >>> import pathlib, tempfile
    >>> from quantjax.policy import uniform_policy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "policy.json"
    ...     save_quantization(path, policy=uniform_policy(weight_bits=4))
    ...     print(load_quantization(path).policy)
    weighted: w=int4/channel a=uint8/tensor
    """
    path = Path(path)
    for name, value, kind, fix in (
        ("policy", policy, Policy, "policy=qj.uniform_policy()"),
        ("plan", plan, Plan, "plan=qj.plan(policy, table)"),
        ("qstate", qstate, Mapping, "qstate=qj.calibrate(plan, state, params)"),
    ):
        if value is not None:
            expect(value, kind, argument=name, where="save_quantization", fix=fix)
    if plan is not None:
        if policy is not None and policy != plan.policy:
            raise errors.StorageError(
                "the plan was made from another policy",
                where=path.name,
                fix="give the plan alone; its policy is written with it",
            )
        policy = plan.policy
    if policy is None and qstate is None:
        raise errors.StorageError(
            "there is nothing to write", where=path.name, fix="policy=, plan= or qstate="
        )
    body: dict[str, Json] = {}
    if policy is not None:
        body["policy"] = encode(policy, at="policy")
    if plan is not None:
        rows = tuple(entry.site for entry in plan.sites)
        body["sites"] = encode(rows, at="sites")
    if qstate is not None:
        body["qstate"] = _encode_qstate(qstate)
    write_document(path, body, schema=QUANTIZATION_SCHEMA, version=QUANTIZATION_VERSION)


def load_quantization(path: str | os.PathLike[str], *, extra: Sequence[Any] = ()) -> Quantization:
    """Read what :func:`save_quantization` wrote.

    Args:
      path: the file.
      extra: the user's own formats, granularities, selectors, roundings, estimators and range
        rules that the policy names: classes or values.

    Raises:
      StorageError: no such file, no file of this kind, a newer version, or a name that is neither
        the library's nor in ``extra``.
    """
    path = Path(path)
    data = read_document(path, schema=QUANTIZATION_SCHEMA, version=QUANTIZATION_VERSION)
    unknown = sorted(set(data) - set(Quantization._fields))
    if unknown:
        raise errors.StorageError(
            f"the file has a part that is not known: '{unknown[0]}'",
            where=path.name,
            why=f"its parts: {', '.join(Quantization._fields)}",
            fix="remove it, or correct its name",
        )
    known = with_extra(extra)
    policy = sites = qstate = None
    if "policy" in data:
        policy = decode_known(data["policy"], known, f"{path.name}: policy")
        _check_part(isinstance(policy, Policy), "policy", path)
    if "sites" in data:
        sites = decode_known(data["sites"], known, f"{path.name}: sites")
        rows = isinstance(sites, tuple) and all(isinstance(site, Site) for site in sites)
        _check_part(rows, "sites", path)
    if "qstate" in data:
        qstate = _decode_qstate(data["qstate"], extra, f"{path.name}: qstate")
    return Quantization(policy, sites, qstate)


def plan_from(quantization: Quantization, table: SiteTable) -> Plan:
    """Plan the saved policy for a model, which must have the sites that were saved with it.

    Sizes of activations may differ, everything that a plan relies on may not. Without saved sites
    nothing is compared.

    Args:
      quantization: from :func:`load_quantization`.
      table: from ``qj.sites(f, params, x)``.

    Raises:
      PlanMismatchError: the first row that differs.
      StorageError: no policy was saved.
    """
    fix = "plan_from(load_quantization(path), qj.sites(f, params, x))"
    where = "quantjax.storage.plan_from"
    expect(quantization, Quantization, argument="quantization", where=where, fix=fix)
    expect(table, SiteTable, argument="table", where=where, fix=fix)
    if quantization.policy is None:
        raise errors.StorageError(
            "there is no policy to plan with",
            fix="qj.plan(policy, table) with a policy of your own, or save one",
        )
    if quantization.sites is not None:
        _check_sites(quantization.sites, table)
    return plan(quantization.policy, table)


def _check_sites(saved: Sequence[Site], table: SiteTable) -> None:
    difference = first_difference(saved, table.sites)
    if difference is None:
        return
    again = "plan again: qj.plan(quantization.policy, table)"
    row, site = difference
    if row is None:
        assert site is not None
        raise errors.PlanMismatchError(
            "the model has a site that was not saved",
            where=f"site {site.name} ({site.op.value})",
            fix=again,
        )
    raise errors.PlanMismatchError(
        "the model is not the one that was saved",
        where=f"site {row.name} ({row.op.value})",
        why=f"saved with {site_text(row)}; "
        + (f"found {site_text(site)}" if site is not None else "the model has no such site"),
        fix=again,
    )


def _check_part(holds: object, name: str, path: Path) -> None:
    if not holds:
        raise errors.StorageError(
            f"the part '{name}' holds something else",
            where=path.name,
            fix="write the file again, or correct it where it was edited by hand",
        )


def _encode_qstate(qstate: Mapping[str, Mapping[str, QParams]]) -> Json:
    found: dict[str, Json] = {}
    for site, operands in qstate.items():
        where, fix = f"qstate: {site}", 'qstate={"site": {"weight": qparams}}'
        expect(operands, Mapping, argument="an entry", where=where, fix=fix)
        found[site] = {key: _encode_qparams(q, f"{where}, {key}") for key, q in operands.items()}
    return found


def _encode_qparams(qparams: Any, at: str) -> Json:
    if not isinstance(qparams, QParams):
        raise errors.StorageError(
            f"a {type(qparams).__name__} where QParams should be",
            where=at,
            fix="give what qj.calibrate returned: {site: {operand: QParams}}",
        )
    check_there(qparams._asdict(), at)
    return {
        name: encode_tree(part, encode_array, at=f"{at}, {name}")
        if name == "theta"
        else encode_array(part, f"{at}, {name}")
        for name, part in qparams._asdict().items()
    }


def _decode_qstate(data: Json, extra: Sequence[Any], at: str) -> QState:
    if not isinstance(data, dict) or not all(isinstance(part, dict) for part in data.values()):
        check_keys(None, ("site", "operand"), at)
    state: QState = {}
    for site, operands in data.items():
        state[site] = {}
        for key, parts in operands.items():
            place = f"{at}, {site}, {key}"
            check_keys(parts, QParams._fields, place)
            check_there(parts, place)
            leaves = {
                name: decode_tree(part, decode_array, extra=extra, at=f"{place}, {name}")
                if name == "theta"
                else decode_array(part, f"{place}, {name}")
                for name, part in parts.items()
            }
            state[site][key] = QParams(**leaves)
    return state
