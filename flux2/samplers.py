"""Samplers: `sample_x(velocity, x, cond, grid, …)`, each its algorithm box.

A velocity is any callable of (x, t, cond): a role, an analytic model, a guided pair. Samplers run
in fp32 (fp64 if x is) and hand over t = σ itself in that dtype, b. Whether gradients are recorded
is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flux2.errors import InputError
from flux2.flow import Kernel, Transition, exact
from flux2.schedule import Grid
from flux2.types import Condition, Law, Policy, Velocity, cat_conditions

Progress = Callable[[int], None]
"""Called after each step with the number of steps done."""


def guided(velocity: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance: v_u + scale·(v_c − v_u), with v_u from cond.null.

    One forward on both halves where their shapes agree, two otherwise; none is added at scale 1.

    Raises (when called):
        InputError: scale is not 1 and cond.null is missing.
    """
    if scale == 1:
        return velocity

    def call(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.null is None:
            raise InputError(
                f"guidance {scale:g} needs the empty prompt's condition (cond.null): encode it, or "
                "set guidance to 1"
            )
        v_c, v_u = branches(velocity, x, t, cond)
        return v_u + scale * (v_c - v_u)

    return call


def branches(
    velocity: Velocity, x: Tensor, t: Tensor, cond: Condition
) -> tuple[Tensor, Tensor]:
    """The velocities with the prompt and with the empty one, cond.null: b n c each. One forward on
    both where their shapes agree, two otherwise."""
    assert cond.null is not None
    pair = [replace(c, null=None) for c in (cond, cond.null)]
    if _shapes(pair[0]) == _shapes(pair[1]):
        v = velocity(torch.cat([x, x]), torch.cat([t, t]), cat_conditions(pair))
        v_c, v_u = v.chunk(2)
        return v_c, v_u
    v_c, v_u = (velocity(x, t, c) for c in pair)
    return v_c, v_u


def _shapes(cond: Condition) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in vars(cond).items() if isinstance(x, Tensor)}


def _at(velocity: Velocity, x: Tensor, cond: Condition, sigma: float) -> Tensor:
    return velocity(x, x.new_full(x.shape[:1], sigma), cond)


def sample_euler(
    velocity: Velocity,
    x: Tensor,
    cond: Condition,
    grid: Grid,
    progress: Progress | None = None,
) -> Tensor:
    """The flow's ODE by Euler steps: order 1, one forward a step. x: b n c at sigmas[0]."""
    (x,) = exact(x)
    for i in range(grid.steps):
        sigma, after = grid.sigmas[i : i + 2]
        x = x + (after - sigma) * _at(velocity, x, cond, sigma)
        if progress is not None:
            progress(i + 1)
    return x


def sample_heun(
    velocity: Velocity,
    x: Tensor,
    cond: Condition,
    grid: Grid,
    progress: Progress | None = None,
) -> Tensor:
    """The same by Heun's method (EDM, arXiv 2206.00364, alg. 1): order 2, 2·steps − 1 forwards.

    The last step is Euler's, so that no network is asked for its velocity at σ = 0.
    """
    (x,) = exact(x)
    for i in range(grid.steps):
        sigma, after = grid.sigmas[i : i + 2]
        v = _at(velocity, x, cond, sigma)
        if after > 0:
            v = (v + _at(velocity, x + (after - sigma) * v, cond, after)) / 2
        x = x + (after - sigma) * v
        if progress is not None:
            progress(i + 1)
    return x


def sample_renoise(
    velocity: Velocity,
    x: Tensor,
    cond: Condition,
    grid: Grid,
    noise: Callable[[int], Tensor],
    progress: Progress | None = None,
) -> Tensor:
    """The sampler of consistency models (arXiv 2303.01469, alg. 1) and of DMD2: each step's x̂0 is
    noised anew, x' = (1 − σ')·x̂0 + σ'·ε, as diffusers' FlowMatchEulerDiscreteScheduler does with
    stochastic_sampling.

    noise: number of the step → ε of its end, b n c, standard normal; not asked for the last one.
    """
    (x,) = exact(x)
    for i in range(grid.steps):
        sigma, after = grid.sigmas[i : i + 2]
        x = x - sigma * _at(velocity, x, cond, sigma)
        if after > 0:
            x = (1 - after) * x + after * noise(i).to(x)
        if progress is not None:
            progress(i + 1)
    return x


