"""Flow-DPO (arXiv 2501.13918): Diffusion-DPO (arXiv 2311.12908) with the flow's own loss.

    t ~ p(t),  ε ~ N(0, I)      one of each a pair: winner, loser, policy and reference share them
    ℓ(x0) = ‖v(x_t, t, c) − (ε − x0)‖² / dim,   Δ = ℓ_θ − ℓ_ref
    m = −β/2 · (Δ_winner − Δ_loser)             the implicit reward's margin
    L = −log σ(m − λ·β/2·max(0, Δ_winner))      λ = hold; 0 is DPO, above it DPO-positive

ℓ is averaged over the latent's dimensions, so β does not depend on the resolution; a text that sums
ℓ means our β / dim by its β. −β/2·Δ stands for β' · log(p_θ/p_ref)(x0), and ε cancels from m where
the two velocities differ by a shift. The reference is what the run started from: the previous
stage, also in rounds.

The margin only says that the winner's loss rises less than the loser's. Both may rise, and samples
then fall apart while margin and accuracy look well: `winner_rise` is the winner's own loss beside
the reference's, and above `alarm` it is told once. What holds it down is λ (DPO-positive,
arXiv 2402.13228): a pair then counts as satisfied only where the winner has not become less likely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flux2.distributed import gather, is_main
from flux2.errors import BatchError, InputError, check_positive
from flux2.flow import LogitNormal, TimeDensity
from flux2.losses import Noised, weighted
from flux2.rng import Rng
from flux2.types import Batch, Metrics, RoleSpec, Turn, Velocity, cat_conditions


@dataclass
class DPO:
    """Method of stage=dpo.

    Attributes:
        density: p(t).
        beta: how dear it is to leave the reference: the larger, the sooner a pair is satisfied.
        hold: λ.
        smoothing: share of the pairs that may be labelled the wrong way round (conservative DPO).
        micro: pairs a micro-batch.
        alarm: the winner's loss over the reference's, less 1, above which a warning is printed.
    """

    density: TimeDensity = field(default_factory=LogitNormal)
    beta: float = 2000.0
    hold: float = 0.0
    smoothing: float = 0.0
    micro: int = 16
    alarm: float = 0.1
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_positive({"beta": self.beta, "micro": self.micro, "alarm": self.alarm})
        if not self.hold >= 0:
            raise InputError(f"method.hold is {self.hold}: it must be at least 0")
        if not 0 <= self.smoothing < 0.5:
            raise InputError(f"method.smoothing is {self.smoothing}: give 0 to below 0.5")
        self._losses: list[Tensor] = []
        self._alarmed = False

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and what it started from."""
        return {"policy": RoleSpec(trainable=True), "reference": RoleSpec()}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("policy", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update on the pairs. Raises InputError where the data are none."""
        if batch.x0 is None or "loser" not in batch.extra:
            raise BatchError(
                "stage=dpo learns from pairs: give data=pairs data.dataset.path=<folder>"
            )
        self._losses = []
        yield batch.split(self.micro)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch's pairs."""
        winner, cond = Noised.draw(batch, self.density, rng), batch.cond
        assert cond is not None and batch.weight is not None
        loser = replace(winner, x0=batch.extra["loser"].to(winner.x0))
        x, t = torch.cat([winner.x, loser.x]), torch.cat([winner.t, loser.t])  # (2 b) n c, (2 b)
        both = cat_conditions([cond, cond])

        def matching(role: Velocity) -> Tensor:  # (2 b)
            v = role(x, t, both).chunk(2)
            return torch.cat([winner.matching(v[0]), loser.matching(v[1])])

        policy = matching(roles["policy"])
        with torch.no_grad():
            reference = matching(roles["reference"])
        won, lost = (policy - reference).chunk(2)  # b each
        margin = -self.beta / 2 * (won - lost)
        held = margin - self.hold * self.beta / 2 * won.clamp(min=0)
        term = -(1 - self.smoothing) * logsigmoid(held) - self.smoothing * logsigmoid(-held)
        with torch.no_grad():
            counts = batch.weight.to(term.device) > 0
            rows = torch.stack([policy.chunk(2)[0], reference.chunk(2)[0]], 1)
            self._losses.append(rows[counts].detach())
            metrics: dict[str, float | Tensor] = {
                "margin": margin[counts].mean(),
                "accuracy": (margin[counts] > 0).float().mean(),
                "winner_gap": won[counts].mean(),
                "loser_gap": lost[counts].mean(),
            }
        return weighted(batch, term, metrics)

    def metrics(self) -> Metrics:
        """The winners' own loss beside the reference's, over the step's pairs of all ranks; warns
        where it has risen too far."""
        rows = gather(torch.cat(self._losses)) if self._losses else torch.zeros(0, 2)
        self._losses = []
        if not len(rows):
            return {}
        mine, reference = rows.double().mean(0).tolist()
        rise = mine / reference - 1
        if rise > self.alarm and not self._alarmed:
            self._alarmed = True
            if is_main():
                print(
                    f"warning: the winners' own loss has risen by {rise:.1%} over the reference's: "
                    "samples may fall apart while the margin grows; lower the learning rate, raise "
                    "method.beta, or stop earlier",
                    flush=True,
                )
        return {"winner_rise": rise}

    def state_dict(self) -> dict[str, Any]:
        """Whether the warning was given."""
        return {"alarmed": self._alarmed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        self._alarmed = bool(state["alarmed"])
