"""The two layouts: against diffusers' own converters, and against the original network, written
here from its description alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from einops import rearrange
from torch import Tensor

from flux2 import formats
from flux2.errors import InputError
from flux2.formats import Adapter, Part

SHAPE = {
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 256,
    "axes_dims_rope": (4, 4, 4, 4),
    "rope_theta": 2000,
}
TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_add_out", "ff.linear_in", "ff_context.linear_out",
    "attn.to_qkv_mlp_proj",
)  # fmt: skip


def model(guidance: bool = True) -> Any:
    torch.manual_seed(0)
    out = Flux2Transformer2DModel(**SHAPE, guidance_embeds=guidance).eval().requires_grad_(False)
    for p in out.parameters():  # norms, too: ones would hide that they were mixed up
        p.add_(0.1 * torch.randn(p.shape))
    return out


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0), torch.zeros(1))
    row = torch.zeros(5, 4)
    row[:, 3] = torch.arange(5.0)
    return {
        "x": torch.randn(2, 6, 128, generator=g),
        "text": torch.randn(2, 5, 24, generator=g),
        "t": torch.tensor([0.9, 0.3]),
        "guidance": torch.tensor([4.0, 1.5]),
        "ids": ids,
        "text_ids": row,
    }


def diffusers_forward(body: Any, guidance: bool = True) -> Tensor:
    v = inputs()
    return body(
        hidden_states=v["x"], encoder_hidden_states=v["text"], timestep=v["t"], img_ids=v["ids"],
        txt_ids=v["text_ids"], guidance=v["guidance"] if guidance else None, return_dict=False,
    )[0]  # fmt: skip


# ---------------------------------------------------------------- the original network


def original_forward(w: dict[str, Tensor], guidance: bool = True) -> Tensor:
    """The published network by its parameter names: shared modulations in the order shift, scale,
    gate; q, k, v in the rows of qkv; SwiGLU with the gate first; adjacent pairs rotated."""
    v = inputs()
    heads = SHAPE["num_attention_heads"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T

    def embed(name: str, value: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angle = 1000 * value[:, None] * frequency
        wave = torch.cat([angle.cos(), angle.sin()], -1)
        return linear(f"{name}.out_layer", F.silu(linear(f"{name}.in_layer", wave)))

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def rms(name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[f"{name}.scale"]

    def modulation(name: str, vec: Tensor) -> list[Tensor]:
        out = linear(name, F.silu(vec))[:, None]
        return list(out.split(w["img_in.weight"].shape[0], -1))

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    positions = torch.cat([v["text_ids"], v["ids"]])
    angles = [
        positions[:, i : i + 1] * SHAPE["rope_theta"] ** (-torch.arange(0, d, 2) / d)
        for i, d in enumerate(SHAPE["axes_dims_rope"])
    ]
    cos, sin = torch.cat(angles, -1).cos(), torch.cat(angles, -1).sin()  # l d/2

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def attend(q: Tensor, k: Tensor, value: Tensor) -> Tensor:
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        return rearrange(scores.softmax(-1) @ value, "b h l d -> b l (h d)")

    def project(qkv: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, value = rearrange(qkv, "b l (k h d) -> k b h l d", k=3, h=heads)
        return rms(f"{name}.query_norm", q), rms(f"{name}.key_norm", k), value

    vec = embed("time_in", v["t"])
    if guidance:
        vec = vec + embed("guidance_in", v["guidance"])
    modulations = {s: modulation(f"double_stream_modulation_{s}.lin", vec) for s in ("img", "txt")}
    stream = {"img": linear("img_in", v["x"]), "txt": linear("txt_in", v["text"])}
    for i in range(SHAPE["num_layers"]):
        block, parts = f"double_blocks.{i}", []
        for s in ("txt", "img"):
            shift, scale = modulations[s][:2]
            qkv = linear(f"{block}.{s}_attn.qkv", (1 + scale) * norm(stream[s]) + shift)
            parts.append(project(qkv, f"{block}.{s}_attn.norm"))
        mixed = attend(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)))
        cut = stream["txt"].shape[1]
        for s, out in (("txt", mixed[:, :cut]), ("img", mixed[:, cut:])):
            gate, shift, scale, gate_mlp = modulations[s][2:]
            x = stream[s] + gate * linear(f"{block}.{s}_attn.proj", out)
            inner = linear(f"{block}.{s}_mlp.0", (1 + scale) * norm(x) + shift)
            stream[s] = x + gate_mlp * linear(f"{block}.{s}_mlp.2", swiglu(inner))
    x = torch.cat([stream["txt"], stream["img"]], 1)
    shift, scale, gate = modulation("single_stream_modulation.lin", vec)
    width = x.shape[-1]
    for i in range(SHAPE["num_single_layers"]):
        block = f"single_blocks.{i}"
        joint = linear(f"{block}.linear1", (1 + scale) * norm(x) + shift)
        out = attend(*project(joint[..., : 3 * width], f"{block}.norm"))
        both = torch.cat([out, swiglu(joint[..., 3 * width :])], -1)
        x = x + gate * linear(f"{block}.linear2", both)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(vec))[:, None].chunk(2, -1)
    x = (1 + scale) * norm(x[:, v["text"].shape[1] :]) + shift
    return linear("final_layer.linear", x)


@pytest.mark.parametrize("guidance", [True, False])
def test_the_original_network_computes_the_same(guidance):
    body = model(guidance)
    want = diffusers_forward(body, guidance)
    got = original_forward(formats.to_original(body.state_dict()), guidance)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_halves_of_the_last_modulation_are_swapped():
    body = model()
    weights = formats.to_original(body.state_dict())
    name = "final_layer.adaLN_modulation.1.weight"
    assert torch.equal(weights[name][:32], body.norm_out.linear.weight[32:])
    weights[name] = body.norm_out.linear.weight  # unswapped, it is another network
    assert (original_forward(weights) - diffusers_forward(body)).abs().max() > 1e-2


# ---------------------------------------------------------------- diffusers' converter


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_converts_back_to_the_same_tensors(guidance):
    weights = model(guidance).state_dict()
    back = convert_flux2_transformer_checkpoint_to_diffusers(formats.to_original(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)


def test_both_directions_are_inverse():
    weights = model().state_dict()
    ours = formats.to_original(weights)
    back = formats.to_diffusers(ours)
    assert back.keys() == weights.keys() and all(torch.equal(back[k], weights[k]) for k in back)
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(ours))
    assert all(torch.equal(back[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    ("doubles", "singles", "heads", "text", "guidance", "total"),
    [
        (5, 20, 24, 7680, False, 3_875_544_576),
        (8, 24, 32, 12288, False, 9_078_581_248),
        (8, 48, 48, 15360, True, 32_223_281_152),
    ],
    ids=["klein-4b", "klein-9b", "dev"],
)
def test_names_and_shapes_of_the_published_files(doubles, singles, heads, text, guidance, total):
    d = 128 * heads
    want = {
        "img_in.weight": (d, 128),
        "txt_in.weight": (d, text),
        "double_stream_modulation_img.lin.weight": (6 * d, d),
        "double_stream_modulation_txt.lin.weight": (6 * d, d),
        "single_stream_modulation.lin.weight": (3 * d, d),
        "final_layer.linear.weight": (128, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
    }
    for name in ("time_in", "guidance_in")[: 1 + guidance]:
        want |= {f"{name}.in_layer.weight": (d, 256), f"{name}.out_layer.weight": (d, d)}
    for i in range(doubles):
        for s in ("img", "txt"):
            block = f"double_blocks.{i}.{s}"
            want |= {
                f"{block}_attn.qkv.weight": (3 * d, d),
                f"{block}_attn.proj.weight": (d, d),
                f"{block}_attn.norm.query_norm.scale": (128,),
                f"{block}_attn.norm.key_norm.scale": (128,),
                f"{block}_mlp.0.weight": (6 * d, d),
                f"{block}_mlp.2.weight": (d, 3 * d),
            }
    for i in range(singles):
        block = f"single_blocks.{i}"
        want |= {
            f"{block}.linear1.weight": (9 * d, d),
            f"{block}.linear2.weight": (d, 4 * d),
            f"{block}.norm.query_norm.scale": (128,),
            f"{block}.norm.key_norm.scale": (128,),
        }
    with torch.device("meta"):
        body = Flux2Transformer2DModel(
            num_layers=doubles, num_single_layers=singles, num_attention_heads=heads,
            attention_head_dim=128, joint_attention_dim=text, guidance_embeds=guidance,
        )  # fmt: skip
    parts = formats.original({k: Part.of(v) for k, v in body.state_dict().items()})
    assert {k: p.shape for k, p in parts.items()} == want
    assert sum(math.prod(p.shape) for p in parts.values()) == total


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_other_weights_are_refused(change):
    weights = dict(model().state_dict())
    packed = formats.to_original(weights)
    if change == "missing":
        del weights["transformer_blocks.0.attn.to_k.weight"], packed["img_in.weight"]
    else:
        weights["extra.weight"] = packed["extra.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match="no FLUX"):
        formats.to_original(weights)
    with pytest.raises(InputError, match="no FLUX"):
        formats.to_diffusers(packed)


# ---------------------------------------------------------------- LoRA


def adapter(body: Any, rank: int = 3, alpha: float = 5.0, skip: str = "") -> Adapter:
    g = torch.Generator().manual_seed(2)
    tensors = {}
    for name, layer in body.named_modules():
        if name.endswith(TARGETS) and (not skip or not name.endswith(skip)):
            rows, columns = layer.weight.shape
            tensors[f"{name}.lora_A.policy.weight"] = torch.randn(rank, columns, generator=g) / 5
            tensors[f"{name}.lora_B.policy.weight"] = torch.randn(rows, rank, generator=g) / 5
    return Adapter.read(tensors, alpha / rank)


def folded(body: Any, lora: Adapter) -> dict[str, Tensor]:
    parts = formats.merged(body.state_dict(), lora, torch.float32)
    return {k: p.make() for k, p in parts.items()}


def test_merging_is_the_sum():
    body = model()
    lora = adapter(body)
    weights = folded(body, lora)
    path = "transformer_blocks.0.attn.to_q"
    a, b = lora.pairs[path]
    want = body.state_dict()[f"{path}.weight"] + 5 / 3 * torch.einsum("mr, rk -> mk", b, a)
    torch.testing.assert_close(weights[f"{path}.weight"], want)
    assert torch.equal(weights["proj_out.weight"], body.proj_out.weight)


def test_original_keys_give_the_original_network_the_adapter():
    """W + B A on the original layers, as ComfyUI adds it, is the trained model."""
    body = model()
    lora = adapter(body)
    tensors = formats.lora_original(lora)
    weights = formats.to_original(body.state_dict())
    layers = {k.rsplit(".lora_", 1)[0] for k in tensors}
    for layer in layers:
        a, b = (tensors[f"{layer}.lora_{x}.weight"] for x in "AB")
        weights[f"{layer.removeprefix('diffusion_model.')}.weight"] += b @ a
    body.load_state_dict(folded(body, lora))
    want = diffusers_forward(body)
    torch.testing.assert_close(original_forward(weights), want, atol=1e-4, rtol=1e-4)
    assert (want - diffusers_forward(model())).abs().max() > 1e-2
    fused = tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"]
    assert fused.shape == (96, 9) and torch.count_nonzero(fused[:32, 3:]) == 0
    assert not [k for k in tensors if "alpha" in k or "adaLN" in k]


@pytest.mark.parametrize("kind", ["diffusers", "original"])
def test_diffusers_loads_what_was_trained(kind, tmp_path):
    from safetensors.torch import save_file

    body = model(guidance=False)
    lora = adapter(body)
    metadata = {}
    if kind == "diffusers":
        tensors, metadata = formats.lora_diffusers(lora)
    else:
        tensors = formats.lora_original(lora)
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    body.load_state_dict(folded(body, lora))
    want = diffusers_forward(body, False)
    pipeline = Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=model(False)
    )
    before = diffusers_forward(pipeline.transformer, False)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    got = diffusers_forward(pipeline.transformer, False)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["diffusers", "original"])
def test_a_lora_file_is_read_back(kind):
    lora = adapter(model())
    if kind == "diffusers":
        back = formats.read_lora(*formats.lora_diffusers(lora))
        assert all(torch.equal(back.pairs[k][0], a) for k, (a, _) in lora.pairs.items())
    else:
        back = formats.read_lora(formats.lora_original(lora), {})
    assert back.pairs.keys() == lora.pairs.keys()
    for path in lora.pairs:
        torch.testing.assert_close(back.delta(path), lora.delta(path), atol=1e-6, rtol=1e-5)


def test_a_projection_without_adapter_stays_as_it_is():
    lora = adapter(model(), skip="to_k")
    tensors = formats.lora_original(lora)
    name = "diffusion_model.double_blocks.1.img_attn.qkv"
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    assert a.shape == (6, 32) and b.shape == (96, 6)
    q, k, v = (b @ a).chunk(3)
    assert torch.count_nonzero(k) == 0
    torch.testing.assert_close(q, lora.delta("transformer_blocks.1.attn.to_q"))
    torch.testing.assert_close(v, lora.delta("transformer_blocks.1.attn.to_v"))


def test_ranks_that_differ_travel_in_the_metadata():
    fused = formats.read_lora(formats.lora_original(adapter(model())), {})
    tensors, metadata = formats.lora_diffusers(fused)
    config = json.loads(metadata["lora_adapter_metadata"])
    path = "transformer_blocks.0.attn.to_q"
    rank = config["transformer.rank_pattern"].get(path, config["transformer.r"])
    assert rank == 9 == tensors[f"transformer.{path}.lora_A.weight"].shape[0]
    assert config["transformer.lora_alpha"] == config["transformer.r"]  # scale 1


def test_what_original_keys_cannot_carry_is_refused():
    pair = (torch.zeros(2, 32), torch.zeros(64, 2))
    with pytest.raises(InputError, match=r"norm_out\.linear.*lora-diffusers"):
        formats.lora_original(Adapter({"norm_out.linear": pair}, 1.0))
    with pytest.raises(InputError, match="no place"):
        formats.lora_original(Adapter({"somewhere.else": pair}, 1.0))
    half = {"diffusion_model.img_in.lora_A.weight": pair[0]}
    with pytest.raises(InputError, match="one half"):
        formats.read_lora(half, {})
    alpha = {**half, "diffusion_model.img_in.alpha": torch.tensor(1.0)}
    with pytest.raises(InputError, match="no weight of a LoRA"):
        formats.read_lora(alpha, {})
    with pytest.raises(InputError, match="begin neither"):
        formats.read_lora({"lora_unet_x.lora_down.weight": pair[0]}, {})


def test_an_adapter_for_another_model_is_refused():
    body = model()
    lora = adapter(body)
    path = "transformer_blocks.0.attn.to_q"
    odd = Adapter({**lora.pairs, path: (torch.zeros(3, 31), torch.zeros(32, 3))}, 1.0)
    with pytest.raises(InputError, match="another model"):
        formats.merged(body.state_dict(), odd, torch.float32)
    with pytest.raises(InputError, match="quantised"):
        weights = {**body.state_dict(), "x_embedder.weight": torch.zeros(4, dtype=torch.uint8)}
        formats.merged(weights, None, torch.float32)
