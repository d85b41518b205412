"""Concept balancing: rare tags more often, and chosen tags with a chosen share of the samples.

    w_i = b_i · max_{t ∈ tags(i)} f_t^{−α}                                    rarity
    w_i ← w_i · exp Σ_{t ∈ tags(i)} λ_t,   λ such that Σ_i w_i [t ∈ tags(i)] = p_t    the prior

b_i is what the data themselves say (equal, or a mixture's shares), f_t the share of a tag under b.
The exponent is that of repeat factors by the rarest category (Gupta et al., arXiv 1908.03195,
with α = ½). The tilt of the prior is the smallest change, in KL divergence, that gives the tags
their shares; it is found by raking (iterative proportional fitting, Deming and Stephan 1940).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from flux2.data.order import (
    Law,
    Redrawn,
    describe_all,
    digest,
    law_of,
    table,
    tags_of,
)
from flux2.data.record import Dataset
from flux2.errors import InputError

SHOWN = 20
"""Tags in the table, besides those of the prior."""
SWEEPS = 2000
"""Of raking, before shares are refused as unreachable."""


@dataclass(frozen=True, eq=False, repr=False)
class Balanced(Redrawn):
    """A dataset whose records are drawn by their tags. It changes no record.

    Attributes:
        dataset: whose records have tags.
        tags: the field of the meta that has them: a string, or a list of strings.
        exponent: α, from 0 (rarity does not matter) to 1 (single tags become equally frequent).
        prior: tag → share of the samples that have it, 0 < share < 1; tags that are not named go
            as they come.

    Raises:
        InputError: no record has tags, a prior's tag that none has, a share or an exponent outside
            its range, shares that no weights give.
    """

    dataset: Dataset
    tags: str = "tags"
    exponent: float = 0.0
    prior: Mapping[str, float] | None = None
    _names: tuple[str, ...] = field(init=False)
    _rows: tuple[np.ndarray, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 1:
            raise InputError(f"data.dataset.exponent is {self.exponent}: give 0 to 1")
        found: dict[str, list[int]] = {}
        for index, record in enumerate(describe_all(self.dataset)):
            for tag in () if record is None else tags_of(record, self.tags):
                found.setdefault(tag, []).append(index)
        if not found:
            raise InputError(
                f"no record has {self.tags!r} in its meta: name the field of the tags by "
                "data.dataset.tags"
            )
        for tag, share in (self.prior or {}).items():
            if tag not in found:
                known = ", ".join(sorted(found, key=lambda t: -len(found[t]))[:8])
                raise InputError(f"data.dataset.prior: no record has {tag!r}; there are {known}")
            if not 0 < share < 1:
                raise InputError(f"data.dataset.prior.{tag} is {share}: give a share above 0 and "
                                 "below 1, or leave records out by a filter")  # fmt: skip
        object.__setattr__(self, "_names", tuple(found))
        object.__setattr__(self, "_rows", tuple(np.asarray(rows) for rows in found.values()))
        self.law(0)  # refuses shares that cannot be had

    def law(self, step: int) -> Law:
        """The dataset's law, tilted."""
        inner = law_of(self.dataset, step)
        if inner.once:
            return self._tilted(inner)
        if inner.since not in self._laws:
            self._laws[inner.since] = self._tilted(inner)
        return self._laws[inner.since]

    @functools.cached_property
    def _laws(self) -> dict[int, Law]:
        return {}

    def _tilted(self, inner: Law) -> Law:
        base = inner.shares(len(self))
        weights = base.copy()
        if self.exponent:
            factor = np.zeros(len(self))
            for rows in self._rows:
                share = base[rows].sum()
                if share:
                    factor[rows] = np.maximum(factor[rows], share**-self.exponent)
            # A record without tags is as common as what is most common.
            factor[factor == 0] = factor[factor > 0].min()
            weights *= factor
        prior = {t: (self._rows[self._names.index(t)], s) for t, s in (self.prior or {}).items()}
        return Law(inner.since, rake(weights / weights.sum(), prior), inner.parts, inner.once)

    def report(self) -> Iterator[str]:
        """A table of the tags: raw share, target, and what the first step's law achieves."""
        base, law = law_of(self.dataset, 0).shares(len(self)), self.law(0)
        won = law.shares(len(self))
        order = sorted(range(len(self._names)), key=lambda k: -len(self._rows[k]))
        told = [k for k in order if self._names[k] in (self.prior or {})]
        told += [k for k in order if k not in told][:SHOWN]
        rows = []
        for k in told:
            name, mine = self._names[k], self._rows[k]
            target = (self.prior or {}).get(name)
            rows.append([
                name, str(len(mine)), f"{base[mine].sum():.2%}",
                "-" if target is None else f"{target:.2%}", f"{won[mine].sum():.2%}",
            ])  # fmt: skip
        yield from table([self.tags, "records", "raw", "target", "achieved"], rows)
        if len(order) > len(told):
            yield f"and {len(order) - len(told)} rarer"
        support, top = int((won > 0).sum()), int(won.argmax())
        yield (
            f"record {top} is drawn most, {won[top] * support:.3g} times an epoch; the weights "
            f"leave the variety of {1 / (won**2).sum() / support:.0%} of {support} records"
        )

    def __repr__(self) -> str:
        return f"Balanced({digest(self.identity)})"


def rake(
    weights: np.ndarray, targets: Mapping[str, tuple[np.ndarray, float]], tolerance: float = 1e-9
) -> np.ndarray:
    """The weights nearest to these, in KL divergence, under which tags have their shares.

    weights: n, which sum to 1; targets: tag → (rows that have it, share) → n, which sum to 1.

    Raises:
        InputError: no weights do, as where tags that exclude each other are to have over 1.
    """
    weights, missed = weights.copy(), ("", 0.0)
    for _ in range(SWEEPS):
        missed = ("", 0.0)
        for tag, (rows, share) in targets.items():
            now = float(weights[rows].sum())
            missed = max(missed, (tag, abs(now - share)), key=lambda m: m[1])
            if not 0 < now < 1 - 1e-15:
                raise InputError(f"data.dataset.prior.{tag} is {share} and has {now:.3g} whatever "
                                 "the weights: change the prior")  # fmt: skip
            others = (1 - share) / (1 - now)
            scale = np.full(len(weights), others)
            scale[rows] = share / now
            weights *= scale
        if missed[1] <= tolerance:
            return weights
        weights /= weights.sum()
    raise InputError(
        f"data.dataset.prior: no weights give all the shares together ({missed[0]!r} is missed by "
        f"{missed[1]:.2%}): tags that come together, or exclude each other, bind the others"
    )
