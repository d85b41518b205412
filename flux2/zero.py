"""The sharded engine: DeepSpeed's ZeRO 1, 2 and 3 behind the face of `flux2.engine.Engine`.

All backbones are one model in one DeepSpeed engine with one optimizer (Rajbhandari et al., arXiv
1910.02054). DeepSpeed fills the gradients of idle roles with zeros; the turn optimizers step only
the role whose turn it is, so idle roles stay exactly where they are.

What is read or written goes through DeepSpeed's own access to fp32 masters and optimizer states, so
that checkpoints hold whole tensors by name, and neither the engine nor the number of ranks that
wrote them matters.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flux2 import distributed
from flux2.engine import Engine
from flux2.errors import InputError
from flux2.optim import LearningRate, TurnAdamW
from flux2.roles import Roles


@dataclass(frozen=True)
class Zero:
    """What to shard, and how.

    Attributes:
        stage: 1 shards optimizer states and masters, 2 also gradients, 3 also weights.
        precision: bf16 (weights; masters are fp32) or fp32.
        offload: masters and optimizer states in host memory.
        offload_weights: stage 3: weights in host memory too.
        bucket: elements that are reduced or gathered at a time.
        extra: further keys of DeepSpeed's zero_optimization, e.g. ZeRO++'s and MixZ++'s.
    """

    stage: int
    precision: str = "bf16"
    offload: bool = False
    offload_weights: bool = False
    bucket: int = 50_000_000
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise InputError(f"engine.stage is {self.stage}: choose 1, 2 or 3")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"engine.precision is {self.precision!r}: choose fp32 or bf16")
        if self.offload_weights and self.stage != 3:
            raise InputError(
                "engine.offload_weights needs engine=zero3: other stages hold weights whole"
            )
        if self.bucket < 1:
            raise InputError(f"engine.bucket is {self.bucket}: it must be at least 1")

    def config(self, clip: float) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        sharding: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": self.bucket,
            "allgather_bucket_size": self.bucket,
            "overlap_comm": False,
            "contiguous_gradients": True,
        }
        if self.stage == 3:
            sharding |= {
                "stage3_prefetch_bucket_size": self.bucket,
                "stage3_max_live_parameters": 1_000_000_000,
                # The update makes fp32 copies of as many gradients; the default is ten times this.
                "sub_group_size": 100_000_000,
                # A parameter that is kept gathered would not show a follower's new average.
                "stage3_param_persistence_threshold": 0,
            }
        if self.offload:
            sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if self.offload_weights:
            sharding["offload_param"] = {"device": "cpu", "pin_memory": False}
        return {
            # Batches are the methods' own: DeepSpeed is told of one sample a rank and no
            # accumulation, and update boundaries are set by hand.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip,
            "bf16": {"enabled": True, "check_grad_overflow": True}
            if self.precision == "bf16"
            else {"enabled": False},
            "zero_optimization": {**sharding, **self.extra},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # the turn optimizers step on the host as well
            "steps_per_print": 1 << 60,
        }


def check_zero(device: str) -> None:
    """Refuses what has no DeepSpeed, before any weight is read. Raises InputError."""
    _choose_accelerator(device)
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise InputError(
            "engine=zero… needs DeepSpeed: pip install deepspeed, or choose engine=ddp or none"
        ) from None


def _choose_accelerator(device: str) -> None:
    """DeepSpeed picks its device when it is imported, by this variable."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


