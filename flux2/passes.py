"""The passes that a run makes, without data: velocities in a loss, the autoencoder, the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux2 import adapters, attention, quantise
from flux2.activations import FEW, Curve, Pass, emptied, fake, follow
from flux2.adapters import LoRA
from flux2.architecture import build
from flux2.depth import KEYS, KINDS
from flux2.latents import LatentCodec
from flux2.roles import AutoencoderRole, VelocityRole
from flux2.types import Condition

_ROLE = "planned"


@dataclass(frozen=True)
class Shape:
    """What a sample is: pixels, and tokens of the prompt and of the references."""

    height: int
    width: int
    text: int
    references: int = 0
    patch: int = 16

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of target tokens."""
        return self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        """Target tokens."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Call:
    """One forward of a role, or a decoding that gradients pass through.

    Attributes:
        rows: samples in it.
        graded: with gradients.
        owner: trained, follower or frozen: whose weights. decoder: the images of what the graded
            forwards before it have made of the latents, one step after the other.
        states: after how many blocks hidden states are handed out (flux2.types.Features).
    """

    rows: int
    graded: bool
    owner: str = "trained"
    states: int = 0


@dataclass(frozen=True)
class Setting:
    """What decides how a velocity is computed.

    Attributes:
        base: dtype of frozen weights. trained: of what is trained, and of what follows it.
        lora: adapters on a frozen base; None trains all weights.
        autocast: dtype of matrix products; None leaves the weights' own.
        checkpointing: recompute in the backward pass.
        attention: diffusers' backend.
        masked: an attention mask is given.
        quantise: nf4, fp8, int8 or None.
        cuda: as on a GPU.
    """

    base: torch.dtype
    trained: torch.dtype
    lora: LoRA | None = None
    autocast: torch.dtype | None = torch.bfloat16
    checkpointing: bool = False
    attention: str | None = None
    masked: bool = False
    quantise: str | None = None
    cuda: bool = True


@dataclass(frozen=True)
class Decoder:
    """An autoencoder's config, and the dtypes of its matrix products and of its weights."""

    config: Mapping[str, Any]
    autocast: torch.dtype | None
    dtype: torch.dtype = torch.float32


