"""Selectors that look at the whole table: the first sites, the last, the costliest, shared ones."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from quantjax import errors
from quantjax.arguments import expect
from quantjax.interpreter import Site, SiteStatus
from quantjax.selectors import Named, Selector, weighted


@dataclasses.dataclass(frozen=True)
class _Relative(Selector):
    """Base of those that become names once the table is known."""

    among: Selector

    def matches(self, site: Site) -> bool:
        """Raises: one row does not tell."""
        raise errors.PolicyError(
            f"the selector '{self}' needs the whole table",
            where=f"site {site.name}",
            why="which site is first, last or costly depends on the others",
            fix="selector.resolved(table.sites).matches(site)",
        )

    def resolved(self, sites: Sequence[Site]) -> Selector:
        """The names that it stands for in this table."""
        among = self.among.resolved(sites)
        usable = [s for s in sites if s.status is SiteStatus.REWRITABLE and among.matches(s)]
        return Named(frozenset(site.name for site in self.chosen(usable)))

    @abc.abstractmethod
    def chosen(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Which of the sites that can be rewritten, in program order."""


@dataclasses.dataclass(frozen=True)
class First(_Relative):
    """The first sites of the program."""

    count: int

    def chosen(self, sites: Sequence[Site]) -> Sequence[Site]:
        """In program order."""
        return sites[: self.count]

    def __str__(self) -> str:
        return f"first {self.count} of {self.among}"


@dataclasses.dataclass(frozen=True)
class Last(_Relative):
    """The last sites of the program."""

    count: int

    def chosen(self, sites: Sequence[Site]) -> Sequence[Site]:
        """In program order."""
        return sites[max(len(sites) - self.count, 0) :]

    def __str__(self) -> str:
        return f"last {self.count} of {self.among}"


@dataclasses.dataclass(frozen=True)
class Costliest(_Relative):
    """The fewest sites that together have a share of all multiply-adds."""

    share: float

    def chosen(self, sites: Sequence[Site]) -> Sequence[Site]:
        """The most expensive first, until the share is reached; of equal ones the earlier."""
        wanted = self.share * sum(site.multiply_adds for site in sites)
        found: list[Site] = []
        total = 0
        for site in sorted(sites, key=lambda site: -site.multiply_adds):
            if total >= wanted:
                break
            found.append(site)
            total += site.multiply_adds
        return found

    def __str__(self) -> str:
        return f"{self.share:.0%} of the multiply-adds of {self.among}"


@dataclasses.dataclass(frozen=True)
class FirstUse(_Relative):
    """The first site in the program for each weight."""

    def chosen(self, sites: Sequence[Site]) -> Sequence[Site]:
        """In program order; a weight made of several parameters is new if one of them is."""
        seen: set[str] = set()
        found = []
        for site in sites:
            if site.weight is None:
                continue
            paths = set(site.weight.paths or (site.name,))
            if not paths <= seen:
                found.append(site)
            seen |= paths
        return found

    def __str__(self) -> str:
        return f"first use of {self.among}"


@dataclasses.dataclass(frozen=True)
class EveryUse(_Relative):
    """Some sites, and all others that have a weight of the same parameters."""

    def resolved(self, sites: Sequence[Site]) -> Selector:
        """Opaque ones too: what shares a weight does not depend on what can be rewritten."""
        return Named(frozenset(site.name for site in self.chosen(sites)))

    def chosen(self, sites: Sequence[Site]) -> Sequence[Site]:
        """In program order."""
        among = self.among.resolved(sites)
        matched = {site.name for site in sites if among.matches(site)}
        shared = {path for site in sites if site.name in matched for path in site.weight_paths}
        return [s for s in sites if s.name in matched or not shared.isdisjoint(s.weight_paths)]

    def __str__(self) -> str:
        return f"every use of {self.among}"


def _among(selector: Selector | None) -> Selector:
    """What a relative selector chooses from: by default what has a weight."""
    if selector is None:
        return weighted()
    fix = 'qj.first(qj.path("*/Dense_0/*"))'
    expect(selector, Selector, argument="selector", where="a selector among others", fix=fix)
    return selector


def first(selector: Selector | None = None, *, count: int = 1) -> Selector:
    """The first ``count`` sites in program order of those that ``selector`` matches.

    Args:
      selector: by default every site with a weight; opaque ones do not count.

    >>> str(first())
    'first 1 of weighted'
    """
    return First(_among(selector), _positive(count))


def last(selector: Selector | None = None, *, count: int = 1) -> Selector:
    """The last ``count`` sites; as :func:`first`."""
    return Last(_among(selector), _positive(count))


def costliest(share: float, selector: Selector | None = None) -> Selector:
    """The fewest sites that have a share of all multiply-adds: what is worth quantizing.

    Args:
      share: in 0..1, of the sites that ``selector`` matches.

    >>> str(costliest(0.9))
    '90% of the multiply-adds of weighted'
    """
    if not 0.0 < share <= 1.0:
        raise errors.PolicyError(f"a share of {share}", fix="a number above 0 and up to 1")
    return Costliest(_among(selector), share)


def first_use(selector: Selector | None = None) -> Selector:
    """The first site for each weight: without the backward pass of ``jax.grad``, what it computes
    again under ``jax.checkpoint``, and further uses of tied weights.

    Args:
      selector: of which sites; by default every site with a weight.

    >>> import jax, jax.numpy as jnp, quantjax as qj
    >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"])
    >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    >>> table = qj.sites(jax.grad(loss), params, jnp.ones((3, 2)))
    >>> [[s.name for s in table if chosen.resolved(table.sites).matches(s)]
    ...  for chosen in (weighted(), first_use())]
    [['a', 'b', 'b#1'], ['a', 'b']]
    """
    return FirstUse(_among(selector))


def every_use(selector: Selector) -> Selector:
    """What ``selector`` matches, and every other site with a weight of the same parameters.

    So that a tied table, a backward product or what ``jax.checkpoint`` computes again has the
    widths of the product that was meant.

    >>> str(every_use(first()))
    'every use of first 1 of weighted'
    """
    return EveryUse(selector)


def _positive(count: int) -> int:
    if count < 1:
        raise errors.PolicyError(f"a count of {count} sites", fix="count=1, or more")
    return count
