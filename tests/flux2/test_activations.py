"""The tracker on cases counted by hand, and repeated blocks against blocks that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux2 import activations, passes
from flux2.activations import Curve, Pass, Tracker, emptied, fake, follow
from flux2.adapters import LoRA
from flux2.architecture import build
from flux2.passes import Call, Setting, Shape, velocity_curve

KIB = 1024
CONFIG = {
    "in_channels": 16, "num_layers": 4, "num_single_layers": 5, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 24, "timestep_guidance_channels": 32,
    "mlp_ratio": 3.0, "axes_dims_rope": [8, 8, 8, 8], "rope_theta": 2000, "guidance_embeds": False,
}  # fmt: skip
FEW_LAYERS = LoRA(rank=4, targets=("to_q", "to_add_out", "linear_out", "attn.to_out"))


def test_live_bytes_are_those_counted_by_hand() -> None:
    with fake() as tracker:
        known = torch.empty(KIB, dtype=torch.uint8)
        tracker.know([known])
        with tracker:
            a = torch.empty(10 * KIB, dtype=torch.uint8)
            b = torch.empty(20 * KIB, dtype=torch.uint8)  # 30 here, the most
            view = b[: 5 * KIB].view(5, KIB)
            del a, b  # the view holds all of b: 20
            c = view + 1  # 25
            known.add_(1)
            del view
            d = c * 2  # 10
        assert tracker.peak() == 30 * KIB
        assert tracker.curve({}).other[-1] == 10 * KIB
        del c, d


def test_a_linear_layers_pass_is_what_autograd_keeps() -> None:
    """y = W x: x is there before; y, its square's mean and their gradients come; then ∂W."""
    with fake() as tracker:
        layer = nn.Linear(256, 512, bias=False)
        x = torch.empty(64, 256)
        curve = follow(Pass([layer], lambda: [layer(x)], [x]), tracker, {})
    y, w = 64 * 512 * 4, 512 * 256 * 4
    assert max(curve.gradients) == w and curve.gradients[-1] == w
    assert curve.other[-1] == 0
    # y, the mean's gradient, y¹, 2·y¹ and their product, which autograd's formula has at once.
    assert 5 * y <= max(curve.other) < 5 * y + 64


@pytest.mark.parametrize(
    ("share", "held", "most"), [(1.0, 0, 9), (0.0, 0, 8), (0.5, 0, 8), (1.0, 5, 13)]
)
def test_peak_adds_what_is_kept_of_gradients(share: float, held: int, most: int) -> None:
    assert Curve((0, 8, 4, 0), (0, 0, 5, 5)).peak(share, held) == most


@pytest.mark.parametrize("lora", [FEW_LAYERS, None], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_repeated_blocks_equal_real_ones(
    lora: LoRA | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 and 5 blocks, of which 3 each are run, against all 9."""
    setting = Setting(torch.bfloat16, torch.float32, lora, checkpointing=checkpointing)
    shape = Shape(64, 96, 8)
    calls = (
        Call(3, False, "frozen"), Call(1, True), Call(2, True), Call(1, False, "follower"),
    )  # fmt: skip
    few = velocity_curve(CONFIG, calls, shape, setting)
    for module in (activations, passes):
        monkeypatch.setattr(module, "FEW", 100)
    whole = velocity_curve(CONFIG, calls, shape, setting)
    assert max(few.other) == max(whole.other)
    assert few.peak() == whole.peak()
    assert few.other[-1] == whole.other[-1] == 0
    assert max(few.gradients) == max(whole.gradients)


def test_gradients_are_the_trained_parameters() -> None:
    setting = Setting(torch.bfloat16, torch.float32, None)
    with torch.device("meta"):
        network = build("transformer", CONFIG)
    curve = velocity_curve(CONFIG, (Call(1, True),), Shape(32, 32, 4), setting)
    count = sum(p.numel() for p in network.parameters())
    # The guidance-free embedder and all blocks take part; nothing is left without a gradient.
    assert curve.gradients[-1] == 4 * count


def test_checkpointing_and_quantised_weights_keep_less() -> None:
    def most(**changes: Any) -> int:
        base: dict[str, Any] = {"lora": FEW_LAYERS, **changes}
        setting = Setting(torch.bfloat16, torch.float32, **base)
        return max(velocity_curve(CONFIG, (Call(2, True),), Shape(128, 128, 8), setting).other)

    assert most(checkpointing=True) < 0.4 * most()
    # Packed weights are dequantised for a moment, and are not kept for the backward pass.
    assert most(quantise="nf4") < 1.1 * most()


def test_norms_are_lifted_as_cudas_autocast_does() -> None:
    def dtypes(cuda: bool) -> set[torch.dtype]:
        with torch.device("meta"):
            norms = nn.ModuleList([nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)])
        norms.to(torch.bfloat16)
        with fake(cuda), torch.autocast("cpu", torch.bfloat16):
            x = torch.empty(2, 8, dtype=torch.bfloat16)
            return {norm(x).dtype for norm in emptied(norms, cuda)}  # pyright: ignore

    assert dtypes(True) == {torch.float32} and dtypes(False) == {torch.bfloat16}


def test_flash_attentions_sum_of_dq_counts_on_cuda() -> None:
    def most(cuda: bool) -> int:
        with fake(cuda) as tracker:
            q = torch.empty(1, 2, 128, 32, dtype=torch.bfloat16, requires_grad=True)
            run = nn.functional.scaled_dot_product_attention
            return max(follow(Pass([], lambda: [run(q, q, q)], [q]), tracker, {}).other)

    # Kept besides: dq, dk and dv in bf16, and what is smaller.
    assert most(True) >= 4 * 2 * 128 * 32 + 3 * 2 * 2 * 128 * 32
    assert most(True) > most(False)


def test_an_emptied_module_keeps_shapes_dtypes_and_what_is_trained() -> None:
    with torch.device("meta"):
        module = nn.BatchNorm1d(3)
    module.weight.requires_grad_(False)
    with fake():
        emptied(module)
        assert module.bias.shape == (3,) and module.bias.requires_grad
        assert not module.weight.requires_grad and module.num_batches_tracked.dtype == torch.int64
        assert isinstance(module(torch.empty(4, 3)), Tensor)


def test_a_tracker_counts_nothing_outside() -> None:
    with fake() as tracker:
        before = torch.empty(KIB)
        with tracker:
            inside = torch.empty(KIB)
        after = torch.empty(KIB)
        assert isinstance(tracker, Tracker) and tracker.peak() == 4 * KIB
        del before, inside, after