def velocity_curve(
    config: Mapping[str, Any], calls: Sequence[Call], shape: Shape, setting: Setting,
    decoder: Decoder | None = None, short: Mapping[str, Any] | None = None,
) -> Curve:  # fmt: skip
    """Bytes over forwards of a Flux2Transformer2DModel of this config, made in order, and over the
    backward pass through those with gradients.

    decoder: needed where a call is a decoding. What looks at the images is not counted, save for
    the images and their gradient. short: config of what is trained, and of what follows it, where
    that has fewer blocks.
    """
    own = config if short is None else short
    shapes: dict[str, Mapping[str, Any]] = {"trained": own, "follower": own, "frozen": config}
    depth = {
        f"{kind} {owner}": int(mine[key])
        for owner, mine in shapes.items()
        for kind, key in zip(KINDS, KEYS, strict=True)
    }
    forwards = [c for c in calls if c.owner != "decoder"]
    owners = {_place(c.owner, setting) for c in forwards}
    networks = {owner: _network(_few(shapes[owner]), owner, setting) for owner in owners}
    vae = None if decoder is None else _meta(decoder.config).to(decoder.dtype)
    with fake(setting.cuda) as tracker:
        roles = {}
        for owner, network in networks.items():
            emptied(network, setting.cuda)
            adapter = _ROLE if setting.lora is not None else None
            role = VelocityRole(network, adapters.Switch(network), adapter, setting.autocast)
            plain = VelocityRole(network, adapters.Switch(network), None, setting.autocast)
            roles |= {(owner, True): role, (owner, False): plain}
            if setting.checkpointing and owner == "trained":
                network.enable_gradient_checkpointing(role.checkpointed)  # pyright: ignore
        samples = {c.rows: _sample(config, c.rows, shape, setting.masked) for c in forwards}
        rows = next((c.rows for c in calls if c.owner == "decoder"), 0)
        codec = None
        if decoder is not None and vae is not None:
            codec = LatentCodec(emptied(vae, setting.cuda), decoder.autocast)

        def run() -> list[Tensor]:
            outs: list[Tensor] = []
            seen: list[Tensor] = []  # hidden states of frozen networks, which others are held to
            left = rows  # a path of latents, until they are decoded
            path = samples[forwards[0].rows][0][:rows]
            for call in calls:
                if call.owner == "decoder":
                    assert codec is not None
                    outs.append((codec.decode_float(path, shape.grid) / 2 + 0.5).clamp(0, 1))
                    left, path = 0, path[:0]
                    continue
                role = roles[_place(call.owner, setting), call.owner != "frozen"]
                x, t, cond = samples[call.rows]
                with torch.set_grad_enabled(call.graded):
                    if not (left and call.graded):
                        outs.append(role(x, t, cond))
                        outs += _states(outs[-1], call, cond, config, setting, seen)
                        continue
                    branches = call.rows // left  # two where they are guided
                    v = role(torch.cat([path] * branches) if branches > 1 else path, t, cond)
                    path = path + 0.1 * v.view(branches, left, *v.shape[1:]).sum(0)
            return outs

        inputs = [t for sample in samples.values() for t in _tensors(sample)]
        inputs += [] if codec is None else [codec.mean, codec.std]
        blocks: dict[str, list[Sequence[nn.Module]]] = {}
        for owner, network in networks.items():
            blocks[f"double {owner}"] = [list(network.transformer_blocks)]  # pyright: ignore
            blocks[f"single {owner}"] = [list(network.single_transformer_blocks)]  # pyright: ignore
        all_networks = [*networks.values(), *([] if vae is None else [vae])]
        return follow(Pass(all_networks, run, inputs, blocks), tracker, depth)


