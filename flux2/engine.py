"""The engine: backward, update, roles that follow, and what a checkpoint must hold.

One ModuleDict of backbones, one optimizer with a group per role, and turns: a turn accumulates the
gradients of one role and ends with one update of it. `Engine` is one process, or several with a
copy of everything each (data parallel); flux2/zero.py has the sharded one, with the same face.

Data parallel sums gradients once, at the end of a turn. torch's DistributedDataParallel is not
used: it wants each forward to be followed by its backward and every parameter to take part, and a
turn calls a role many times, and other roles in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flux2 import distributed
from flux2.optim import LearningRate, TurnOptimizer, global_norm
from flux2.roles import Roles
from flux2.types import Batch


def share(update: Sequence[Batch]) -> list[Batch]:
    """An update's micro-batches with weights that sum to 1 over all ranks, equally many on each
    rank: a sharded forward is a matter of all ranks.

    Micro-batches without weight are left out; a rank that has fewer than another repeats its last
    one with weight 0. Empty on all ranks where no sample has weight.
    """

    def heavy(micro: Batch) -> float:
        return float(micro.weight.double().sum()) if micro.weight is not None else 0.0

    kept = [m for m in update if heavy(m) > 0]
    everyone = distributed.gather_objects((len(kept), sum(map(heavy, kept))))
    count, total = max(n for n, _ in everyone), sum(w for _, w in everyone)
    if not count:
        return []
    spare = [*update, *kept][-1:]
    if not spare or spare[0].weight is None:
        raise ValueError("an update needs a micro-batch with weights on every rank")
    idle = replace(spare[0], weight=torch.zeros_like(spare[0].weight))
    scaled = [replace(m, weight=m.weight / total) for m in kept if m.weight is not None]
    return scaled + [idle] * (count - len(kept))


class Engine:
    """Trains roles by turns.

    Args:
        roles: the run's roles.
        optimizer: over roles' trainable parameters.
        rate: factor of each group's lr by the steps done.
        clip: largest gradient norm of a role's update; 0 does not clip.
    """

    def __init__(
        self, roles: Roles, optimizer: TurnOptimizer, rate: LearningRate, clip: float
    ) -> None:
        self.roles, self.optimizer, self._rate, self._clip = roles, optimizer, rate, clip
        self.step = 0
        self.updates = dict.fromkeys(roles.trainable, 0)
        self._metrics: dict[str, float] = {}
        self._graded = False

    @contextmanager
    def turn(self, role: str) -> Iterator[None]:
        """Inside, backward() adds to the gradients of `role`, and of no other role; at the end, one
        update of it.

        A turn without a backward (an update that is empty on all ranks) updates nothing. Non-finite
        gradients are dropped and counted.
        """
        self.optimizer.active = role
        self._graded = False
        self.roles.activate(role)
        try:
            yield
        finally:
            self.roles.activate(None)
        if self._graded:
            factor = self._rate(self.step)  # one schedule for roles of any number of updates
            for group in self.optimizer.param_groups:
                if group["role"] == role:
                    group["lr"] = group["base_lr"] * factor
            norm, stepped = self._update(role)
            self._note(f"{role}/grad_norm", norm)
            self._note(f"{role}/skipped", float(not stepped))
            if stepped:
                self._note(f"{role}/lr", self._lr(role))
                self.updates[role] += 1
                self.roles.follow(role)

    def _update(self, role: str) -> tuple[float, bool]:
        """One optimizer step from the gradients that are there: (their norm, whether it was
        made)."""
        parameters = list(self.roles.parameters(role).values())
        distributed.sum_gradients(parameters)
        for p in parameters:
            if p.grad is None:  # as in a sharded engine; the optimizer's count stays one for all
                p.grad = torch.zeros_like(p)
        norm = global_norm(parameters)
        finite = bool(torch.isfinite(norm))
        if finite:
            if self._clip > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
            self.optimizer.step()
        for p in parameters:
            p.grad = None
        return float(norm), finite

    def _lr(self, role: str) -> float:
        return max(g["lr"] for g in self.optimizer.param_groups if g["role"] == role)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of a micro-batch. `last` marks the update's last one; the loss is a
        weighted sum whose weights sum to 1 over all ranks, so that nothing is divided here."""
        loss.backward()
        self._graded = True

    def metrics(self) -> dict[str, float]:
        """What the step's turns noted; empties the notes."""
        out, self._metrics = self._metrics, {}
        return out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights ("role/path") and optimizer states ("optimizer/role/path/key"), whole, whatever
        the engine. All ranks go through it together."""
        yield from self.roles.tensors()
        for role in self.roles.trainable:
            for path, parameter in self.roles.parameters(role).items():
                for key, value in self._state_of(parameter).items():
                    yield f"optimizer/{role}/{path}/{key}", value

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of `tensors`, for a checkpoint that all ranks write together."""
        for i, item in enumerate(self.tensors()):
            if i % distributed.size() == distributed.rank():
                yield item

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's tensors for one parameter, whole."""
        return self.optimizer.state_of(parameter)

    def _set_state(
        self, parameter: torch.nn.Parameter, state: Mapping[str, Tensor], updates: int
    ) -> None:
        self.optimizer.set_state(parameter, state, updates)

    def state_dict(self) -> dict[str, Any]:
        """Everything but tensors."""
        return {"step": self.step, "updates": dict(self.updates)}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of state_dict and tensors. Raises InputError where they do not fit."""
        weights = {k: v for k, v in tensors.items() if not k.startswith("optimizer/")}
        self.roles.load(weights)
        self.step, self.updates = int(state["step"]), dict(state["updates"])
        kept: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name in tensors:
            if name.startswith("optimizer/"):
                role, _, rest = name.removeprefix("optimizer/").partition("/")
                path, _, key = rest.rpartition("/")
                kept.setdefault((role, path), {})[key] = tensors[name]
        for role in self.roles.trainable:
            for path, parameter in self.roles.parameters(role).items():
                self._set_state(parameter, kept.get((role, path), {}), self.updates[role])

    def _note(self, name: str, value: float) -> None:
        self._metrics[name] = value
