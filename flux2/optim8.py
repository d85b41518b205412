"""AdamW with moments in 8 bits (Dettmers et al., arXiv 2110.02861), by roles' turns.

bitsandbytes' optimizer is inside: blocks of 256 values in a dynamic 8-bit code, with an fp32 scale
each; tensors of fewer than 4096 values keep fp32 moments. 2.03 bytes a weight in place of 8.
torchao's compiles its step for each shape of parameter, and takes no lr but a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flux2.errors import InputError
from flux2.optim import _groups, only

BLOCK, SMALL = 256, 4096
_MOMENTS = ("state1", "state2")
_SCALES = ("absmax1", "absmax2")


def state_bytes(elements: int) -> int:
    """Bytes of both moments of a parameter."""
    return 8 * elements if elements < SMALL else 2 * (elements + 4 * -(-elements // BLOCK))


class TurnAdamW8bit:
    """AdamW in 8 bits that steps the active role's group. For whole parameters: engine none or ddp.

    Args:
        roles: trainable parameters by role and name.
        lr, betas, eps, weight_decay: AdamW's.

    Raises:
        InputError: bitsandbytes is missing, or a setting is out of range.
    """

    def __init__(
        self,
        roles: Mapping[str, Mapping[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise InputError(
                "optim=adamw8bit needs bitsandbytes: pip install bitsandbytes, or use optim=adamw"
            ) from None
        self.active: str | None = None
        first, second = betas
        try:
            self._inner: Any = AdamW8bit(
                _groups(roles, lr), lr=lr, betas=(first, second), eps=eps,
                weight_decay=weight_decay,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(f"optim.optimizer: {error}") from None
        self._inner.fill_qmap()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with keys role, lr, base_lr."""
        return self._inner.param_groups

    def step(self) -> None:
        """Updates the groups of `active`; the others keep weights and moments."""
        with only(self._inner, self.active):
            self._inner.step()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Both moments, with their scales where they are in 8 bits; {} before the first update."""
        state = self._inner.state.get(parameter, {})
        return {k: state[k] for k in (*_MOMENTS, *_SCALES) if k in state}

    def set_state(
        self, parameter: nn.Parameter, state: Mapping[str, Tensor], updates: int
    ) -> None:
        """The inverse of state_of. Raises InputError for another optimizer's state."""
        self._inner.state.pop(parameter, None)
        if not state:
            return
        packed = parameter.numel() >= SMALL
        if set(state) != {*_MOMENTS, *(_SCALES if packed else ())}:
            raise InputError(
                f"the checkpoint's optimizer kept {', '.join(sorted(state))}, which is not "
                "adamw8bit: resume with the optimizer that it was made with"
            )
        device = parameter.device
        mine: dict[str, Any] = {k: v.to(device, copy=True) for k, v in state.items()}
        if packed:
            codes: dict[str, Tensor] = self._inner.name2qmap
            mine |= {"qmap1": codes["dynamic"].to(device), "qmap2": codes["udynamic"].to(device)}
        self._inner.state[parameter] = {"step": updates, **mine}
