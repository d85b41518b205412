"""Roles are functions: a name → a velocity over one of the run's backbones.

All networks of a run live in one ModuleDict. A role is (backbone, adapter or none): with LoRA every
role shares the frozen base; in full training each trainable role is a backbone of its own. A
sharded engine takes the ModuleDict as one model: every call goes through its root, and whatever
reads or writes weights through a Storage, which knows where they lie.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flux2 import adapters, depth, embedder
from flux2.adapters import LoRA
from flux2.errors import InputError
from flux2.model import AUTOCAST, Flux2, give_embedder
from flux2.policy import PREFIX, Head, PolicyRole
from flux2.results import open_result
from flux2.rng import keyed
from flux2.types import Condition, RoleSpec, Velocity


class Backbones(nn.ModuleDict):
    """All networks of a run, called as one model: what is called is handed in. So a sharded engine
    sees each call begin and end, whichever network it is for."""

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """call() → its result."""
        return call()


class VelocityRole:
    """A transformer with one adapter (or none) as v(x, t, cond). x and t stay fp32; the matrix
    products run in `autocast`, and the position of the time embedding before them keeps its
    precision.

    Attributes:
        root: what a call goes through; a sharded engine puts itself there.
        embeds: whether it takes cond.guidance; None: as the backbone does.
    """

    def __init__(
        self,
        backbone: nn.Module,
        switch: adapters.Switch,
        adapter: str | None,
        autocast: torch.dtype | None,
        embeds: bool | None = None,
    ) -> None:
        self.backbone, self.adapter = backbone, adapter
        self.embeds = embedder.has(backbone) if embeds is None else embeds
        self._switch, self._autocast = switch, autocast
        self.root: Callable[[Callable[[], Tensor]], Tensor] = lambda call: call()

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x: b n c, t: b → b n c fp32."""
        tokens, ids = x.float(), cond.ids
        if cond.ref is not None and cond.ref_ids is not None:
            tokens = torch.cat([tokens, cond.ref.float()], 1)
            ids = torch.cat([ids, cond.ref_ids], 1)
        kwargs = None if cond.mask is None else {"attention_mask": cond.mask[:, None, None]}
        if self.embeds != (cond.guidance is not None):
            raise ValueError("guidance must be given to a role with the embedder, and to no other")
        def run() -> Tensor:
            # Inside the root: DeepSpeed switches an autocast of outside off.
            with self._switch(self.adapter), self._cast(x.device):
                return self.backbone(
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

        return self.root(run)[:, : x.shape[1]].float()

    def features(self, x: Tensor, t: Tensor, cond: Condition, block: int) -> tuple[Tensor, Tensor]:
        """See `flux2.types.Features`. Raises InputError for a block that there is not."""
        v, (states,) = self.states(x, t, cond, (block,))
        return v, states

    @property
    def depth(self) -> tuple[int, int]:
        """See `flux2.types.Features`."""
        return depth.depth_of(self.backbone)

    def states(
        self, x: Tensor, t: Tensor, cond: Condition, blocks: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """See `flux2.types.Features`. Raises InputError for a block that there is not."""
        body: Any = self.backbone
        there = [*body.transformer_blocks, *body.single_transformer_blocks]
        for block in blocks:
            if not 1 <= block <= len(there):
                raise InputError(
                    f"there is no block {block}: the transformer has 1 to {len(there)}"
                )
        kept: dict[int, Any] = {}

        def keeper(block: int) -> Callable[..., None]:
            def keep(*call: Any) -> None:
                kept[block] = call[-1]

            return keep

        handles = [there[b - 1].register_forward_hook(keeper(b)) for b in blocks]
        try:
            v = self(x, t, cond)
        finally:
            for handle in handles:
                handle.remove()
        return v, [self._target(kept[b], x, cond) for b in blocks]

    @staticmethod
    def _target(out: Any, x: Tensor, cond: Condition) -> Tensor:
        """The target tokens' states, of what a block gives: a double-stream one (text, image), a
        single-stream one both in one row."""
        states = out[1] if isinstance(out, tuple) else out[:, cond.text.shape[1] :]
        return states[:, : x.shape[1]].float()

    def _cast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._autocast, enabled=self._autocast is not None)

    def checkpointed(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Activation checkpointing whose recomputation runs with the adapter of the first pass."""
        active = _active(self._switch)

        def run(*inner: Any) -> Any:
            with self._switch(active):
                return block(*inner, **kwargs)

        return checkpoint(run, *args, use_reentrant=False)


def velocity_of(model: Flux2, autocast: str = "fp32") -> VelocityRole | PolicyRole:
    """A model as it is, with no adapter, as a velocity; for whoever samples and does not train.
    A policy student is a policy, too.

    autocast: of conf/engine, a key of `flux2.model.AUTOCAST`.
    """
    network = model.transformer
    role = VelocityRole(network, adapters.Switch(network), None, AUTOCAST[autocast])
    return role if model.head is None else PolicyRole(role, model.head)


def told(velocity: Velocity) -> Velocity:
    """The velocity, for a condition with a strength: a role without the embedder is not given it,
    neither with the prompt nor with the empty one. Others are as they are."""
    if not isinstance(velocity, VelocityRole) or velocity.embeds:
        return velocity

    def call(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        null = None if cond.null is None else replace(cond.null, guidance=None)
        return velocity(x, t, replace(cond, guidance=None, null=null))

    return call


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


def _projector(model: Flux2, spec: RoleSpec, seed: int, name: str) -> nn.Module:
    """b n w → b n out: REPA's three layers with SiLU (arXiv 2410.06940), 2048 wide between, or four
    times the transformer's width where that is less. Raises InputError without such a block."""
    config: Any = model.transformer.config
    blocks = config.num_layers + config.num_single_layers
    if spec.block > blocks:
        raise InputError(
            f"{name} takes the hidden states of block {spec.block}, and {model.info.name} has "
            f"{blocks}: choose an earlier one (the block= of what asks for it)"
        )
    width = config.num_attention_heads * config.attention_head_dim
    inner = min(2048, 4 * width)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(keyed(seed, "projector", name).integers(1 << 62)))
        sizes = ((width, inner), (inner, inner), (inner, spec.out))
        first, second, third = (nn.Linear(*size) for size in sizes)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third).to(model.device)


