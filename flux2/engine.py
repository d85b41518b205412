"""The engine: backward, update, roles that follow, and what a checkpoint must hold.

One ModuleDict of backbones, one optimizer with a group per role, and turns: a turn accumulates the
gradients of one role and ends with one update of it. This engine is the one-process form; a sharded
one has the same face.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flux2.errors import InputError
from flux2.optim import LearningRate, TurnOptimizer, global_norm
from flux2.roles import Roles


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA where there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"engine.device is {name}, and torch sees no CUDA device: use auto or cpu")
    return torch.device(name)


class Engine:
    """Trains roles by turns.

    Args:
        roles: the run's roles.
        optimizer: over roles' trainable parameters.
        rate: factor of each group's lr by its role's updates.
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
        """Inside, backward() adds to the gradients of `role`; at the end, one update of it.

        A turn without a backward (an update that is empty on all ranks) updates nothing. Non-finite
        gradients are dropped and counted.
        """
        self.optimizer.active = role
        self._graded = False
        yield
        if not self._graded:
            return
        parameters = list(self.roles.parameters(role).values())
        norm = global_norm(parameters)
        self._note(f"{role}/grad_norm", float(norm))
        finite = bool(torch.isfinite(norm))
        self._note(f"{role}/skipped", float(not finite))
        if finite:
            if self._clip > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
            factor = self._rate(self.updates[role])
            for group in self.optimizer.param_groups:
                if group["role"] == role:
                    group["lr"] = group["base_lr"] * factor
                    self._note(f"{role}/lr", group["lr"])
            self.optimizer.step()
            self.updates[role] += 1
            self.roles.follow(role)
        # A loss may reach through other trainable roles: their next turn must not find its traces.
        for name in self.roles.trainable:
            for parameter in self.roles.parameters(name).values():
                parameter.grad = None

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of a micro-batch. `last` marks the update's last one, where a sharded
        engine reduces; the loss is a weighted sum, so that nothing is divided here."""
        loss.backward()
        self._graded = True

    def metrics(self) -> dict[str, float]:
        """What the step's turns noted; empties the notes."""
        out, self._metrics = self._metrics, {}
        return out

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights."""
        optimizer = self.optimizer.state_dict()
        return {"step": self.step, "updates": self.updates, "optimizer": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        self.step, self.updates = int(state["step"]), dict(state["updates"])
        rates = [group["base_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["base_lr"] = rate  # the configuration's, which a resume may change

    def _note(self, name: str, value: float) -> None:
        self._metrics[name] = value
