"""Opens an export as its ecosystem does and compares it with the model that it was made from.

Three comparisons: the weights, one by one; the velocity on a fixed probe, against the run's own
role; and for a whole pipeline a short sampling, prompt to image, against ours. Models below
`SMALL` parameters are opened in fp32, so that nothing but the file's rounding is seen; larger ones
on the CPU in the file's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flux2.formats import Adapter, Part
from flux2.latents import LatentCodec, grid_ids
from flux2.model import Flux2, quiet
from flux2.policy import Head, read
from flux2.rng import Rng
from flux2.samplers import sample_euler, sample_renoise
from flux2.schedule import Schedule, empirical_mu
from flux2.text import text_ids
from flux2.types import Condition, Velocity

SMALL = 10**9
ENCODER_LIMIT = 2 << 30
"""Bytes of a text encoder above which it is not opened again; random features take its place."""
PROMPT = 'a red circle above the word "TAXI" in white'
GRID, TEXT, STEPS, GUIDANCE = (4, 4), 8, 2, 4.0
TIMES = (0.896, 0.256)
"""Times that bf16, too, multiplies by 1000 without loss: diffusers does so in the model's dtype."""
TOLERANCE = {
    torch.float32: {"weights": 0.0, "lora": 1e-6, "velocity": 1e-4, "image": 1e-3},
    torch.bfloat16: {"weights": 0.0, "lora": 1e-2, "velocity": 5e-2, "image": 5e-2},
}
"""Largest relative difference, by the export's dtype. Weights are compared after rounding, so none
is allowed there; LoRA's as B A."""
ROUGH = {"velocity": 5e-2, "image": 0.15}
"""The same where matrix products run in bf16 on one side or both."""
SIGMAS = 1e-6
"""Largest difference of any σ."""


def tolerance(model: Flux2, dtype: torch.dtype) -> dict[str, float]:
    """What each comparison may differ by."""
    opened, _ = _how(model, dtype)
    held = next(model.transformer.parameters()).dtype
    rough = ROUGH if torch.bfloat16 in (opened, held) else {}
    return {**TOLERANCE[dtype], **rough, "sigmas": SIGMAS, "head": 0.0}


def probe(model: Flux2) -> tuple[Tensor, Tensor, Condition]:
    """The fixed (x, t, cond) that every velocity is asked for; text features are random, so that no
    text encoder is needed."""
    ids, device = torch.arange(len(TIMES)), model.device
    rng = Rng(0, 0)
    width = int(model.transformer.config.joint_attention_dim)  # pyright: ignore
    channels = int(model.transformer.config.in_channels)  # pyright: ignore
    x = rng("export", ids, (GRID[0] * GRID[1], channels), counter=0)
    text = rng("export", ids, (TEXT, width), counter=1)
    guidance = torch.full((len(TIMES),), GUIDANCE) if model.info.guidance_embeds else None
    cond = Condition(
        text=text,
        text_ids=text_ids(len(TIMES), TEXT),
        ids=grid_ids(GRID).expand(len(TIMES), -1, -1),
        guidance=guidance,
    )
    return x.to(device), torch.tensor(TIMES, device=device), cond.map(lambda v: v.to(device))


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖; infinite where either is not finite."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    value = float((got - want).norm() / want.norm().clamp(min=1e-30))
    return value if value == value else float("inf")


def bare(transformer: Any) -> Velocity:
    """A diffusers transformer as it comes, as v(x, t, cond); all samples share their positions."""

    @torch.no_grad()
    def call(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        weight = next(transformer.parameters())
        cond = cond.map(lambda v: v.to(weight.device))
        return transformer(
            hidden_states=x.to(weight),
            encoder_hidden_states=cond.text.to(weight),
            timestep=t.to(weight.device),
            img_ids=cond.ids[0],
            txt_ids=cond.text_ids[0],
            guidance=cond.guidance,
            return_dict=False,
        )[0].float()

    return call


@contextmanager
def hushed() -> Iterator[None]:
    """Without the libraries' own warnings and progress bars: what matters is compared."""
    quiet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _how(model: Flux2, dtype: torch.dtype) -> tuple[torch.dtype, torch.device]:
    """What to open an export in, and where."""
    small = model.info.parameters < SMALL
    return (torch.float32, model.device) if small else (dtype, torch.device("cpu"))


def shell(model: Flux2, weights: Mapping[str, Tensor]) -> Any:
    """A plain diffusers transformer around existing tensors; none is copied."""
    body: Any = model.transformer
    with torch.device("meta"):
        out = type(body).from_config(body.config)
    out.load_state_dict(dict(weights), assign=True)
    return out.eval().requires_grad_(False)


# ---------------------------------------------------------------- whole models


def check_pipeline(
    model: Flux2, folder: Path, parts: Mapping[str, Part], dtype: torch.dtype, want: Tensor,
    schedule: Schedule, renoise: bool,
) -> dict[str, float]:  # fmt: skip
    """A folder in diffusers' layout, through DiffusionPipeline.from_pretrained."""
    from diffusers import DiffusionPipeline

    opened, device = _how(model, dtype)
    encoder = folder / "text_encoder"
    silent = model.text.encoder is None
    silent = silent or sum(f.stat().st_size for f in encoder.iterdir()) > ENCODER_LIMIT
    left_out = {"text_encoder": None, "tokenizer": None} if silent else {}
    with hushed(), torch.no_grad():
        pipeline: Any = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=opened, local_files_only=True, **left_out
        )
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        return {
            "weights": _weights(pipeline.transformer, parts),
            "velocity": relative(bare(pipeline.transformer)(*probe(model)), want),
            "sigmas": _sigmas(pipeline.scheduler, schedule),
            "image": _image(model, pipeline, schedule, renoise, silent),
        }