class Storage(Protocol):
    """Where weights lie. Parts are this rank's share, in place; whole tensors are fp32."""

    def part(self, parameter: nn.Parameter) -> Tensor:
        """The part of the network's own values that this rank holds."""
        ...

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The same part of a trainable parameter's fp32 master."""
        ...

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """All ranks' parts as one tensor of the parameter's shape. All ranks call it together."""
        ...

    def whole_master(self, parameter: nn.Parameter) -> Tensor:
        """A trainable parameter's fp32 master, whole. All ranks call it together."""
        ...

    def slice(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The part of `whole` that this rank holds."""
        ...

    def set_master(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Writes a trainable parameter: the master, and the network's own values."""
        ...


class Local:
    """Every rank holds everything; trainable weights are fp32 and their own masters."""

    def part(self, parameter: nn.Parameter) -> Tensor:
        return parameter.data

    def master(self, parameter: nn.Parameter) -> Tensor:
        return parameter.data

    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        return part

    def whole_master(self, parameter: nn.Parameter) -> Tensor:
        return parameter.data

    def slice(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        return whole

    def set_master(self, parameter: nn.Parameter, whole: Tensor) -> None:
        parameter.data.copy_(whole)


class Roles(Mapping[str, Any]):
    """The run's roles by name, and the one ModuleDict of backbones behind them.

    Args:
        specs: what the method asks for.
        model: its transformer (or autoencoder) is used, not copied, where one role alone has it.
        lora: adapters on the shared backbone; None trains all weights.
        autocast: dtype of the matrix products; None leaves the weights' own.
        checkpointing: recompute activations of trainable roles in the backward pass.
        seed: of fresh adapters.
        masters: keep what is trained, and what follows it, in fp32; an engine with masters of its
            own takes them in the model's dtype.
    """

    def __init__(
        self,
        specs: Mapping[str, RoleSpec],
        model: Flux2,
        lora: LoRA | None,
        autocast: torch.dtype | None,
        checkpointing: bool = False,
        seed: int = 0,
        masters: bool = True,
    ) -> None:
        self.specs, self._seed, self._masters = dict(specs), seed, masters
        self.storage: Storage = Local()
        self._averages: dict[str, dict[str, Tensor]] = {}
        self.backbones = Backbones()
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        embeds = model.info.guidance_embeds
        if not embeds and any(spec.embeds for spec in specs.values()):
            strengths = (s.strength for s in specs.values() if s.strength is not None)
            give_embedder(model, seed, next(strengths, None))
        for name, spec in specs.items():
            if embeds and spec.embeds is False:
                raise InputError(
                    f"{name} must be a model without a guidance embedder, and {model.info.name} "
                    "was trained with one: choose a base"
                )
        last = sorted(specs, key=lambda name: specs[name].source is not None)
        placed = {name: self._place(name, specs[name], model, lora) for name in last}
        switches = {k: adapters.Switch(m) for k, m in self.backbones.items()}
        self._roles: dict[str, Any] = {}
        for name in specs:
            backbone, adapter = placed[name]
            module = self.backbones[backbone]
            if specs[name].kind == "autoencoder":
                self._roles[name] = AutoencoderRole(module, autocast)
                continue
            if specs[name].kind == "projector":
                self._roles[name] = module
                continue
            takes = embeds if specs[name].embeds is None else specs[name].embeds
            role = VelocityRole(module, switches[backbone], adapter, autocast, takes)
            self._roles[name] = role
            if specs[name].kind == "policy":
                head: Any = self.backbones[f"{name}_head"]
                self._roles[name] = PolicyRole(role, head)
            if checkpointing:  # of a frozen role, too: gradients may pass through it
                module.enable_gradient_checkpointing(role.checkpointed)  # pyright: ignore
        for name, spec in specs.items():
            for parameter in self._parameters.get(name, {}).values():
                parameter.requires_grad_(spec.trainable)
            if spec.follows is not None:
                # A fresh adapter draws its own A, and an average must begin where its leader does.
                for mine, leader in self._pairs(name, spec.follows):
                    mine.data.copy_(leader.data)
        self.place(self.storage)

    def place(self, storage: Storage, root: Callable[..., Tensor] | None = None) -> None:
        """Takes up where an engine has put the weights; followers begin their fp32 averages."""
        self.storage = storage
        for name, spec in self.specs.items():
            if spec.follows is not None:
                parts = {k: storage.part(p) for k, p in self._parameters[name].items()}
                # An average in fp32 of a network in bf16 lies beside it; else it is the network.
                self._averages[name] = {k: v.float() for k, v in parts.items()}
            if root is not None and spec.kind == "velocity":
                self._roles[name].root = root

    def _place(
        self, name: str, spec: RoleSpec, model: Flux2, lora: LoRA | None
    ) -> tuple[str, str | None]:
        """Where a role lives: (backbone, adapter)."""
        own = spec.trainable or spec.follows is not None
        if spec.follows is not None and spec.follows not in self.specs:
            raise ValueError(f"role {name} follows {spec.follows}, which is no role of the method")
        if spec.kind == "autoencoder":
            self.backbones["vae"] = model.vae
            self._parameters[name] = self._owned(model.vae.named_parameters())
            return "vae", None
        if spec.kind == "projector":
            self.backbones[name] = _projector(model, spec, self._seed, name)
            self._parameters[name] = self._owned(self.backbones[name].named_parameters())
            return name, None
        if spec.source is not None:
            return self._sourced(name, spec.source, model)
        if spec.kind == "policy":
            self._parameters[name] = self._headed(name, spec, model)
        leader = spec if spec.follows is None else self.specs[spec.follows]
        if leader.blocks is not None:
            if lora is not None:
                raise InputError(
                    f"{name} has fewer blocks than {model.info.name}, which shares no backbone: "
                    "train all weights (adapter=null)"
                )
            self.backbones[name] = depth.shortened(model.transformer, leader.blocks)
            if own:
                self._own(name, self.backbones[name].named_parameters())
            return name, None
        if not own:
            self.backbones["base"] = model.transformer
            return "base", None
        if lora is not None:
            self.backbones["base"] = model.transformer
            if spec.embeds:
                lora = replace(lora, targets=embedder.targets(lora.targets))
            adapters.add(model.transformer, lora, name, self._seed)
            self._own(name, adapters.parameters(model.transformer, name).items())
            return "base", name
        alike = ("velocity", "policy")  # both are transformers
        others = [s for n, s in self.specs.items() if n != name and s.kind in alike]
        alone = not others
        self.backbones[name] = model.transformer if alone else copy.deepcopy(model.transformer)
        self._own(name, self.backbones[name].named_parameters())
        return name, None

    def _own(self, name: str, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Adds to what a role owns."""
        self._parameters[name] = {**self._owned(named), **self._parameters.get(name, {})}

    def _headed(self, name: str, spec: RoleSpec, model: Flux2) -> dict[str, nn.Parameter]:
        """A policy's head, fresh: no run starts from a policy student."""
        config: Any = model.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        head = Head(width, config.out_channels or config.in_channels, spec.policy, self._seed)
        self.backbones[f"{name}_head"] = head.to(model.device)
        return {PREFIX + k: p for k, p in self._owned(head.named_parameters()).items()}

    def _sourced(self, name: str, source: str, model: Flux2) -> tuple[str, str | None]:
        """Where another run's result lives, frozen."""
        found = open_result(source, model)
        if isinstance(found, nn.Module):
            self.backbones[name] = found
            return name, None
        self.backbones["base"] = model.transformer
        adapters.add(model.transformer, found.lora, name, self._seed)
        for key, parameter in adapters.parameters(model.transformer, name).items():
            lent = found.tensors[key.replace(f".{name}.", f".{found.name}.")]
            parameter.data = lent.to(parameter.device, parameter.dtype, copy=True)
            parameter.requires_grad_(False)
        return "base", name

    def _owned(self, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
        """What a role owns, by name; bf16 would swallow updates, so it is fp32 unless the engine
        keeps masters."""
        owned = dict(named)
        if self._masters:
            for parameter in owned.values():
                parameter.data = parameter.data.float()
        return owned

    def __getitem__(self, name: str) -> Any:
        return self._roles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A role's own parameters by name; {} for a frozen role."""
        return self._parameters.get(name, {})

    def count(self, name: str) -> int:
        """Number of a role's own parameters, whole."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters(name).values())

    @property
    def trainable(self) -> tuple[str, ...]:
        """Roles that have a parameter group."""
        return tuple(n for n, s in self.specs.items() if s.trainable)

    def activate(self, role: str | None) -> None:
        """Lets gradients reach `role` alone; None: every trainable role."""
        for name in self.trainable:
            for parameter in self._parameters[name].values():
                parameter.requires_grad_(role in (None, name))

    @torch.no_grad()
    def follow(self, leader: str) -> None:
        """Moves every role that follows `leader` one step: w ← decay·w + (1 − decay)·leader."""
        for name, spec in self.specs.items():
            if spec.follows != leader:
                continue
            averages = self._averages[name].values()
            for average, (mine, source) in zip(averages, self._pairs(name, leader), strict=True):
                average.lerp_(self.storage.master(source).to(average.device), 1 - spec.decay)
                self._show(mine, average)

    def _show(self, mine: nn.Parameter, average: Tensor) -> None:
        """Puts a follower's average into its network."""
        part = self.storage.part(mine)
        if part.data_ptr() != average.data_ptr():
            part.copy_(average)

    def _pairs(self, name: str, leader: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
        source = {_neutral(k, leader): p for k, p in self._parameters[leader].items()}
        return [(p, source[_neutral(k, name)]) for k, p in self._parameters[name].items()]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights that training changes (trainable roles and their followers), whole, fp32,
        by "role/path". All ranks go through it together."""
        for name, group in self._parameters.items():
            for key, p in group.items():
                if name in self._averages:
                    yield f"{name}/{key}", self.storage.whole(p, self._averages[name][key])
                else:
                    yield f"{name}/{key}", self.storage.whole_master(p)
        yield from self._statistics().items()

    def _statistics(self) -> dict[str, Tensor]:
        if "vae" not in self.backbones:
            return {}
        bn: Any = self.backbones["vae"].bn
        return {"vae/bn.running_mean": bn.running_mean, "vae/bn.running_var": bn.running_var}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of tensors; raises InputError where names or shapes differ."""
        groups = self._parameters.items()
        mine = {f"{name}/{key}": (name, p) for name, group in groups for key, p in group.items()}
        statistics = self._statistics()
        shapes = {k: tuple(getattr(p, "ds_shape", p.shape)) for k, (_, p) in mine.items()}
        shapes |= {k: tuple(v.shape) for k, v in statistics.items()}
        if set(shapes) != set(state):
            odd = min(set(shapes) ^ set(state))
            raise InputError(
                f"the checkpoint's weights do not fit this run ({odd} is on one side only): "
                "resume with the configuration it was made with"
            )
        for key, shape in shapes.items():
            value = state[key]
            if shape != tuple(value.shape):  # copy_ would broadcast a rank of 1
                raise InputError(
                    f"the checkpoint's {key} has shape {tuple(value.shape)} and this run's "
                    f"{shape}: resume with the configuration it was made with"
                )
            if key in statistics:
                statistics[key].copy_(value)
                continue
            name, parameter = mine[key]
            if name not in self._averages:
                self.storage.set_master(parameter, value)
                continue
            average = self._averages[name][key.removeprefix(f"{name}/")]
            average.copy_(self.storage.slice(parameter, value))
            self._show(parameter, average)


def _neutral(key: str, role: str) -> str:
    return key.replace(f".{role}.", ".")