def _few(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the blocks that are really run."""
    return {**config, **{key: min(int(config[key]), FEW) for key in KEYS}}


def _states(
    v: Tensor, call: Call, cond: Condition, config: Mapping[str, Any], setting: Setting,
    seen: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """What handing out hidden states and comparing them keeps, as storages of their sizes: those
    that are compared with go to `seen`, their differences from graded ones are returned."""
    b, n = v.shape[:2]
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    held = setting.autocast or setting.base
    if not call.graded:
        every = n + cond.text.shape[1] + (0 if cond.ref is None else cond.ref.shape[1])
        raw = [torch.empty(b, every, width, dtype=held) for _ in range(call.states)]
        seen += raw if held == torch.float32 else [torch.empty(b, n, width) for _ in raw]
        return []
    out: list[Tensor] = []
    for k in range(call.states):
        # In the backward pass a state's gradient goes where it came from; v stands for that.
        state = v.mean(-1, keepdim=True).expand(b, n, width)
        if held != torch.float32:  # its copy in fp32; else it is the block's own output
            state = state.contiguous()
            seen.append(state)
        out.append(state - (seen[k][:, :n] if k < len(seen) else 0.0))
    return out


def _place(owner: str, setting: Setting) -> str:
    """With LoRA, one network has all roles."""
    return "trained" if setting.lora is not None else owner


def _network(config: Mapping[str, Any], owner: str, setting: Setting) -> nn.Module:
    full = setting.lora is None
    with torch.device("meta"):
        network = build("transformer", config)
    for p in network.parameters():
        p.data = p.data.to(setting.trained if full and owner != "frozen" else setting.base)
        p.requires_grad_(full and owner == "trained")
    attention.install(network, setting.attention)
    if setting.quantise is not None:
        _pack(network)
    if setting.lora is not None:
        adapters.add(network, setting.lora, _ROLE)
        for p in adapters.parameters(network, _ROLE).values():
            p.data = p.data.to(setting.trained)
            p.requires_grad_(True)
    return network


def _pack(network: nn.Module) -> None:
    """Quantised layers: what they compute with, and for how long, is alike in all formats."""
    for path, layer in list(quantise.layers(network)):
        parent, _, child = path.rpartition(".")
        packed = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
        scale = torch.empty(layer.weight.shape[0], 1, device="meta")
        setattr(network.get_submodule(parent), child, quantise.Packed(packed, scale, None))


def _sample(
    config: Mapping[str, Any], rows: int, shape: Shape, masked: bool
) -> tuple[Tensor, Tensor, Condition]:
    """x, t and condition of a forward."""
    n, s, m = shape.tokens, shape.text, shape.references * shape.tokens
    channels = int(config["in_channels"])

    def ids(length: int) -> Tensor:
        return torch.zeros(rows, length, 4, dtype=torch.int64)

    cond = Condition(
        text=torch.empty(rows, s, int(config["joint_attention_dim"])),
        text_ids=ids(s),
        ids=ids(n),
        ref=torch.empty(rows, m, channels) if m else None,
        ref_ids=ids(m) if m else None,
        mask=torch.ones(rows, s + n + m, dtype=torch.bool) if masked else None,
        guidance=torch.empty(rows) if config.get("guidance_embeds", True) else None,
    )
    return torch.empty(rows, n, channels), torch.empty(rows), cond


def _tensors(sample: tuple[Tensor, Tensor, Condition]) -> list[Tensor]:
    x, t, cond = sample
    return [x, t, *(v for v in vars(cond).values() if isinstance(v, Tensor))]


def _meta(config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return build("vae", config).requires_grad_(False).eval()


def codec_curve(
    config: Mapping[str, Any], rows: int, shape: Shape, autocast: torch.dtype | None, decode: bool,
    cuda: bool = True, dtype: torch.dtype = torch.float32,
) -> Curve:  # fmt: skip
    """Bytes over encoding or decoding so many images at once, without gradients."""
    vae = _meta(config).to(dtype)
    with fake(cuda) as tracker:
        codec = LatentCodec(emptied(vae, cuda), autocast)
        tokens = torch.empty(rows, shape.tokens, codec.mean.numel())
        images = torch.empty(rows, 3, shape.height, shape.width, dtype=torch.uint8)
        one = Pass(
            [vae],
            lambda: [codec.decode(tokens, shape.grid) if decode else codec.encode(images)],
            [tokens, images, codec.mean, codec.std],
        )
        return follow(one, tracker, {})


def autoencoder_curve(
    config: Mapping[str, Any], rows: int, shape: Shape, autocast: torch.dtype | None,
    cuda: bool = True,
) -> Curve:  # fmt: skip
    """Bytes over training an autoencoder on so many images."""
    vae = _meta(config).requires_grad_(True)
    with fake(cuda) as tracker:
        role = AutoencoderRole(emptied(vae, cuda), autocast)
        images = torch.empty(rows, 3, shape.height, shape.width)

        def run() -> list[Tensor]:
            return list(role.reconstruct(images, lambda size: torch.empty(rows, *size)))

        return follow(Pass([vae], run, [images]), tracker, {})


def text_curve(
    encoder: nn.Module, layers: Sequence[int], rows: int, length: int, cuda: bool = True
) -> Curve:
    """Bytes over encoding so many prompts at once. encoder: on the meta device; it is emptied."""
    from flux2.text import language_model

    with fake(cuda) as tracker:
        model = language_model(emptied(encoder.eval()))
        ids = torch.zeros(rows, length, dtype=torch.int64)

        def run() -> list[Tensor]:
            with torch.no_grad():
                out = model(
                    input_ids=ids, attention_mask=ids, output_hidden_states=True, use_cache=False
                )
                return [torch.stack([out.hidden_states[k] for k in layers], 1)]

        return follow(Pass([encoder], run, [ids]), tracker, {})