def sample_flowmap(
    velocity: Velocity,
    x: Tensor,
    cond: Condition,
    grid: Grid,
    progress: Progress | None = None,
) -> Tensor:
    """Jumps of a flow map that knows its interval (MeanFlow, arXiv 2505.13447):
    x' = x − (σ − σ')·u(x, σ', σ), told as cond.guidance = σ − σ'. x: b n c at sigmas[0]."""
    (x,) = exact(x)
    for i in range(grid.steps):
        sigma, after = grid.sigmas[i : i + 2]
        told = replace(cond, guidance=x.new_full(x.shape[:1], sigma - after))
        x = x + (after - sigma) * _at(velocity, x, told, sigma)
        if progress is not None:
            progress(i + 1)
    return x


def substates(
    law: Law, x: Tensor, sigma: float, after: float, substeps: int
) -> Iterator[tuple[float, Tensor]]:
    """(t, x_t) of a policy's path from (sigma, x) to `after` by equal Euler steps, both ends told;
    the network is not called. x: b n c."""
    (x,) = exact(x)
    t = sigma
    for m in range(1, substeps + 1):
        yield t, x
        # The last one lands on `after` itself, which rounding would miss.
        end = after if m == substeps else sigma + (after - sigma) * m / substeps
        x = x + (end - t) * law.velocity(x, x.new_full(x.shape[:1], t))
        t = end
    yield t, x


def sample_policy(
    policy: Policy,
    x: Tensor,
    cond: Condition,
    grid: Grid,
    substeps: int,
    progress: Progress | None = None,
) -> Tensor:
    """The ODE of a policy (π-Flow, arXiv 2510.14974): one forward at each sigma of the grid, and
    from there `substeps` Euler steps to the next without the network. x: b n c at sigmas[0]."""
    (x,) = exact(x)
    for i in range(grid.steps):
        sigma, after = grid.sigmas[i : i + 2]
        law = policy.policy(x, x.new_full(x.shape[:1], sigma), cond)
        for _, state in substates(law, x, sigma, after, substeps):
            x = state
        if progress is not None:
            progress(i + 1)
    return x


@dataclass(frozen=True, eq=False)
class Step:
    """A stochastic step as it was taken: all that a policy gradient needs.

    Attributes:
        i: from sigmas[i] to sigmas[i + 1].
        x, x_next: b n c, exactly as stored; replaying x reproduces log_prob.
        mean: b n c, of the law that x_next was drawn from.
        log_prob: b, averaged over the latent dimensions.
    """

    i: int
    x: Tensor
    x_next: Tensor
    mean: Tensor
    log_prob: Tensor


def replay(
    velocity: Velocity, step_x: Tensor, cond: Condition, grid: Grid, kernel: Kernel, i: int
) -> Transition:
    """The law of step i from a recorded x: under new weights, but by the rollout's own code."""
    (x,) = exact(step_x)
    return kernel(x, _at(velocity, x, cond, grid.sigmas[i]), grid, i)


def sample_sde(
    velocity: Velocity,
    x: Tensor,
    cond: Condition,
    grid: Grid,
    kernel: Kernel,
    noisy: Collection[int],
    noise: Callable[[int], Tensor],
    storage: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, list[Step]]:
    """Steps in `noisy` are drawn from the kernel and recorded; the others are Euler's.

    Args:
        x: b n c at sigmas[0].
        noisy: step indices; not the last step.
        noise: step index → b n c, standard normal.
        storage: the dtype of recorded latents, None for the working dtype. x and x_next are rounded
            through it before they are used, so that log_prob belongs to what is stored.

    Raises:
        InputError: an index in `noisy` that is no step, or the last one.
    """
    if wrong := sorted(i for i in noisy if not 0 <= i < grid.steps - 1):
        raise InputError(
            f"stochastic steps {wrong} of {grid.steps}: choose from 0 … {grid.steps - 2}, as the "
            "last step's noise would stay in the image"
        )
    (x,) = exact(x)
    work, steps = x.dtype, []
    for i in range(grid.steps):
        if i in noisy:
            x = x.to(storage or work)
            step = replay(velocity, x, cond, grid, kernel, i)
            x_next = step.sample(noise(i)).to(storage or work)
            steps.append(Step(i, x, x_next, step.mean, step.log_prob(x_next)))
            x = x_next.to(work)
        else:
            sigma, after = grid.sigmas[i : i + 2]
            x = x + (after - sigma) * _at(velocity, x, cond, sigma)
        if progress is not None:
            progress(i + 1)
    return x, steps
