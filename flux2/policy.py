"""A policy without a network: a Gaussian mixture over x0, seen once, that answers all along a path.

A network that sees x_s once says of each token q(x0 | x_s) = Σ_k π_k·N(μ_k, τ²·I) (GMFlow, arXiv
2504.05304). At any later state (x_t, t), t < s, of the path that began there (π-Flow, arXiv
2510.14974):

    q(x0 | x_t, x_s) ∝ q(x0 | x_s) · p(x_t | x0) / p(x_s | x0),   p(x_t | x0) = N((1 − t)·x0, t²·I)
    log of the ratio = ν·x0 − ½·ζ·‖x0‖² + const
    ζ = ((1 − t)/t)² − ((1 − s)/s)²,   ν = (1 − t)·x_t/t² − (1 − s)·x_s/s²

so each component stays a Gaussian: with d = 1 + τ²·ζ its mean is (μ_k + τ²·ν)/d, its variance τ²/d,
and its log-weight grows by (ν·μ_k − ½·ζ·‖μ_k‖²)/d, what all components share left out. The policy's
velocity is (x_t − E[x0])/t. Where x0 given x_s is such a mixture, it is the flow's own velocity at
every t. Tokens are independent of each other given x_s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flux2.errors import InputError
from flux2.flow import exact, expand
from flux2.rng import keyed
from flux2.types import Condition, PolicyShape

FILE, WEIGHTS = "policy.json", "policy_head.safetensors"
"""Of an exported student, beside its model_index.json."""
PREFIX = "head."
"""Of the head's tensors among a role's."""
SPREAD = 0.1
"""Standard deviation of a fresh head's components round their mean: equal ones would stay equal."""


@dataclass(frozen=True, eq=False)
class TokenMixture:
    """Σ_k softmax(logits)_k · N(means_k, e^{2·log_std}·I) over each token's x0, as told at (x, s).

    Attributes:
        x: b n c, what the network saw. s: b, when.
        logits: b n k. means: b n k c. log_std: b n 1, of x0; one for all components of a token.
    """

    x: Tensor
    s: Tensor
    logits: Tensor
    means: Tensor
    log_std: Tensor

    def posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At a later state x: b n c, t: b in (0, s] → logits b n k, means b n k c, var b n 1."""
        x, t, start, s, logits, means, log_std = exact(
            x, t, self.x, self.s, self.logits, self.means, self.log_std
        )
        now, then = expand(t, x), expand(s, x)
        a, b = (1 - now) / now, (1 - then) / then
        zeta = a.square() - b.square()  # b 1 1
        nu = a / now * x - b / then * start  # b n c
        var = (2 * log_std).exp()  # b n 1
        d = 1 + var * zeta
        gain = (rearrange(nu, "b n c -> b n 1 c") * means).sum(-1)
        gain = gain - 0.5 * zeta * means.square().sum(-1)  # b n k
        moved = means + rearrange(var * nu, "b n c -> b n 1 c")
        return logits + gain / d, moved / d[..., None], var / d

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t = x]: b n c."""
        logits, means, _ = self.posterior(x, t)
        return torch.einsum("bnk,bnkc->bnc", logits.softmax(-1), means)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(x − E[x0])/t: b n c."""
        return (x - self.x0(x, t)) / expand(t, x)

    def detach(self) -> TokenMixture:
        """The same, without gradients."""
        return TokenMixture(*(v.detach() for v in vars(self).values()))

    def without(self, dropped: Tensor) -> TokenMixture:
        """Without some components; dropped: b k bool. A sample that would lose all keeps all."""
        dropped = dropped & ~dropped.all(1, keepdim=True)
        mask = rearrange(dropped, "b k -> b 1 k").to(self.logits.device)
        return replace(self, logits=self.logits.masked_fill(mask, -torch.inf))


class Head(nn.Module):
    """From a transformer's last hidden states to the mixture, beside its velocity v.

        logits, δ, r = linear(h),   μ_k = x_s − s·(v + δ_k),   τ = s·e^r

    A fresh one has logits 0, Σ_k δ_k = 0 and r = 0: its mean velocity at (x_s, s) is v, and its
    spread s, the noise's own.

    Args:
        width: of the hidden states. channels: c. shape: of the policy. seed: of the δ.
    """

    def __init__(self, width: int, channels: int, shape: PolicyShape, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.channels = shape, channels
        k = shape.components
        offsets = torch.from_numpy(keyed(seed, "policy head").standard_normal((k, channels)))
        offsets = SPREAD * (offsets - offsets.mean(0))
        parts = (torch.zeros(k), offsets.flatten(), torch.zeros(1))
        self.weight = nn.Parameter(torch.zeros(k * (channels + 1) + 1, width))
        self.bias = nn.Parameter(torch.cat([p.float() for p in parts]))

    def forward(self, h: Tensor, v: Tensor, x: Tensor, s: Tensor) -> TokenMixture:
        """h: b n w, v and x: b n c, s: b → the policy from there on, in fp32."""
        k, c = self.shape.components, self.channels
        out = nn.functional.linear(h.float(), self.weight.float(), self.bias.float())
        logits, offsets, rate = out.split([k, k * c, 1], -1)
        u = v[:, :, None] + rearrange(offsets, "b n (k c) -> b n k c", c=c)
        wide = expand(s, x)
        means = x[:, :, None] - wide[..., None] * u
        return TokenMixture(x, s, logits, means, rate + wide.log())

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], shape: PolicyShape) -> Head:
        """With trained weights ("weight", "bias"). Raises InputError where they do not fit."""
        rows, width = weights["weight"].shape
        channels, rest = divmod(rows - 1 - shape.components, shape.components)
        if rest or channels < 1 or weights["bias"].shape != (rows,):
            raise InputError(
                f"a policy head of {rows} outputs is none of {shape.components} components: its "
                "files have been changed since"
            )
        head = cls(width, channels, shape)
        head.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
        return head.requires_grad_(False)


def parted(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A role's weights by path → the transformer's, and the head's by their names in it."""
    body = {k: v for k, v in weights.items() if not k.startswith(PREFIX)}
    head = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    return body, head


