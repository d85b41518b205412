"""What scores: reward ∘ decode as methods get it, and what a reward asks of a run around it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2 import distributed
from flux2.errors import InputError
from flux2.files import write_json
from flux2.log import Log
from flux2.model import Flux2
from flux2.types import Batch, Calibrated, Deferred, Differentiable, Scores


class Scorer:
    """reward ∘ decode, as methods get it. Made before the model, so that a method can be checked
    first. No dataclass: Hydra would hand methods a dictionary of it."""

    def __init__(self, reward: Any, model: Flux2 | None = None) -> None:
        self.reward, self.model = reward, model
        self.works: bool | None = None  # None: not asked for yet
        self.tap: Callable[[Tensor, Batch], object] = lambda images, batch: None
        """Shown every chunk's images, b 3 h w uint8."""
        self._seconds, self._told = 0.0, Counter[str]()
        self._noted: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, batch: Batch) -> Callable[[], Scores]:
        """Starts scoring; rewards that work in processes of their own are not waited for."""
        assert self.model is not None
        images, reward = self.model.codec.decode(x, batch.grid), self.reward
        begun = time.perf_counter()
        if isinstance(reward, Deferred):
            pending = reward.submit(images, batch)
            self._seconds += time.perf_counter() - begun
            self.tap(images, batch)  # while others score
            return lambda: self._wait(lambda: reward.result(pending), batch)
        scores = self._wait(lambda: reward(images, batch), batch)
        self.tap(images, batch)
        return lambda: scores

    def _wait(self, scores: Callable[[], Scores], batch: Batch) -> Scores:
        begun = time.perf_counter()
        found = scores()
        self._seconds += time.perf_counter() - begun
        self._note(found["reward"], batch)
        return found

    def _note(self, found: Tensor, batch: Batch) -> None:
        self.works = bool(self.works) or not bool(found.isnan().all())
        self._noted.append((batch.groups.cpu(), found.detach().cpu()))

    def noted(self) -> tuple[Tensor, Tensor]:
        """What this rank's samples scored since it was asked last: their prompts' ids and their
        rewards, each b."""
        noted, self._noted = self._noted, []
        ids = [torch.zeros(0, dtype=torch.int64), *(i for i, _ in noted)]
        return torch.cat(ids), torch.cat([torch.zeros(0), *(r for _, r in noted)])

    def probe(self) -> dict[str, float]:
        """After a step, on all ranks: seconds that it spent waiting for rewards, and how many
        samples of all ranks could not be scored, by reason; {} without a reward.

        Raises:
            InputError: nobody could score anything in the first step that asked for rewards. Later
                failures are masked, but such a run is set up wrongly.
        """
        if self.reward is None:
            return {}
        seconds, self._seconds = self._seconds, 0.0
        counts = Counter(getattr(self.reward, "failures", {}))
        mine, self._told = counts - self._told, counts
        new: Counter[str] = Counter()
        for works, part in distributed.gather_objects((self.works, mine)):
            self.works = self.works if works is None else bool(self.works) or works
            new.update(part)
        if self.works is False:
            why = ", ".join(f"{k} × {n}" for k, n in new.items())
            raise InputError(
                f"the reward scored no sample of the first step ({why or 'all NaN'}): give prompts "
                "that it can score, or another reward (reward=ocr-whole reads without a known "
                "region)"
            )
        return {"time/reward": seconds, **{f"failures/{k}": float(n) for k, n in new.items()}}

    @property
    def engines(self) -> list[str]:
        """What scores, as the manifest keeps it and evaluation marks it; [] without a reward."""
        reward = self.reward
        return [] if reward is None else [str(getattr(reward, "engine", type(reward).__name__))]

    def check_gradient(self) -> None:
        """Raises InputError where the reward has no gradient."""
        card = getattr(self.reward, "card", None)
        if not isinstance(self.reward, Differentiable) or (card and not card.differentiable):
            raise InputError(
                f"the reward {type(self.reward).__name__} has no gradient: choose one that has "
                "(docs/rewards.md), or stage=nft"
            )

    def differentiable(self, x: Tensor, batch: Batch) -> Tensor:
        """Latents b n c → b, with gradients through the decoder."""
        assert self.model is not None
        images = (self.model.codec.decode_float(x, batch.grid) / 2 + 0.5).clamp(0, 1)
        self.tap((images.detach() * 255).round().to(torch.uint8), batch)
        begun = time.perf_counter()
        found = self.reward.differentiable(images, batch)
        self._seconds += time.perf_counter() - begun
        self._note(found, batch)
        return found

    @property
    def wants(self) -> tuple[int, int] | None:
        """What its reward wants to measure the policy on (`Calibrated.wants`); None if nothing."""
        return self.reward.wants if isinstance(self.reward, Calibrated) else None

    def describe(self) -> str | None:
        """A line on what scores and under which licence; None without a reward that says so."""
        card = getattr(self.reward, "card", None)
        if card is None:
            return None
        scorers = [part.partition("(")[0] for part in self.engines[0].split(" + ")]
        return f"reward: {' + '.join(scorers)}, {card.cost}; licence: {card.licence}"

    def state_dict(self) -> dict[str, Any]:
        """What the reward measured at the start, if it does."""
        return self.reward.state_dict() if isinstance(self.reward, Calibrated) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        self.works = True  # it did, before
        if isinstance(self.reward, Calibrated):
            self.reward.load_state_dict(state)


def calibrate(
    score: Scorer,
    draw: Callable[[int, int], tuple[Tensor, Batch]],
    share: int,
    log: Log,
    file: Path,
) -> None:
    """Lets a reward measure what it wants to know of the policy, on all ranks together; what it
    found is shown in the log and written to `file`.

    draw: (k, times) → latents b n c of this rank's k-th batch, `times` samples of each of its
        `share` prompts, and that batch repeated alike.
    """
    model, wants = score.model, score.wants
    if wants is None:
        return
    assert model is not None
    count, times = wants

    def chunks() -> Iterator[tuple[Tensor, Batch]]:
        for k in range(-(-count // share)):
            latents, batch = draw(k, times)
            yield model.codec.decode(latents, batch.grid), batch

    found = score.reward.calibrate(chunks())
    total = count * distributed.size()
    log.print(f"calibrated on {total} prompts × {times}: spread within a group")
    names = sorted({c for by in found.values() for c in by})
    cells = {k: [f"{by[c]:.4f}" if c in by else "-" for c in names] for k, by in found.items()}
    header = ["reward", *("all" if c == "*" else c or "none" for c in names)]
    log.table(header, [[k, *row] for k, row in cells.items()])
    if distributed.is_main():
        write_json(file, found)


def close(*parts: Any) -> None:
    """Ends the processes of those parts (rewards, metrics, evaluations) that have some."""
    for part in parts:
        if hasattr(part, "close"):
            part.close()