class Sharded(Engine):
    """Trains roles by turns, with states, gradients or weights sharded over the ranks.

    Args:
        zero: what to shard.
        device: this rank's.
        Others: as Engine's; the optimizer must be a TurnAdamW (or step elementwise like it), since
            DeepSpeed hands it flat pieces.
    """

    def __init__(
        self,
        roles: Roles,
        optimizer: TurnAdamW,
        rate: LearningRate,
        clip: float,
        zero: Zero,
        device: torch.device,
    ) -> None:
        super().__init__(roles, optimizer, rate, clip)
        _choose_accelerator(device.type)
        import deepspeed

        # Its all-reduce through shared memory wants a compiler and AVX-512; gloo wants neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel("ERROR")
        # DeepSpeed calls collectives by their old names; torch says so at every call.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        distributed.alone(device)  # one process is a group as well
        os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher DeepSpeed misses it
        self.zero = zero
        self._engine: Any = deepspeed.initialize(
            model=roles.backbones,
            optimizer=optimizer,
            config=zero.config(clip),
            dist_init_required=False,
        )[0]
        self._sharding: Any = self._engine.optimizer
        self._begin_states()
        roles.place(Stage3(self._sharding) if zero.stage == 3 else Stage12(), self._engine)

    def _flats(self) -> list[tuple[str, Tensor]]:
        """(role, flat fp32 piece) of everything that this rank steps."""
        groups = self.optimizer.param_groups
        if self.zero.stage == 3:
            where = self._sharding.sub_group_to_group_id
            flats = enumerate(self._sharding.fp32_partitioned_groups_flat)
            return [(groups[where[i]]["role"], flat) for i, flat in flats]
        flats = enumerate(self._sharding.single_partition_of_fp32_groups)
        return [(groups[i]["role"], flat) for i, flat in flats]

    def _begin_states(self) -> None:
        """AdamW's moments as they are before the first step, so that they can be read and set."""
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        for _, flat in self._flats():
            zeros = {k: torch.zeros_like(flat) for k in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[flat] = {"step": torch.tensor(0.0), **zeros}
        if self.zero.stage < 3:
            self._sharding._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of a micro-batch; ranks reduce at the last one, or (stages 2 and 3) at
        each. All ranks call it equally often."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; weights sum to 1 over all of them.
        self._engine.backward(loss * distributed.size())
        self._graded = True

    def _update(self, role: str) -> tuple[float, bool]:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm), bool(self._engine.was_step_applied())

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        out = {}
        for key in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, key)
            assert value is not None
            out[key] = value
        return out

    def _set_state(
        self, parameter: nn.Parameter, state: Mapping[str, Tensor], updates: int
    ) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        shape = getattr(parameter, "ds_shape", parameter.shape)
        for key in ("exp_avg", "exp_avg_sq"):
            value = state[key] if state else torch.zeros(shape)
            safe_set_full_optimizer_state(parameter, _padded(parameter, value), key)

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of state_dict and tensors."""
        super().load(state, tensors)
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        for role, flat in self._flats():
            self.optimizer.state[flat]["step"] = torch.tensor(float(self.updates[role]))


def _padded(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Flat, with the zeros that make it a multiple of the ranks where weights are sharded."""
    flat = value.flatten()
    if not hasattr(parameter, "ds_tensor"):
        return flat
    sharded: Any = parameter
    whole = sharded.ds_tensor.numel() * distributed.size()
    return nn.functional.pad(flat, (0, whole - flat.numel()))


class Stage12:
    """Weights whole on every rank; masters in pieces of one flat tensor."""

    def part(self, parameter: nn.Parameter) -> Tensor:
        return parameter.data

    def master(self, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter.data  # equal to its master after every step
        return self.whole_master(parameter)

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        return part

    def whole_master(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        assert value is not None
        return value

    def slice(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        return whole

    def set_master(self, parameter: nn.Parameter, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, whole.to(parameter.device))
        parameter.data.copy_(whole)


class Stage3:
    """Weights and masters in pieces of their own: rank r holds the r-th of each parameter."""

    def __init__(self, sharding: Any) -> None:
        self._sharding = sharding

    def part(self, parameter: nn.Parameter) -> Tensor:
        sharded: Any = parameter
        return sharded.ds_tensor.data

    def master(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param

        value = safe_get_local_fp32_param(parameter)
        assert value is not None
        return value

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        sharded: Any = parameter
        device = self._sharding.device
        mine = part.detach().to(device).contiguous()
        if distributed.size() == 1:
            everyone = mine
        else:
            everyone = mine.new_empty(mine.numel() * distributed.size())
            torch.distributed.all_gather_into_tensor(everyone, mine)
        return everyone[: sharded.ds_numel].view(sharded.ds_shape)

    def whole_master(self, parameter: nn.Parameter) -> Tensor:
        return self.whole(parameter, self.master(parameter))

    def slice(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        pieces = _padded(parameter, whole)
        size = pieces.numel() // distributed.size()
        return pieces[distributed.rank() * size :][:size]

    def set_master(self, parameter: nn.Parameter, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        mine = self.slice(parameter, whole)
        safe_set_local_fp32_param(parameter, mine)
        self.part(parameter).copy_(mine)
