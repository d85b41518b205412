"""Flow-map distillation: consistency models and MeanFlow (Geng et al., arXiv 2505.13447), of a
guided teacher.

    x_t = (1 − t)·x0 + t·ε,  v = v_u + g·(v_c − v_u) of the teacher at (x_t, t)
    X_r = x_t − (t − r)·u(x_t, r, t)                     the student's u is the flow map from t to r
    d/dt [(t − r)·u] = v  ⇒  u = v − (t − r)·du/dt,  du/dt = ∂_t u + v·∂_x u       (MeanFlow, eq. 6)
    loss = D(u − sg[v − κ·(t − r)·du/dt])

du/dt is forward-mode through the network, or a difference over the last part h of the interval, for
which the same law holds at any h, with x' = x_t − h·v̄ and v̄ the teacher's mean velocity (midpoint):

    u = v̄ − (t − h − r)·(u − u')/h,  u' = u(x', r, t − h)

That is discrete consistency distillation of step h, at another weight. κ rises from 0 to 1 (sCM's
warm-up, arXiv 2410.11081).

Where r lies makes the method: at 0, a consistency model; at the next σ of the sampler's grid (PCM,
arXiv 2405.18407), a student for the plain Euler sampler on that grid; anywhere below t, MeanFlow,
whose network is told t − r. Left out: TrigFlow, learned weightings, the adversarial term and the
averaged target network of these papers (the target is the student itself, without a gradient), and
their changes to the time embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill._common import check_scale
from flux2.errors import BatchError, InputError, check_positive
from flux2.flow import TimeDensity, Uniform, exact, expand
from flux2.losses import Noised, weighted
from flux2.rng import Rng
from flux2.samplers import guided
from flux2.types import Batch, Memoryless, Metrics, RoleSpec, Turn, Velocity

Map = Callable[[Tensor, Tensor], Tensor]
"""u at (x: b n c, t: b), with r and the condition held fixed."""
DERIVATIVES = ("jvp", "differences")


class Interval(Protocol):
    """The law of (t, r).

    Attributes:
        told: whether the student is told t − r (cond.guidance); else r must be a function of t.
    """

    told: ClassVar[bool]

    def __call__(self, density: TimeDensity, u: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """u: b 3, uniform on [0, 1) → t in (0, 1] and r in [0, t], b each."""
        ...


class Distance(Protocol):
    """D, of which gradients are taken."""

    def __call__(self, delta: Tensor) -> Tensor:
        """delta: b n c → b."""
        ...


@contextmanager
def _forward_mode() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch writes its own rules with what it has deprecated, when first asked for them.
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            yield


@torch.no_grad()
def jvp(u: Map, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """du/dt = ∂_t u + v·∂_x u, exact, in one forward-mode pass; x, v: b n c, t: b → b n c.

    Attention runs in its plain form, which alone has a forward-mode derivative.

    Raises:
        InputError: something in the network has none.
    """
    wrong, instead = "method.derivative=jvp: ", "choose method.derivative=differences"
    try:
        with _forward_mode():
            out = u(forward_ad.make_dual(x, v), forward_ad.make_dual(t, torch.ones_like(t)))
            tangent = forward_ad.unpack_dual(out).tangent
    except RuntimeError as error:  # NotImplementedError is one
        why = str(error).strip().split("\n")[0]
        if not any(word in why for word in ("forward AD", "jvp", "viable backend")):
            raise
        raise InputError(
            f"{wrong}quantised weights, engine=zero3 and attention other than native have no "
            f"forward-mode derivative ({why}): {instead}"
        ) from error
    if tangent is None:
        raise InputError(f"{wrong}the derivative is lost on its way through the network: {instead}")
    return tangent


@torch.no_grad()
def difference(
    u: Map, here: Tensor, teacher: Map, x: Tensor, t: Tensor, v: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """((u − u')/h, v̄) over the last h of the interval, b n c each; here: u at (x, t); h: b.

    It looks back alone: above t there may be another phase, or t > 1.
    """
    mean = teacher(x - expand(h / 2, x) * v, t - h / 2)
    before = u(x - expand(h, x) * mean, t - h)
    return (here - before) / expand(h, x), mean


@dataclass(frozen=True)
class FlowMapDistillation(Memoryless):
    """Method of stage=distill.

    Attributes:
        interval: the law of (t, r), with the density p(t). distance: D.
        guidance: g, of the teacher; 1 is none.
        derivative: jvp, exact; or differences, over `share` of the interval t − r. In the limit of
            a small share they agree, but rounding grows as 1/share.
        warmup: steps in which κ rises from 0 to 1; at 0 the student learns the guided velocity.
        own: a sampler (flux2.generate.Sampler): x0 is what the student itself draws at this step,
            and no images are needed; None: the data's.
        ema: decay of an average of the student's weights; 0: none.
        micro: samples a micro-batch.
    """

    interval: Interval
    distance: Distance
    guidance: float = 3.0
    density: TimeDensity = field(default_factory=Uniform)
    derivative: str = "differences"
    share: float = 0.25
    warmup: int = 0
    own: Callable[[Velocity, Batch, int], Tensor] | None = None
    ema: float = 0.0
    micro: int = 32
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = "distilled"

    def __post_init__(self) -> None:
        check_scale(self.guidance)
        check_positive({"micro": self.micro})
        if self.derivative not in DERIVATIVES:
            raise InputError(
                f"method.derivative is {self.derivative!r}: choose from {', '.join(DERIVATIVES)}"
            )
        if not 0 < self.share < 1:
            raise InputError(f"method.share is {self.share}: give a number between 0 and 1")
        if self.warmup < 0:
            raise InputError(f"method.warmup is {self.warmup}: it must be at least 0 (0: none)")
        if not 0 <= self.ema < 1:
            raise InputError(f"method.ema is {self.ema}: give 0 (none) to below 1")

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The student starts as the teacher without guidance, where it is told t − r as well."""
        told = True if self.interval.told else None
        average = RoleSpec(follows="student", decay=self.ema, embeds=told)
        return {
            "student": RoleSpec(trainable=True, embeds=told, tangents=self.derivative == "jvp"),
            "teacher": RoleSpec(),
            **({"ema": average} if self.ema else {}),
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("student", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update, on the batch or on what the student draws for its prompts."""
        if self.own is not None:
            seed = int(rng.shared("own").integers(1 << 62))
            batch = replace(batch, x0=self.own(roles["student"], batch, seed))
        elif batch.x0 is None:
            raise BatchError(
                "the data has prompts alone: set data.collate.latents=true, or method.own to "
                "'${sampler}' for the student's own samples"
            )
        yield batch.split(self.micro)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch; batch.cond.null is the empty prompt."""
        cond, student = batch.cond, roles["student"]
        assert cond is not None and batch.x0 is not None
        uniforms = rng.uniform("time", batch.ids, (3,))
        drawn, ends = self.interval(self.density, uniforms, batch.shape[0])
        eps = rng("noise", batch.ids, batch.shape).to(batch.x0.device)
        noised = Noised(batch.x0, eps, drawn.to(batch.x0.device))
        x, t, r = exact(noised.x, noised.t, ends.to(batch.x0.device))

        def u(x: Tensor, t: Tensor) -> Tensor:
            return student(x, t, replace(cond, guidance=t - r) if self.interval.told else cond)

        @torch.no_grad()
        def teacher(x: Tensor, t: Tensor) -> Tensor:
            return guided(roles["teacher"], self.guidance)(x, t, cond)

        here, v = u(x, t), teacher(x, t)
        kappa = 1.0 if not self.warmup else min(1.0, rng.step / self.warmup)
        if self.derivative == "jvp":
            change = expand(t - r, x) * jvp(u, x, t, v)
        else:
            # Where r = t there is nothing to look back on, and what is found counts nothing.
            h = (self.share * (t - r)).clamp(min=1e-6)
            rate, v = difference(u, here.detach(), teacher, x, t, v, h)
            change = expand((t - r - h).clamp(min=0), x) * rate
        delta = here - (v - kappa * change)
        term = self.distance(delta)
        error = delta.detach().square().mean((1, 2))
        return weighted(batch, term, {
            "error": error.mean(),
            "change": change.square().mean(),
            "speed": v.square().mean(),
        })  # fmt: skip
