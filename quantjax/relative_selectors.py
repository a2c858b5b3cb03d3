"""Selectors that look at the whole table: the first sites, the last, those that cost most."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from quantjax import errors
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

    def chosen(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Which of the sites that can be rewritten, in program order."""
        raise NotImplementedError


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


def first(selector: Selector | None = None, *, count: int = 1) -> Selector:
    """The first ``count`` sites in program order of those that ``selector`` matches.

    Args:
      selector: by default every site with a weight; opaque ones do not count.

    >>> str(first())
    'first 1 of weighted'
    """
    return First(selector or weighted(), _positive(count))


def last(selector: Selector | None = None, *, count: int = 1) -> Selector:
    """The last ``count`` sites; as :func:`first`."""
    return Last(selector or weighted(), _positive(count))


def costliest(share: float, selector: Selector | None = None) -> Selector:
    """The fewest sites that have a share of all multiply-adds: what is worth quantizing.

    Args:
      share: in 0..1, of the sites that ``selector`` matches.

    >>> str(costliest(0.9))
    '90% of the multiply-adds of weighted'
    """
    if not 0.0 < share <= 1.0:
        raise errors.PolicyError(f"a share of {share}", fix="a number above 0 and up to 1")
    return Costliest(selector or weighted(), share)


def _positive(count: int) -> int:
    if count < 1:
        raise errors.PolicyError(f"a count of {count} sites", fix="count=1, or more")
    return count
