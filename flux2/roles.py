"""Roles are functions: a name → a velocity over one of the run's backbones.

All networks of a run live in one ModuleDict. A role is (backbone, adapter or none): with LoRA every
role shares the frozen base; in full training each trainable role is a backbone of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flux2 import adapters
from flux2.adapters import LoRA
from flux2.errors import InputError
from flux2.latents import LatentCodec
from flux2.model import Flux2
from flux2.types import Condition, RoleSpec


class VelocityRole:
    """A transformer with one adapter (or none) as v(x, t, cond). x and t stay fp32; the matrix
    products run in `autocast`, and the position of the time embedding before them keeps its
    precision."""

    def __init__(
        self,
        backbone: nn.Module,
        switch: adapters.Switch,
        adapter: str | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.backbone, self.adapter = backbone, adapter
        self._switch, self._autocast = switch, autocast

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x: b n c, t: b → b n c fp32."""
        tokens, ids = x.float(), cond.ids
        if cond.ref is not None and cond.ref_ids is not None:
            tokens = torch.cat([tokens, cond.ref.float()], 1)
            ids = torch.cat([ids, cond.ref_ids], 1)
        kwargs = None if cond.mask is None else {"attention_mask": cond.mask[:, None, None]}
        if bool(self.backbone.config.guidance_embeds) != (cond.guidance is not None):  # pyright: ignore
            raise ValueError("guidance must be given to a model with the embedder, and to no other")
        with self._switch(self.adapter), self._cast(x.device):
            out = self.backbone(
                hidden_states=tokens,
                encoder_hidden_states=cond.text.float(),
                timestep=t.float(),
                # diffusers keeps the first row of 3-D ids; so they reach our embedder whole.
                img_ids=ids.transpose(0, 1)[:, :, None],
                txt_ids=cond.text_ids.transpose(0, 1)[:, :, None],
                guidance=cond.guidance,
                joint_attention_kwargs=kwargs,
                return_dict=False,
            )[0]
        return out[:, : x.shape[1]].float()

    def _cast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._autocast, enabled=self._autocast is not None)

    def checkpointed(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Activation checkpointing whose recomputation runs with the adapter of the first pass."""
        active = _active(self._switch)

        def run(*inner: Any) -> Any:
            with self._switch(active):
                return block(*inner, **kwargs)

        return checkpoint(run, *args, use_reentrant=False)


def _active(switch: adapters.Switch) -> str | None:
    for layer in switch._layers:
        return None if layer._disable_adapters else layer._active_adapter[0]
    return None


class AutoencoderRole:
    """An AutoencoderKLFlux2 in training; see types.Autoencoder."""

    def __init__(self, vae: nn.Module, autocast: torch.dtype | None) -> None:
        self.vae, self._autocast = vae, autocast

    def reconstruct(
        self, images: Tensor, noise: Callable[[tuple[int, ...]], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """images: b 3 h w in [−1, 1]; noise: shape of a sample's latents → noise b …, None decodes
        the mode → reconstruction, posterior mean and log-variance, fp32."""
        with torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None):
            posterior = self.vae.encode(images).latent_dist  # pyright: ignore
            z = posterior.mean
            if noise is not None:
                z = z + posterior.std * noise(tuple(z.shape[1:])).to(z)
            out = self.vae.decode(z).sample  # pyright: ignore
        return out.float(), posterior.mean.float(), posterior.logvar.float()


class Roles(Mapping[str, Any]):
    """The run's roles by name, and the one ModuleDict of backbones behind them."""

    def __init__(
        self,
        specs: Mapping[str, RoleSpec],
        model: Flux2,
        lora: LoRA | None,
        autocast: torch.dtype | None,
        checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        self.specs, self._seed = dict(specs), seed
        self.backbones = nn.ModuleDict()
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        placed = {name: self._place(name, spec, model, lora) for name, spec in specs.items()}
        switches = {k: adapters.Switch(m) for k, m in self.backbones.items()}
        self._roles: dict[str, Any] = {}
        for name, (backbone, adapter) in placed.items():
            module = self.backbones[backbone]
            if specs[name].kind == "autoencoder":
                self._roles[name] = AutoencoderRole(module, autocast)
                continue
            role = VelocityRole(module, switches[backbone], adapter, autocast)
            self._roles[name] = role
            if checkpointing and specs[name].trainable:
                module.enable_gradient_checkpointing(role.checkpointed)  # pyright: ignore
        for name, spec in specs.items():
            for parameter in self._parameters.get(name, {}).values():
                parameter.requires_grad_(spec.trainable)
            if spec.follows is not None:
                # A fresh adapter draws its own A, and an average must begin where its leader does.
                self._track(name, spec.follows, 0.0)

    def _place(
        self, name: str, spec: RoleSpec, model: Flux2, lora: LoRA | None
    ) -> tuple[str, str | None]:
        """Where a role lives: (backbone, adapter)."""
        own = spec.trainable or spec.follows is not None
        if spec.follows is not None and spec.follows not in self.specs:
            raise ValueError(f"role {name} follows {spec.follows}, which is no role of the method")
        if spec.kind == "autoencoder":
            self.backbones["vae"] = model.vae
            self._parameters[name] = dict(model.vae.named_parameters())
            return "vae", None
        if not own:
            self.backbones["base"] = model.transformer
            return "base", None
        if lora is not None:
            self.backbones["base"] = model.transformer
            adapters.add(model.transformer, lora, name, self._seed)
            self._parameters[name] = adapters.parameters(model.transformer, name)
            return "base", name
        others = [s for n, s in self.specs.items() if n != name and s.kind == spec.kind]
        alone = not others
        self.backbones[name] = model.transformer if alone else copy.deepcopy(model.transformer)
        self._parameters[name] = dict(self.backbones[name].named_parameters())
        return name, None

    def __getitem__(self, name: str) -> Any:
        return self._roles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A role's own parameters by name; {} for a frozen role."""
        return self._parameters.get(name, {})

    @property
    def trainable(self) -> tuple[str, ...]:
        """Roles that have a parameter group."""
        return tuple(n for n, s in self.specs.items() if s.trainable)

    @torch.no_grad()
    def follow(self, leader: str) -> None:
        """Moves every role that follows `leader` one step: w ← decay·w + (1 − decay)·leader."""
        for name, spec in self.specs.items():
            if spec.follows == leader:
                self._track(name, leader, spec.decay)

    @torch.no_grad()
    def _track(self, name: str, leader: str, decay: float) -> None:
        source = {_neutral(k, leader): p for k, p in self._parameters[leader].items()}
        for key, mine in self._parameters[name].items():
            mine.lerp_(source[_neutral(key, name)].to(mine), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights that training changes (trainable roles and their followers)."""
        state = {
            f"{name}/{key}": p.detach()
            for name, group in self._parameters.items()
            for key, p in group.items()
        }
        if "vae" in self.backbones:
            bn: Any = self.backbones["vae"].bn
            state |= {"vae/bn.running_mean": bn.running_mean, "vae/bn.running_var": bn.running_var}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of state_dict; raises InputError where the keys differ."""
        mine = self.state_dict()
        if set(mine) != set(state):
            odd = min(set(mine) ^ set(state))
            raise InputError(
                f"the checkpoint's weights do not fit this run ({odd} is on one side only): "
                "resume with the configuration it was made with"
            )
        for key, value in mine.items():
            if value.shape != state[key].shape:  # copy_ would broadcast a rank of 1
                raise InputError(
                    f"the checkpoint's {key} has shape {tuple(state[key].shape)} and this run's "
                    f"{tuple(value.shape)}: resume with the configuration it was made with"
                )
            value.copy_(state[key])


def _neutral(key: str, role: str) -> str:
    return key.replace(f".{role}.", ".")


def codec_of(model: Flux2) -> LatentCodec:
    """A codec with the autoencoder's present statistics."""
    return LatentCodec(model.vae)
