"""One optimizer for all roles, that steps only the role whose turn it is.

Sharded engines fill missing gradients with zeros; an optimizer that stepped every group would then
move idle roles by their momentum and weight decay. So `step` sees the active role's groups alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from flux2.errors import InputError


@dataclass(frozen=True)
class LearningRate:
    """lr as a function of the steps done: linear warm-up, a plateau, then linear or cosine decay
    to 0.

    Attributes:
        warmup: steps of the warm-up.
        decay: constant, linear or cosine.
        total: steps after which lr is 0.
        hold: share of `total` before the decay begins; a run stopped on the plateau can be resumed
            with another total, and is then what that total would have given from the start.
    """

    warmup: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    total: int | None = None
    hold: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "linear", "cosine"):
            raise InputError(f"optim.decay is {self.decay!r}: choose constant, linear or cosine")
        if not 0 <= self.hold < 1:
            raise InputError(f"optim.hold is {self.hold}: give 0 to below 1")

    def __call__(self, step: int) -> float:
        """The factor for step 0, 1, …"""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.decay == "constant" or not self.total:
            return 1.0
        start = max(self.warmup, self.hold * self.total)
        done = (step - start) / max(1, self.total - start)
        left = min(1.0, max(0.0, 1.0 - done))
        return left if self.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


class TurnOptimizer(Protocol):
    """What the engine needs of an optimizer."""

    active: str | None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with keys role, lr, base_lr."""
        ...

    def step(self) -> Any:
        """Updates the active role."""
        ...

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The tensors kept for one parameter; {} before its first update."""
        ...

    def set_state(
        self, parameter: nn.Parameter, state: Mapping[str, Tensor], updates: int
    ) -> None:
        """The inverse of state_of; updates: how many the parameter has had."""
        ...


def _state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "step"}


def _set_state(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    state: Mapping[str, Tensor],
    step: Mapping[str, Tensor],
) -> None:
    optimizer.state.pop(parameter, None)
    if state:
        mine = {k: v.to(parameter.device, copy=True) for k, v in state.items()}
        optimizer.state[parameter] = {**step, **mine}


def _groups(named: Mapping[str, Mapping[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
    return [
        {"params": list(group.values()), "role": role, "lr": lr, "base_lr": lr}
        for role, group in named.items()
        if group
    ]


@contextmanager
def only(optimizer: torch.optim.Optimizer, role: str | None) -> Iterator[None]:
    """Inside, the optimizer has the groups of `role` alone."""
    everyone = optimizer.param_groups
    optimizer.param_groups = [g for g in everyone if g["role"] == role]
    try:
        yield
    finally:
        optimizer.param_groups = everyone


class TurnAdamW(torch.optim.AdamW):
    """AdamW that steps the active role's group.

    Args:
        roles: trainable parameters by role and name.
        lr, betas, eps, weight_decay: AdamW's.
    """

    active: str | None = None

    def __init__(
        self,
        roles: Mapping[str, Mapping[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        first, second = betas
        super().__init__(
            _groups(roles, lr), lr=lr, betas=(first, second), eps=eps, weight_decay=weight_decay
        )

    def step(self, closure: Any = None) -> Any:
        """Updates the groups of `active`; the others keep weights and moments."""
        with only(self, self.active):
            return super().step(closure)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq."""
        return _state_of(self, parameter)

    def set_state(
        self, parameter: nn.Parameter, state: Mapping[str, Tensor], updates: int
    ) -> None:
        """The inverse of state_of."""
        _set_state(self, parameter, state, {"step": torch.tensor(float(updates))})


class _Matrices(torch.optim.Muon):
    """torch's Muon, which steps the active role's group."""

    active: str | None = None

    def step(self, closure: Any = None) -> Any:
        """Updates the groups of `active`."""
        with only(self, self.active):
            return super().step(closure)

    def set_state(
        self, parameter: nn.Parameter, state: Mapping[str, Tensor], updates: int
    ) -> None:
        """The inverse of state_of; Muon counts no updates."""
        _set_state(self, parameter, state, {})


class TurnMuon:
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for everything else.

    Convolutions count as matrices of out × (in · kh · kw). For pretraining on one process: the
    orthogonalisation needs whole matrices, so that it does not shard.

    Args:
        roles: trainable parameters by role and name.
        lr: of the matrices. adamw_lr: of the rest.
    """

    def __init__(
        self,
        roles: Mapping[str, Mapping[str, nn.Parameter]],
        lr: float,
        adamw_lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        self.active: str | None = None
        matrices: dict[str, dict[str, nn.Parameter]] = {}
        rest: dict[str, dict[str, nn.Parameter]] = {}
        self._flat: list[tuple[nn.Parameter, nn.Parameter]] = []
        for role, group in roles.items():
            for name, p in group.items():
                if "block" in name and p.ndim >= 2:
                    # torch's Muon takes matrices only: a flat twin shares the storage.
                    twin = p if p.ndim == 2 else nn.Parameter(p.detach().flatten(1))
                    if twin.data_ptr() != p.data_ptr():
                        raise ValueError(f"{name} is not contiguous: Muon cannot share its storage")
                    if twin is not p:
                        self._flat.append((twin, p))
                    matrices.setdefault(role, {})[name] = twin
                else:
                    rest.setdefault(role, {})[name] = p
        # LoRA leaves nothing to AdamW, and torch refuses an optimizer of nothing.
        self._parts: list[_Matrices | TurnAdamW] = []
        if matrices:
            groups = _groups(matrices, lr)
            self._parts.append(
                _Matrices(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
            )
        if rest:
            self._parts.append(TurnAdamW(rest, adamw_lr, betas))
        self._twins = {id(p): twin for twin, p in self._flat}
        self._owners = {
            id(p): part for part in self._parts for g in part.param_groups for p in g["params"]
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Both optimizers' groups."""
        return [group for part in self._parts for group in part.param_groups]

    def step(self) -> None:
        """Updates the groups of `active`."""
        for twin, p in self._flat:
            twin.grad = None if p.grad is None else p.grad.flatten(1)
        for part in self._parts:
            part.active = self.active
            part.step()

    def _owner(self, parameter: nn.Parameter) -> tuple[_Matrices | TurnAdamW, nn.Parameter]:
        mine = self._twins.get(id(parameter), parameter)
        return self._owners[id(mine)], mine

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A matrix's momentum, or AdamW's moments."""
        return _state_of(*self._owner(parameter))

    def set_state(
        self, parameter: nn.Parameter, state: Mapping[str, Tensor], updates: int
    ) -> None:
        """The inverse of state_of."""
        optimizer, mine = self._owner(parameter)
        optimizer.set_state(mine, state, updates)


def global_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, fp32."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
