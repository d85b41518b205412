"""The training loop. There is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from flux2.distributed import broadcast, largest
from flux2.engine import Engine, share
from flux2.log import Log
from flux2.rng import Rng
from flux2.runs import Interrupt
from flux2.types import Batch, Method

Hook = Callable[[int], bool | None]
"""Looks at the run after a step (given: steps done), and may end it by returning True."""


def fit(
    engine: Engine,
    method: Method,
    data: Callable[[int], Batch],
    log: Log,
    *,
    steps: int,
    seed: int,
    save: Callable[[int], None],
    save_every: int,
    probe: Callable[[int], Mapping[str, float]] = lambda step: {},
    watch: Callable[[int, Mapping[str, float | None]], object] = lambda step, row: None,
    hooks: tuple[Hook, ...] = (),
    budget: float | None = None,
) -> None:
    """Runs `method` from engine.step to `steps`.

    Args:
        data: the global batch of a step, by its number.
        save: writes a checkpoint; called every `save_every` steps (0: never in between) and at the
            end, also when interrupted.
        probe: steps done → further numbers of the step, for the log. watch: shown its whole line.
        budget: seconds after which the run ends early, though whole; None: no limit.
    """
    begun = time.monotonic()
    with Interrupt() as stop:
        for step in range(engine.step, steps):
            started = time.monotonic()
            rng, batch = Rng(seed, step), data(step)
            for update in map(share, method.collect(engine.roles, batch, rng)):
                for turn in method.turns:
                    if (step + 1) % turn.every:
                        continue
                    with engine.turn(turn.role):
                        for k, micro in enumerate(update, 1):
                            loss, metrics = turn.loss(engine.roles, micro, rng)
                            engine.backward(loss, last=k == len(update))
                            if micro.weight is None or micro.weight.any():  # else a stopgap
                                log.log(step, metrics)
            engine.step = step + 1
            log.log(step, {**engine.metrics(), **method.metrics(), **probe(engine.step)})
            log.log(step, {"time/step": time.monotonic() - started})
            watch(engine.step, log.flush(step))
            stop.signum = largest(stop.signum or 0) or None  # one rank's signal stops all alike
            if stop.signum:
                save(engine.step)
                stop.abort()
            ended = [hook(engine.step) for hook in hooks]  # every hook runs, whatever one says
            spent = broadcast(time.monotonic() - begun)
            if any(ended) or (budget is not None and spent > budget):
                break
            if save_every and engine.step % save_every == 0 and engine.step < steps:
                save(engine.step)
        save(engine.step)
        stop.signum = largest(stop.signum or 0) or None  # it came while the last hooks ran
        if stop.signum:
            stop.abort()