def check_single(
    model: Flux2, file: Path, parts: Mapping[str, Part], dtype: torch.dtype, want: Tensor
) -> dict[str, float]:
    """An original file, through Flux2Transformer2DModel.from_single_file; its config.json lies in
    transformer/ beside it."""
    from diffusers import Flux2Transformer2DModel

    opened, device = _how(model, dtype)
    with hushed():
        transformer: Any = Flux2Transformer2DModel.from_single_file(
            str(file), config=str(file.parent), subfolder="transformer", torch_dtype=opened,
            local_files_only=True,
        )  # fmt: skip
        transformer.to(device)
    return {
        "weights": _weights(transformer, parts),
        "velocity": relative(bare(transformer)(*probe(model)), want),
    }


def _weights(loaded: nn.Module, parts: Mapping[str, Part]) -> float:
    """The largest difference of any weight; infinite where names differ."""
    found = loaded.state_dict()
    if found.keys() != parts.keys():
        return float("inf")
    worst = 0.0
    for name, part in parts.items():
        want = part.make()
        got = found[name].to(want.device)
        if got.shape != want.shape:
            return float("inf")
        if not torch.equal(got.to(torch.float32), want.to(torch.float32)):
            worst = max(worst, relative(got, want), 1e-30)
    return worst


def _sigmas(scheduler: Any, schedule: Schedule) -> float:
    """The largest difference of any σ from ours, as the pipelines set them."""
    worst = 0.0
    for steps in (1, 4, 10, 50):
        for tokens in (16, 1024, 4096, 8192):
            ramp = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
            scheduler.set_timesteps(sigmas=ramp, mu=empirical_mu(tokens, steps))
            got = scheduler.sigmas.cpu() - schedule(steps, tokens).tensor()
            worst = max(worst, float(got.abs().max()))
    return worst


def _image(
    model: Flux2, pipeline: Any, schedule: Schedule, renoise: bool, silent: bool
) -> float:
    """A short sampling through the pipeline, against our text, sampler and decoder around the same
    transformer. silent: without the text encoders."""
    device = pipeline.transformer.device
    text = model.text
    patch = model.codec.patch
    if silent:
        features = probe(model)[2].text[:1].to(device)
        said = {"prompt_embeds": features.to(pipeline.transformer.dtype)}
    else:
        features = text([PROMPT], device)
        said = {
            "prompt": PROMPT,
            "max_sequence_length": text.max_length,
            "text_encoder_out_layers": text.layers,
        }
    # klein's pipeline gives no number, also to a transformer that takes one.
    asks = model.info.guidance_embeds and type(pipeline).__name__ == "Flux2Pipeline"
    guidance = torch.full((1,), GUIDANCE, device=device) if asks else None
    cond = Condition(
        text=features.float(),
        text_ids=text_ids(1, features.shape[1], device),
        ids=grid_ids(GRID, device=device)[None],
        guidance=guidance,
    )
    noise = probe(model)[0][:1].to(device)
    grid, velocity = schedule(STEPS, GRID[0] * GRID[1]), bare(pipeline.transformer)
    with _seeded():
        if renoise:
            x = sample_renoise(velocity, noise, cond, grid, lambda i: torch.randn_like(noise))
        else:
            x = sample_euler(velocity, noise, cond, grid)
    weight = next(model.vae.parameters())
    ours = LatentCodec(model.vae).decode_float(x.to(weight.device), GRID).clamp(-1, 1)
    laid = rearrange(noise, "b (h w) c -> b c h w", h=GRID[0]).to(pipeline.transformer.dtype)
    with _seeded():
        theirs = pipeline(
            **said,
            height=GRID[0] * patch,
            width=GRID[1] * patch,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE if asks else 1.0,
            latents=laid,
            output_type="pt",
        ).images
    return relative(theirs.float() * 2 - 1, ours)


@contextmanager
def _seeded() -> Iterator[None]:
    """With torch's global generator at 0, from which a scheduler draws its noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def check_head(folder: Path, head: Head) -> float:
    """The largest difference of a policy student's head, as it is read again."""
    again, want = read(folder, torch.device("cpu")), head.state_dict()
    if again is None or again.shape != head.shape:
        return float("inf")
    return max(relative(v, want[k]) for k, v in again.state_dict().items())


# ---------------------------------------------------------------- LoRA


def check_lora(
    model: Flux2, file: Path, base: Mapping[str, Tensor], adapter: Adapter, want: Tensor
) -> dict[str, float]:
    """A LoRA file, through the pipeline's load_lora_weights onto the base it was trained on."""
    from diffusers import Flux2KleinPipeline, Flux2Pipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind: Any = Flux2Pipeline if model.info.guidance_embeds else Flux2KleinPipeline
    small = model.info.parameters < SMALL
    plain = shell(model, {k: v.detach().float() for k, v in base.items()} if small else base)
    with hushed():
        pipeline = kind(
            scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=plain
        )
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="export")
    found = {
        path: layer.get_delta_weight("export")  # pyright: ignore
        for path, layer in plain.named_modules()
        if isinstance(layer, BaseTunerLayer) and "export" in layer.lora_A  # pyright: ignore
    }
    if found.keys() != adapter.pairs.keys():
        lora = float("inf")
    else:
        lora = max(relative(delta, adapter.delta(path)) for path, delta in found.items())
    return {"lora": lora, "velocity": relative(bare(plain)(*probe(model)), want)}
