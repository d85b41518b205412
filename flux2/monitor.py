"""What watches a run for a hacked reward: the protocol, and going back to the best checkpoint.

The monitor itself is `eval.monitor.HackMonitor`; conf/monitor hands it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from flux2.checkpoint import Best, find_best, load_checkpoint, on_main
from flux2.engine import Engine
from flux2.log import Log
from flux2.model import Flux2
from flux2.types import Batch, RoleSpec

Row = Mapping[str, float | None]
"""A step's line in the log; None where a number was not finite."""


class Monitor(Protocol):
    """Watches a training run. Every rank has one and calls it alike; all come to one conclusion."""

    @property
    def stopped(self) -> str | None:
        """Why the run is to end early; None while it is not."""
        ...

    def check(self, roles: Mapping[str, RoleSpec]) -> None:
        """Before weights are read: raises InputError where it cannot watch a method of these."""
        ...

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """Before the first step of a session; `step` are done."""
        ...

    def records(self) -> Sequence[Any]:
        """The records whose prompts it will ask the model for."""
        ...

    def tap(self, images: Tensor, batch: Batch) -> None:
        """A chunk of the rollouts' images: b 3 h w uint8."""
        ...

    def probe(self, step: int) -> Mapping[str, float]:
        """What it measured of a step, for the log, once `step` are done."""
        ...

    def watch(self, step: int, row: Row) -> None:
        """The same step's whole line."""
        ...

    def improved(self, step: int) -> bool:
        """Whether the weights after `step` are the best so far, and are to be kept."""
        ...

    def score(self, step: int) -> Best | None:
        """What a checkpoint of `step` is to be ranked by; None: not at all."""
        ...

    def back(self, step: int) -> str | None:
        """At the end: why to go back to the checkpoint that is ranked best; None to stay."""
        ...

    def finish(self, exported: Mapping[str, Any]) -> dict[str, Any]:
        """Shows what it found; its part of the summary. exported: what became of the run."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume: plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        ...

    def close(self) -> None:
        """Ends the processes that it has started."""
        ...


class Blind:
    """The monitor of a run that is not watched."""

    stopped: str | None = None

    def check(self, roles: Mapping[str, RoleSpec]) -> None:
        """Nothing."""

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """Nothing."""

    def records(self) -> Sequence[Any]:
        """None."""
        return ()

    def tap(self, images: Tensor, batch: Batch) -> None:
        """Nothing."""

    def probe(self, step: int) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def watch(self, step: int, row: Row) -> None:
        """Nothing."""

    def improved(self, step: int) -> bool:
        """Never."""
        return False

    def score(self, step: int) -> Best | None:
        """None."""
        return None

    def back(self, step: int) -> str | None:
        """Stay."""
        return None

    def finish(self, exported: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def go_back(engine: Engine, checkpoints: Path) -> int | None:
    """Puts the weights of the checkpoint that is ranked best into the engine's roles, bit for bit,
    and leaves its count of steps; returns the checkpoint's step, None where none has a rank. All
    ranks call it."""
    path = on_main(lambda: find_best(checkpoints))
    if path is None:
        return None
    found = load_checkpoint(path, verify=False)
    if found.step != engine.step:
        engine.roles.load(found.weights)
    return found.step