class PolicyRole:
    """A velocity with a head: `flux2.types.Policy`. Called as a velocity, it is its mean's.

    body: a `flux2.roles.VelocityRole` on the transformer whose last hidden states the head reads.
    """

    def __init__(self, body: Any, head: Head) -> None:
        self.body, self.head = body, head

    @property
    def shape(self) -> PolicyShape:
        """See `flux2.types.Policy`."""
        return self.head.shape

    @property
    def backbone(self) -> Any:
        """The transformer."""
        return self.body.backbone

    @property
    def adapter(self) -> str | None:
        """Its adapter, None without one."""
        return self.body.adapter

    @property
    def root(self) -> Any:
        """What a call goes through."""
        return self.body.root

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> TokenMixture:
        """See `flux2.types.Policy`."""
        kept: list[Tensor] = []
        handle = self.backbone.norm_out.register_forward_hook(lambda *call: kept.append(call[-1]))
        try:
            v = self.body(x, t, cond)
        finally:
            handle.remove()
        return self.head(kept[0][:, : x.shape[1]], v, x.float(), t.float())

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The velocity at (x, t): b n c, fp32."""
        return self.policy(x, t, cond).velocity(x, t)


def describe(shape: PolicyShape, **facts: Any) -> dict[str, Any]:
    """What policy.json of an exported student says."""
    return {"policy": "gaussian mixture over x0", **asdict(shape), "weights": WEIGHTS, **facts}


def read(folder: Path, device: torch.device) -> Head | None:
    """The head of an exported student; None where the folder is of no policy.

    Raises:
        InputError: a policy.json that is broken, or without its weights.
    """
    from safetensors.torch import load_file

    if not (folder / FILE).is_file():
        return None
    try:
        about = json.loads((folder / FILE).read_text())
        shape = PolicyShape(*(int(about[k]) for k in vars(PolicyShape())))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is no whole policy ({error}): export it again") from None
    return Head.of(weights, shape).to(device)
