"""Prompts that are neither solved nor hopeless, more often: resampling for online methods.

    after each step, for every prompt i that was scored, of its samples' rewards R:
        m = mean (R − low) / (high − low), clipped to [0, 1],   s = std R  (n below)
        d = m·(1 − m)   or   s;      d_i ← first ? d : decay·d_i + (1 − decay)·d
    P(i) = b_i · [floor + (1 − floor)·d_i / Σ_j b_j·d_j]

b_i is what the data themselves say. A group in which all samples fail, or all succeed, has no
advantage to learn from; m·(1 − m) is the variance of a reward of 0 or 1 and is the largest where
half of the samples succeed. A prompt that was not scored yet counts as the mean of those that were.
The floor keeps every prompt in the draw: what was hopeless may be no longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux2 import distributed
from flux2.data.order import Law, Redrawn, law_of
from flux2.data.record import Dataset
from flux2.errors import InputError

SIGNALS = ("success", "spread")


@dataclass(eq=False, repr=False)
class Resampled(Redrawn):
    """A dataset whose records are drawn by what they scored. It changes none, and is the outermost.

    Its state is what was seen of each prompt; it is the same on every rank and for any number of
    them, and has no part in the order of what was scored.

    Attributes:
        dataset: of prompts.
        signal: success, m·(1 − m), or spread, the standard deviation in the group.
        low, high: rewards that count as failure and success; only success needs them.
        decay: weight of what was known of a prompt when it is scored again.
        floor: share of the samples that are drawn as if nothing were known.

    Raises:
        InputError: an unknown signal, numbers out of range.
    """

    dataset: Dataset
    signal: str = "success"
    low: float = 0.0
    high: float = 1.0
    decay: float = 0.5
    floor: float = 0.2
    _value: np.ndarray = field(init=False)
    _mean: np.ndarray = field(init=False)
    _seen: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise InputError(
                f"data.dataset.signal is {self.signal!r}: choose from {', '.join(SIGNALS)}"
            )
        if not self.low < self.high:
            raise InputError(
                f"data.dataset.low is {self.low} and high is {self.high}: low must be below high"
            )
        if not 0 <= self.decay < 1:
            raise InputError(f"data.dataset.decay is {self.decay}: give 0 to below 1")
        if not 0 < self.floor <= 1:
            raise InputError(
                f"data.dataset.floor is {self.floor}: give above 0, or prompts are forgotten, to 1"
            )
        count = len(self.dataset)
        self._value, self._mean = np.zeros(count), np.zeros(count)
        self._seen = np.zeros(count, np.int64)

    def law(self, step: int) -> Law:
        """Of this step alone, by what is known now. Until anything is, the dataset's own shares."""
        inner = law_of(self.dataset, step)
        base = inner.shares(len(self))
        difficulty = self._difficulty()
        total = float((base * difficulty).sum())
        if total > 0:
            base = base * (self.floor + (1 - self.floor) * difficulty / total)
        return Law(step, base / base.sum(), inner.parts, once=True)

    def _difficulty(self) -> np.ndarray:
        """n, of unseen prompts the mean of the seen."""
        seen = self._seen > 0
        mean = self._value[seen].mean() if seen.any() else 0.0
        return np.where(seen, self._value, mean)

    # -- what was scored -------------------------------------------------------------------------

    def observe(self, ids: Tensor, scores: Tensor) -> Mapping[str, float]:
        """Takes note of a step's scores (`flux2.data.order.Adaptive`).

        Raises:
            InputError: scores of samples that are no records of the dataset.
        """
        all_ids = distributed.gather(ids.cpu()).numpy().astype(np.int64)
        values = distributed.gather(scores.detach().cpu().double()).numpy()
        known = ~np.isnan(values)
        all_ids, values = all_ids[known], values[known]
        if len(all_ids) and not 0 <= all_ids.min() <= all_ids.max() < len(self):
            raise InputError("resampling was told of prompts that are not in data.dataset")
        # Sorted, sums round alike whichever rank a sample was on.
        order = np.lexsort((values, all_ids))
        all_ids, values = all_ids[order], values[order]
        prompts, first = np.unique(all_ids, return_index=True)
        for prompt, group in zip(prompts.tolist(), np.split(values, first[1:]), strict=False):
            self._note(prompt, group)
        return self.metrics()

    def _note(self, prompt: int, rewards: np.ndarray) -> None:
        if self.signal == "spread" and len(rewards) < 2:
            return
        mean = float(((rewards - self.low) / (self.high - self.low)).clip(0, 1).mean())
        value = mean * (1 - mean) if self.signal == "success" else float(rewards.std())
        old = self.decay if self._seen[prompt] else 0.0
        self._value[prompt] = old * self._value[prompt] + (1 - old) * value
        self._mean[prompt] = old * self._mean[prompt] + (1 - old) * mean
        self._seen[prompt] += 1

    def metrics(self) -> dict[str, float]:
        """For the log: the share of the prompts that were seen; of those, the share that is worth
        nothing now, and the mean of success."""
        seen = self._seen > 0
        if not seen.any():
            return {}
        return {
            "prompts_seen": float(seen.mean()),
            "prompts_settled": float((self._value[seen] == 0).mean()),
            "prompts_success": float(self._mean[seen].mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """What was seen, of the prompts that were."""
        rows = np.flatnonzero(self._seen)
        return {
            "signal": self.signal,
            "ids": torch.from_numpy(rows),
            "value": torch.from_numpy(self._value[rows]),
            "mean": torch.from_numpy(self._mean[rows]),
            "seen": torch.from_numpy(self._seen[rows]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict.

        Raises:
            InputError: it is of another signal, or of more prompts than there are.
        """
        if state["signal"] != self.signal:
            raise InputError(
                f"the run measured data.dataset.signal={state['signal']} and this is "
                f"{self.signal}: keep it, or start another run"
            )
        rows = torch.as_tensor(state["ids"]).numpy()
        if len(rows) and rows.max() >= len(self):
            raise InputError("the run saw prompts that data.dataset has not: give the data it had")
        for name in ("value", "mean", "seen"):
            array = getattr(self, f"_{name}")
            array[:] = 0
            array[rows] = torch.as_tensor(state[name]).numpy()

    def report(self) -> Iterator[str]:
        """A line."""
        yield (
            f"resampling {len(self)} prompts by {self.signal}, {self.floor:.0%} of the samples "
            "whatever they scored"
        )

    def __repr__(self) -> str:
        return f"Resampled({self.identity})"
