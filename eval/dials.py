"""Dials that tell a policy that pleases its reward from one that gets better, and when they say so.

A dial is a number a step: statistics of the rollouts' images, what the method logs of itself, or
means over held-out samples. Its first steps are its baseline. It is flagged where it has moved by
more than is harmless, and by more than chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from einops import rearrange
from torch import Tensor

from eval.diversity import mean_distances
from flux2.errors import InputError
from flux2.types import Batch

# ---------------------------------------------------------------- what is seen in images

SIDE: Final = 256
"""Pixels a side of an image that are looked at: more do not change these numbers."""
DARK: Final = 0.1
"""Luma (of 1) below which a pixel is dark: black on most screens."""
EDGE: Final = 0.08
"""Difference of neighbouring pixels' luma (of 1) from which there is an edge."""
PATCH: Final = 16
"""Pixels a side of FLUX.2's tokens: seams show at this period."""
LUMA: Final = (0.299, 0.587, 0.114)
FLOOR: Final = 1e-9
"""Power of a plain image's spectrum, below that of rounding to 8 bits: 0 has no logarithm."""
IMAGE: Final = ("dark", "saturation", "colour_entropy", "edges", "grid", "diversity")


@dataclass(frozen=True)
class ImageDials:
    """Statistics of images that a hacked reward is often paid with: a Metric.

        dark            share of pixels with luma below DARK
        saturation      mean of max − min over R, G and B, of 1
        colour_entropy  bits of the distribution over 8 × 8 × 8 cells of RGB, 0 to 9
        edges           share of neighbouring pixels (across and down) that differ by EDGE in luma
        grid            spectral grid score: log10 of the power at the period of PATCH pixels and
                        its harmonics over that half-way between them, averaged; 0 without seams
        diversity       mean RMS distance to the prompt's other images, as 8 × 8 thumbnails, of 1;
                        NaN for an image that is alone
    """

    @property
    def engine(self) -> str:
        """See `rewards.base.Scorer`."""
        return f"dials(dark={DARK}, edge={EDGE}, patch={PATCH}, side={SIDE})"

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """images: b 3 h w uint8 → values, each b fp32 on the CPU."""
        stride = max(1, -(-max(images.shape[-2:]) // SIDE))
        thin = images[..., ::stride, ::stride]
        rgb = thin.float() / 255
        crop = luma(_centre(images).float() / 255)
        thumbs = torch.nn.functional.adaptive_avg_pool2d(rgb, 8).flatten(1)
        found = {
            "dark": (luma(rgb) < DARK).float().mean((1, 2)),
            "saturation": (rgb.amax(1) - rgb.amin(1)).mean((1, 2)),
            "colour_entropy": colour_entropy(thin),
            "edges": edges(crop),
            "grid": grid_score(crop),
        }
        found = {name: values.cpu() for name, values in found.items()}
        apart = mean_distances(thumbs.cpu(), batch.groups.cpu()) / thumbs.shape[1] ** 0.5
        return {**found, "diversity": apart}


def luma(rgb: Tensor) -> Tensor:
    """b 3 h w → b h w."""
    return (rgb * rgb.new_tensor(LUMA)[:, None, None]).sum(1)


def _centre(images: Tensor) -> Tensor:
    """The middle, at most SIDE a side, in whole pairs of patches where there are any."""
    sides = []
    for length in images.shape[-2:]:
        keep = min(length, SIDE)
        keep -= keep % (2 * PATCH) if keep >= 2 * PATCH else 0
        sides.append(slice((length - keep) // 2, (length - keep) // 2 + keep))
    return images[..., sides[0], sides[1]]


def colour_entropy(images: Tensor) -> Tensor:
    """images: b 3 h w uint8 → bits, b."""
    r, g, b = (images >> 5).long().flatten(2).unbind(1)
    cells = r * 64 + g * 8 + b  # b (h w)
    counts = torch.zeros(len(cells), 512, device=cells.device)
    counts.scatter_add_(1, cells, torch.ones_like(cells, dtype=counts.dtype))
    return torch.special.entr(counts / cells.shape[1]).sum(1) / math.log(2)


def edges(y: Tensor) -> Tensor:
    """Luma b h w → share of edges, b."""
    pairs = [(y.diff(dim=d).abs() > EDGE).float().flatten(1) for d in (1, 2)]
    return torch.cat(pairs, 1).mean(1)


def grid_score(y: Tensor) -> Tensor:
    """Luma b h w → the spectral grid score, b; NaN for an image smaller than four patches.

    Rows and columns have Hann's window, so that an image's border is no seam; its main lobe, two
    frequencies wide, ends before the half-way points.
    """
    if min(y.shape[1:]) < 4 * PATCH:
        return y.new_full(y.shape[:1], torch.nan)
    return (_grid(y) + _grid(rearrange(y, "b h w -> b w h"))) / 2


def _grid(y: Tensor) -> Tensor:
    width = y.shape[2]
    window = torch.hann_window(width, periodic=True, device=y.device)
    rows = (y - y.mean(2, keepdim=True)) * window
    power = torch.fft.rfft(rows, norm="forward").abs().square().mean(1).clamp(min=FLOOR).log10()
    step = width // PATCH  # frequencies from one harmonic to the next
    harmonics = torch.arange(1, PATCH // 2, device=y.device) * step
    around = (power[:, harmonics - step // 2] + power[:, harmonics + step // 2]) / 2
    return (power[:, harmonics] - around).mean(1)


# ---------------------------------------------------------------- what counts as a warning


@dataclass(frozen=True)
class Dial:
    """What a number may do before it is told.

    Attributes:
        limit: the largest change from the baseline that is harmless; for kind "level" the largest
            value.
        says: what it means beyond the limit. do: what to do then.
        way: "up" or "down" where only that is bad, or "both".
        kind: "change", "relative" (the change as a share of the baseline) or "level".
    """

    limit: float
    says: str
    do: str
    way: str = "both"
    kind: str = "change"

    def beyond(self, baseline: float, value: float) -> bool:
        """Whether the limit is passed."""
        if self.kind == "level":
            return value > self.limit
        change = value - baseline
        size = {"up": change, "down": -change}.get(self.way, abs(change))
        return size > self.limit * (abs(baseline) if self.kind == "relative" else 1.0)

    @property
    def bounds(self) -> str:
        """The limit for a person: "±0.15", "+10 %", "0.9"."""
        if self.kind == "level":
            return f"{self.limit:g}"
        sign = {"up": "+", "down": "−"}.get(self.way, "±")
        relative = self.kind == "relative"
        return f"{sign}{self.limit * 100:g} %" if relative else f"{sign}{self.limit:g}"

    def band(self, baseline: float) -> tuple[float, float]:
        """The values that are harmless; infinite where a way is open."""
        if self.kind == "level":
            return -math.inf, self.limit
        width = self.limit * (abs(baseline) if self.kind == "relative" else 1.0)
        low = -math.inf if self.way == "up" else baseline - width
        return low, math.inf if self.way == "down" else baseline + width


_LOOK = "look at the images; hold the policy back (an anchor, a lower optim.optimizer.lr)"
_ADD = "reward what is lost as well (reward=mixed), hold the policy back (an anchor), or stop there"
_NOISE = "lower optim.optimizer.lr or the number of updates a rollout"

DIALS: Final[Mapping[str, Dial]] = {
    "dark": Dial(0.15, "images turn dark or light", _LOOK),
    "saturation": Dial(0.12, "colours turn garish or grey", _LOOK),
    "colour_entropy": Dial(1.0, "images have another number of colours", _LOOK),
    "edges": Dial(0.5, "images are covered with texture, or blurred", _LOOK, kind="relative"),
    "grid": Dial(0.3, "tokens' seams show: twice their share of the spectrum",
                 _LOOK, "up"),
    "diversity": Dial(0.35, "the images of a prompt grow alike",
                      "raise method.group or hold the policy back (anchor=kl)", "down", "relative"),
    "heldout/speed": Dial(0.1, "‖v‖ grows: images overshoot, as under too strong a guidance",
                          "lower optim.optimizer.lr, set optim.clip, or anchor=velocity", "up",
                          "relative"),
    "speed": Dial(0.2, "‖v‖² grows: images overshoot, as under too strong a guidance",
                  "lower optim.optimizer.lr, set optim.clip, or anchor=velocity", "up", "relative"),
    "groups_flat": Dial(0.9, "nearly no group's rewards differ, so that there is nothing to learn",
                        "give harder (or easier) prompts, a finer reward, or end the run",
                        "up", "level"),
    "clip_high": Dial(0.5, "half of the ratios are cut, going up", _NOISE, "up", "level"),
    "clip_low": Dial(0.5, "half of the ratios are cut, going down", _NOISE, "up", "level"),
    # δ²/2 at δ = 0.2: the mean of a step has moved by a fifth of its noise.
    "dlogp": Dial(0.02, "the policy moves far within one rollout", _NOISE, "up", "level"),
}  # fmt: skip
"""By the last part of a dial's name ("heldout/dark" is a "dark") or its first ("dlogp/3")."""
HELDOUT: Final = Dial(0.05, "what is not rewarded gets worse", _ADD, "down")
"""Of a held-out value that training does not maximise."""


def dial_of(name: str, limits: Mapping[str, float | None]) -> Dial | None:
    """The dial of a number, with the limit that a configuration gives it; None: no dial, or one
    that is switched off."""
    parts = name.split("/")
    known = next((p for p in (name, parts[-1], parts[0]) if p in DIALS), None)
    dial = DIALS[known] if known is not None else HELDOUT if parts[0] == "heldout" else None
    for key in (name, parts[-1], parts[0]):
        if dial is not None and key in limits:
            limit = limits[key]
            return None if limit is None else replace(dial, limit=float(limit))
    return dial


OWN: Final = ("speed", "groups_flat", "clip_high", "clip_low")
"""Dials that methods log by these names, besides dlogp/<step>."""


def dial_in(column: str) -> str | None:
    """The dial that a column of the log is; None where it is none, or of a held-out check."""
    where, _, name = column.rpartition("/")
    if where == "monitor" and name in IMAGE:
        return name
    return column if column in OWN or where == "dlogp" else None


def column_of(name: str) -> str:
    """The inverse of `dial_in`."""
    return f"monitor/{name}" if name in IMAGE else name


def check_limits(limits: Mapping[str, float | None]) -> None:
    """Raises InputError for a limit that is not positive."""
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise InputError(
                f"monitor.limits.{name} is {limit}: give a positive number, or null for no limit"
            )


# ---------------------------------------------------------------- when

PROMPTS: Final = 40
"""Prompts that a mean over steps needs before its spread can be told: with ten, one healthy run in
four was flagged in 200 steps."""


@dataclass(frozen=True)
class Flag:
    """A dial beyond its limit: since when (steps done), from what to what."""

    step: int
    baseline: float
    value: float

    def line(self, name: str, dial: Dial) -> str:
        """For a person."""
        was = "" if dial.kind == "level" else f"{self.baseline:.3g} → "
        return (
            f"monitor, step {self.step}: {name} {was}{self.value:.3g} (limit {dial.bounds}): "
            f"{dial.says}; {dial.do}"
        )


@dataclass
class Series:
    """The numbers of a dial that count: those of its first steps, and of the last ones.

    Attributes:
        first, last: (value, squared standard error) each; NaN where the error is not known.
    """

    first: list[list[float]] = field(default_factory=list)
    last: list[list[float]] = field(default_factory=list)

    def add(self, value: float, error: float, begin: int, window: int) -> None:
        """The next step's; the first `begin` are the baseline, and none of the window."""
        if len(self.first) < begin:
            self.first.append([value, error])
        else:
            self.last = [*self.last, [value, error]][-window:]

    @property
    def baseline(self) -> float:
        """Mean of the first steps; NaN before any."""
        return _mean(v for v, _ in self.first)

    @property
    def value(self) -> float:
        """Mean of the last ones; NaN before any."""
        return _mean(v for v, _ in self.last)

    @property
    def error(self) -> float:
        """Standard error of value − baseline: by the spread of prompts within the steps of either,
        or by that of the first steps, whichever is largest."""
        mean, n, m = self.baseline, len(self.first), len(self.last)
        parts = (self.first, self.last)
        within = [_mean(e for _, e in part if not math.isnan(e)) for part in parts]
        between = sum((v - mean) ** 2 for v, _ in self.first) / (n - 1) if n > 1 else 0.0
        step = max(between, *(0.0 if math.isnan(w) else w for w in within))
        return math.sqrt(step * (1 / max(n, 1) + 1 / max(m, 1)))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


@dataclass
class Watch:
    """Dials by name, and those of them that were flagged.

    Attributes:
        limits: name of a dial → its limit, null for none; else DIALS' own.
        begin: first steps that make the baseline. window: last steps that are looked at together.
            Either takes as many more as PROMPTS need.
        z: standard errors that a change must have besides: at 4, one in 16,000 by chance.
    """

    limits: Mapping[str, float | None] = field(default_factory=dict)
    begin: int = 5
    window: int = 5
    z: float = 4.0
    series: dict[str, Series] = field(default_factory=dict)
    flags: dict[str, Flag] = field(default_factory=dict)

    def add(
        self, step: int, numbers: Mapping[str, tuple[float, float]], prompts: int = PROMPTS
    ) -> dict[str, Flag]:
        """What a step of so many prompts showed, name → (value, squared standard error); returns
        what is flagged now for the first time."""
        new: dict[str, Flag] = {}
        least = -(-PROMPTS // max(1, prompts))
        begin, window = max(self.begin, least), max(self.window, least)
        for name, (value, error) in numbers.items():
            dial = dial_of(name, self.limits)
            if dial is None or not math.isfinite(value):
                continue
            series = self.series.setdefault(name, Series())
            series.add(value, error, begin, window)
            if name in self.flags or len(series.last) < window:
                continue
            far = dial.beyond(series.baseline, series.value)
            sure = abs(series.value - series.baseline) > self.z * series.error
            if far and (sure or dial.kind == "level"):
                new[name] = Flag(step, series.baseline, series.value)
        self.flags.update(new)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "series": {k: {"first": s.first, "last": s.last} for k, s in self.series.items()},
            "flags": {k: [f.step, f.baseline, f.value] for k, f in self.flags.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        self.series = {k: Series(s["first"], s["last"]) for k, s in state["series"].items()}
        self.flags = {k: Flag(*f) for k, f in state["flags"].items()}
