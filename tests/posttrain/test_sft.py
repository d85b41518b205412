"""Flow matching on Gaussian data, whose mean, loss and gradients are known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from flux2.analytic import Gaussian, GaussianPolicy, Mixture, toy_condition
from flux2.errors import InputError
from flux2.flow import InversePower, LogitNormal, MinSNR, TimeDensity, Uniform, guide, unguide
from flux2.model import Flux2, load_model
from flux2.rng import Rng
from flux2.roles import Roles
from flux2.text import text_ids
from flux2.types import Batch, Condition, RoleSpec
from posttrain.guided import Guided
from posttrain.sft import FlowMatching, Plain

N, C, STD = 4, 3, 0.6
MEAN = torch.randn(N, C, generator=torch.Generator().manual_seed(0))


def data(count: int, seed: int = 1) -> Batch:
    """Samples of N(MEAN, STD²)."""
    ids, g = torch.arange(count), torch.Generator().manual_seed(seed)
    return Batch(
        ids, ("p",) * count, toy_condition(count, N), ids, ({},) * count, (2, 2), C,
        x0=MEAN + STD * torch.randn(count, N, C, generator=g),
        weight=torch.full((count,), 1 / count),
    )  # fmt: skip


def irreducible(density: TimeDensity) -> float:
    """E_t Var(ε − x0 | x_t) = E_t STD²/C_t, by midpoint quadrature over the times' uniform.

    (x0, ε) → (x_t, ε − x0) has determinant 1, so Var(ε − x0 | x_t)·Var(x_t) = STD²·1.
    """
    u = (torch.arange(200_000) + 0.5) / 200_000
    t = density(u).double()
    return float((STD**2 / ((1 - t) ** 2 * STD**2 + t**2)).mean())


@pytest.mark.parametrize("density", [LogitNormal(), LogitNormal(0.3, 0.8, 3.0), Uniform()])
def test_the_loss_at_the_optimum_is_the_irreducible_one(density):
    method, batch = FlowMatching(density), data(4096)
    loss, metrics = method.loss({"model": Gaussian(MEAN, STD)}, batch, Rng(0, 0))
    want = irreducible(density)
    assert float(loss) == pytest.approx(want, rel=0.02)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    worse, _ = method.loss({"model": Gaussian(MEAN + 0.3, STD)}, batch, Rng(0, 0))
    assert float(worse) > 1.05 * want


def test_training_finds_the_mean_and_the_spread_of_the_data():
    """The whole loop: 256 samples, whose own mean and spread are the optimum."""
    batch, method = data(256), FlowMatching(micro=256)
    model = GaussianPolicy(torch.zeros(N, C), 1.0, train_std=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.15)
    steps = 120
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.15 * (1 - step / steps)
        for update in method.collect({"model": model}, batch, Rng(0, step)):
            optimizer.zero_grad()
            for micro in update:
                method.loss({"model": model}, micro, Rng(0, step))[0].backward()
            optimizer.step()
    assert batch.x0 is not None
    torch.testing.assert_close(model.mean.detach(), batch.x0.mean(0), atol=0.05, rtol=0)
    spread = float((batch.x0 - batch.x0.mean(0)).square().mean().sqrt())
    assert float(model.log_std.detach().exp()) == pytest.approx(spread, rel=0.05)


def test_the_loss_is_the_weighted_squared_error_at_the_keyed_draws():
    """With a velocity of 0 it is Σ w·mean (ε − x0)²."""
    batch, rng = data(6), Rng(3, 4)
    weight = torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    assert batch.x0 is not None
    eps = rng("noise", batch.ids, (N, C))
    want = ((eps - batch.x0) ** 2).mean((1, 2))
    zero = {"model": lambda x, t, cond: torch.zeros_like(x)}
    loss, metrics = FlowMatching().loss(zero, replace(batch, weight=weight), rng)
    torch.testing.assert_close(loss, want[:2].mean())
    torch.testing.assert_close(metrics["loss"], want.mean())


def test_the_model_sees_the_interpolant():
    seen: dict[str, Tensor] = {}

    def model(x: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.update(x=x, t=t)
        return x

    batch, rng = data(5), Rng(3, 4)
    FlowMatching().loss({"model": model}, batch, rng)
    assert batch.x0 is not None
    t = seen["t"][:, None, None]
    eps = rng("noise", batch.ids, (N, C))
    torch.testing.assert_close(seen["x"], (1 - t) * batch.x0 + t * eps)
    assert ((seen["t"] > 0) & (seen["t"] < 1)).all() and len(set(seen["t"].tolist())) == 5


def test_loss_and_gradient_do_not_depend_on_the_micro_batches():
    found = []
    for micro in (8, 12, 32):
        method, model = FlowMatching(micro=micro), GaussianPolicy(MEAN + 1, STD)
        (update,) = method.collect({"model": model}, data(32), Rng(0, 7))
        assert len(update[0]) == micro
        losses = [method.loss({"model": model}, m, Rng(0, 7))[0] for m in update]
        total = torch.stack(losses).sum()
        total.backward()
        found.append((total.detach(), model.mean.grad))
    assert found[0][1].abs().max() > 1e-2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-4)


def test_edits_have_a_loss_of_their_own_name():
    batch = data(2)
    assert batch.cond is not None
    edit = replace(batch, cond=replace(batch.cond, ref=torch.zeros(2, N, C)))
    _, metrics = FlowMatching().loss({"model": Gaussian(MEAN, STD)}, edit, Rng(0, 0))
    assert set(metrics) == {"loss_edit"}


def test_roles():
    assert FlowMatching().roles == {"model": RoleSpec(trainable=True)}
    assert FlowMatching(ema=0.99).roles["ema"] == RoleSpec(follows="model", decay=0.99)
    assert [t.role for t in FlowMatching(ema=0.99).turns] == ["model"]


@pytest.mark.parametrize("wrong", [{"micro": 0}, {"ema": 1.0}, {"ema": -0.5}, {"ema": math.nan}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match=r"method\."):
        FlowMatching(**wrong)


# -- weightings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [MinSNR(5.0), InversePower(2.0, 0.1)])
def test_the_loss_is_the_error_times_the_weight_of_its_time(weighting):
    batch, rng, model = data(6), Rng(3, 4), Gaussian(MEAN + 0.5, STD)
    method = FlowMatching(Uniform(), weighting=weighting)
    assert batch.x0 is not None
    t, eps = Uniform()(rng.uniform("time", batch.ids)), rng("noise", batch.ids, (N, C))
    x = (1 - t)[:, None, None] * batch.x0 + t[:, None, None] * eps
    error = (model(x, t) - eps + batch.x0).square().mean((1, 2))
    loss, metrics = method.loss({"model": model}, batch, rng)
    torch.testing.assert_close(loss, (weighting(t) * error).mean())
    torch.testing.assert_close(metrics["loss"], error.mean())  # what runs are compared by
    torch.testing.assert_close(metrics["weighted"], loss)


@pytest.mark.parametrize("weighting", [MinSNR(), InversePower()])
def test_a_weighting_does_not_move_the_optimum(weighting):
    """At every t the best velocity stays E[v | x], so the gradient is 0 there but for the draw."""
    batch, steep = data(4096), []
    for shift in (0.0, 0.3):
        model = GaussianPolicy(MEAN + shift, STD)
        method = FlowMatching(Uniform(), weighting=weighting)
        method.loss({"model": model}, batch, Rng(0, 0))[0].backward()
        steep.append(float(model.mean.grad.norm()))
    assert steep[0] < 0.1 * steep[1]


# -- guided ----------------------------------------------------------------------------------------

LOW, HIGH, S = 1.0, 4.0, 0.5


class Quick:
    """Draws as a method asks for them, from one generator: keyed ones cost 20 µs a sample."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def __call__(
        self, stream: str, ids: Tensor, shape: tuple[int, ...] = (), counter: int = 0
    ) -> Tensor:
        return torch.randn(len(ids), *shape, generator=self.g)

    def uniform(self, stream: str, ids: Tensor, counter: int = 0) -> Tensor:
        return torch.rand(len(ids), generator=self.g)


def between(batch: Batch, t: Tensor, eps: Tensor) -> Tensor:
    """x_t."""
    assert batch.x0 is not None
    return (1 - t)[:, None, None] * batch.x0 + t[:, None, None] * eps


class World:
    """Two prompts (text 1 and −1) of one Gaussian each; the empty prompt (0) is their mixture."""

    def __init__(self, means: Tensor) -> None:
        self.means = means  # 2 2
        self.free = Mixture(means, torch.ones(2), S)

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        c = cond.text[:, 0, 0]
        mean = torch.where(c[:, None] > 0, self.means[0], self.means[1])[:, None]
        return torch.where((c == 0)[:, None, None], self.free(x, t), Gaussian(mean, S)(x, t))

    def guided(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The optimum: v_u + g·(v_c − v_u)."""
        free = self.free(x, t)
        return guide(self.velocity(x, t, cond), free, cond.guidance)

    def batch(self, count: int, seed: int, dropped: float = 0.2) -> Batch:
        g = torch.Generator().manual_seed(seed)
        c = torch.randint(0, 2, (count,), generator=g) * 2.0 - 1
        x0 = torch.where(c[:, None] > 0, *self.means)[:, None]
        x0 = x0 + S * torch.randn(count, 1, 2, generator=g)
        said = torch.where(torch.rand(count, generator=g) < dropped, 0.0, c)
        return Batch(
            torch.arange(count), ("p",) * count, condition(said), torch.arange(count),
            ({},) * count, (1, 1), 2, x0=x0, weight=torch.full((count,), 1 / count),
        )  # fmt: skip


def condition(said: Tensor, g: float = 2.0) -> Condition:
    b = len(said)
    empty = Condition(
        torch.zeros(b, 1, 1), torch.zeros(b, 1, 4), torch.zeros(b, 1, 4),
        guidance=torch.full((b,), g),
    )  # fmt: skip
    return replace(empty, text=said[:, None, None], null=empty)


class Net(nn.Module):
    """v(x, t, c, g) of a plane, with an embedder for g."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = ((6, 64), (64, 64), (64, 2))
            layers = [m for i, o in sizes for m in (nn.Linear(i, o), nn.SiLU())]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        c = cond.text[:, 0, 0]
        assert cond.guidance is not None
        rows = torch.stack([t, c, cond.guidance, c * cond.guidance], 1)
        return self.body(torch.cat([x[:, 0], rows], 1))[:, None]


def descend(net: nn.Module, loss: Any, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def points(world: World, count: int = 512) -> tuple[Tensor, Tensor, Condition]:
    """Places on the way of prompted samples, with a strength each."""
    batch, rng = world.batch(count, 99, dropped=0.0), Quick(98)
    t = 0.1 + 0.85 * rng.uniform("", batch.ids)
    x = between(batch, t, rng("", batch.ids, (1, 2)))
    g = LOW + (HIGH - LOW) * rng.uniform("", batch.ids)
    cond = replace(batch.cond, guidance=g)
    return x, t, replace(cond, null=replace(cond.null, guidance=g))


@torch.no_grad()
def misguided(net: Any, world: World) -> float:
    """How far v_θ(c, g) is from v_u + g·(v_c − v_u), in units of what guidance adds to v_c: 0 is
    parity, 1 what a network without any guidance has."""
    x, t, cond = points(world)
    want, plain = world.guided(x, t, cond), world.velocity(x, t, cond)
    return float((net(x, t, cond) - want).norm() / (want - plain).norm())


OLD = World(torch.tensor([[1.5, 0.0], [-1.5, 0.0]]))
NEW = World(torch.tensor([[1.0, 1.0], [-1.0, 0.5]]))


@pytest.fixture(scope="module")
def distilled() -> Net:
    """A network with the old world's guidance distilled into it."""
    net = Net()

    def loss(step: int) -> Tensor:
        batch, rng = OLD.batch(512, step), Quick(step)
        t, eps = Uniform()(rng.uniform("", batch.ids)), rng("", batch.ids, (1, 2))
        x = between(batch, t, eps)
        cond = replace(batch.cond, guidance=LOW + (HIGH - LOW) * rng.uniform("", batch.ids))
        return (net(x, t, cond) - OLD.guided(x, t, cond)).square().mean()

    descend(net, loss, 1200, 1e-2)
    return net


def finetuned(distilled: Net, target: Any, steps: int = 1000, **kwargs: Any) -> Net:
    net = copy.deepcopy(distilled)
    roles = {"model": net, "reference": distilled}
    method = FlowMatching(Uniform(), target=target)
    descend(
        net,
        lambda k: method.loss(roles, NEW.batch(512, k, **kwargs), Quick(7000 + k))[0],
        steps,
        1e-2,
    )
    return net


@torch.no_grad()
def disparity(net: Any, world: World) -> float:
    """How far v_θ(c, g) is from the network's own v_u + g·(v_1 − v_u), v_u at the empty prompt and
    v_1 at strength 1, in units of what guidance adds to v_1."""
    x, t, cond = points(world)
    one = replace(cond, guidance=torch.ones_like(t))
    v_u, v_1, v_g = (net(x, t, c) for c in (cond.null, one, cond))
    want = guide(v_1, v_u, cond.guidance)
    return float((v_g - want).norm() / (want - v_1).norm())


def test_plain_finetuning_loses_the_guidance_and_guided_finetuning_keeps_it(distilled):
    """On data of new means, whose guided optimum is known."""
    assert misguided(distilled, OLD) < 0.1
    plain, guided = finetuned(distilled, Plain()), finetuned(distilled, Guided((LOW, HIGH)))
    assert misguided(plain, NEW) > 0.7 and disparity(plain, NEW) > 0.7  # it answers v_c, or nearly
    assert misguided(guided, NEW) < 0.2 and disparity(guided, NEW) < 0.2
    x, t, cond = points(NEW)
    empty = [replace(cond.null, guidance=torch.full_like(t, g)) for g in (LOW, HIGH)]
    with torch.no_grad():
        low, high = (guided(x, t, c) for c in empty)
        true = NEW.free(x, t)
    assert (low - high).norm() < 0.15 * true.norm() and (low - true).norm() < 0.15 * true.norm()


def test_the_guided_optimum_has_the_plain_optimums_loss():
    """v_u + (v_θ − v_u)/g is then v_c, so the two errors agree sample by sample."""
    batch = NEW.batch(64, 1, dropped=0.3)
    for target, kwargs in ((Guided((LOW, HIGH)), {}), (Guided((3.0, 3.0)), {})):
        method = FlowMatching(Uniform(), target=target, **kwargs)
        loss, _ = method.loss({"model": NEW.guided}, batch, Rng(2, 3))
        plain, _ = FlowMatching(Uniform()).loss({"model": NEW.velocity}, batch, Rng(2, 3))
        torch.testing.assert_close(loss, plain, rtol=1e-4, atol=0)
        worse, _ = method.loss({"model": NEW.velocity}, batch, Rng(2, 3))
        assert worse > 1.01 * plain


def test_the_gradient_is_that_of_a_fixed_target():
    """Of an empty prompt: v − [v + g·(v* − v)] = g·(v − v*), so the loss is the plain one, and its
    gradient 2·g·(v − v*)/g² is the plain one's part 1/g. It would be all of it if v_u had one."""
    batch, g, grads = NEW.batch(16, 1, dropped=1.0), 4.0, []
    for target in (Plain(), Guided((g, g))):
        net = Net(3)
        roles = {"model": net}
        if isinstance(target, Plain):  # it leaves the strength as the data have it
            batch = replace(batch, cond=condition(batch.cond.text[:, 0, 0], g))
        loss, metrics = FlowMatching(Uniform(), target=target).loss(roles, batch, Rng(0, 0))
        loss.backward()
        grads.append((loss.detach(), net.body[0].weight.grad, metrics["loss"].detach()))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], g * grads[1][1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(grads[1][2], grads[1][0])


def test_a_reference_holds_the_unconditional_answer():
    """v_u is the reference's: prompted samples go to v_u + g·(v_c − v_u), dropped ones to v_u."""
    target = Guided((LOW, HIGH), "reference")
    assert FlowMatching(target=target).roles["reference"] == RoleSpec()
    batch = NEW.batch(40, 1, dropped=0.4)
    x, t, v, u = points(NEW, 40)[0], torch.rand(40), torch.randn(40, 1, 2), torch.rand(40)
    asked, want, factor = target({"reference": OLD.guided}, x, t, batch.cond, v, u)
    g = LOW + (HIGH - LOW) * u
    dropped = batch.cond.text[:, 0, 0] == 0
    assert 5 < dropped.sum() < 35
    v_u = OLD.free(x, t)
    torch.testing.assert_close(want[dropped], v_u[dropped])
    torch.testing.assert_close(want[~dropped], guide(v, v_u, g)[~dropped])
    torch.testing.assert_close(unguide(want, v_u, g)[~dropped], v[~dropped], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(asked.guidance, g)
    torch.testing.assert_close(factor, g**-2)


def test_the_strength_reaches_the_embedder_alike_for_both_prompts():
    seen: list[Condition] = []

    def model(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        seen.append(cond)
        return x

    batch, method = NEW.batch(32, 1), FlowMatching(target=Guided((1.5, 5.0)))
    method.loss({"model": model}, batch, Rng(0, 1))
    empty, asked = seen
    assert torch.equal(empty.text, batch.cond.null.text)
    assert torch.equal(asked.text, batch.cond.text)
    assert torch.equal(empty.guidance, asked.guidance) and len(set(asked.guidance.tolist())) == 32
    assert 1.5 <= asked.guidance.min() < 2 and 4.5 < asked.guidance.max() <= 5
    seen.clear()
    bare = replace(batch.cond, guidance=None, null=replace(batch.cond.null, guidance=None))
    baked = FlowMatching(target=Guided((3.0, 3.0), role="distilled"))
    baked.loss({"model": model}, replace(batch, cond=bare), Rng(0, 1))
    assert [c.guidance for c in seen] == [None, None]


def test_whom_a_target_is_for():
    assert FlowMatching().accepts == ("base",) and FlowMatching().result is None
    guided = FlowMatching(target=Guided())
    assert "guidance-distilled" in guided.accepts and guided.result is None
    assert "reference" not in guided.roles
    assert FlowMatching(target=Guided((2.0, 2.0), role="base")).result == "distilled"


def test_wrong_guidance_is_refused():
    for role in ("base", "distilled"):
        with pytest.raises(InputError, match=r"no embedder.*bake one in") as caught:
            Guided((1.0, 4.0), role=role)
        assert "\n" not in str(caught.value)
    for scale in ((), (1.0,), (0.0, 2.0), (3.0, 2.0), (1.0, math.inf), (math.nan, 2.0)):
        with pytest.raises(InputError, match=r"target\.scale"):
            Guided(scale)
    with pytest.raises(InputError, match="self or reference"):
        Guided(unconditional="ema")
    batch = data(2)
    with pytest.raises(InputError, match="unconditional"):
        bare = replace(batch, cond=replace(batch.cond, null=None))
        FlowMatching(target=Guided()).loss({"model": Gaussian(MEAN, STD)}, bare, Rng(0, 0))


# -- guided, on a FLUX.2 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tiny_config) -> Flux2:
    """The tiny model of conf/model/nano-dev's kind."""
    cfg = OmegaConf.merge(tiny_config, {
        "role": "guidance-distilled", "embedded_guidance": 2.0,
        "architecture": {"transformer": {"guidance_embeds": True}},
    })  # fmt: skip
    return load_model(cfg, torch.device("cpu"))


class Plane:
    """`World` in the first two channels of a latent of one token; the others are N(0, S²)."""

    def __init__(self, model: Flux2, means: Tensor) -> None:
        self.means = torch.cat([means, torch.zeros(2, 126)], 1)
        self.free = Mixture(self.means, torch.ones(2), S)
        self.text = model.text(["", "a red circle", "two blue squares"], torch.device("cpu"))

    def batch(self, count: int, seed: int, dropped: float = 0.2) -> Batch:
        g = torch.Generator().manual_seed(seed)
        which = torch.randint(1, 3, (count,), generator=g)
        x0 = self.means[which - 1][:, None] + S * torch.randn(count, 1, 128, generator=g)
        said = torch.where(torch.rand(count, generator=g) < dropped, 0, which)
        empty = Condition(
            self.text[:1].expand(count, -1, -1), text_ids(count, self.text.shape[1]),
            torch.zeros(count, 1, 4), guidance=torch.full((count,), 2.0),
        )  # fmt: skip
        cond = replace(empty, text=self.text[said], null=empty)
        return Batch(
            torch.arange(count), ("p",) * count, cond, said, ({},) * count, (1, 1), 128, x0=x0,
            weight=torch.full((count,), 1 / count),
        )  # fmt: skip

    def optimum(self, x: Tensor, t: Tensor, said: Tensor, g: Tensor) -> Tensor:
        """v_u + g·(v_c − v_u); said: b, 0 for the empty prompt."""
        free = self.free(x, t)
        at = Gaussian(self.means[(said - 1).clamp(min=0)][:, None], S)(x, t)
        return guide(torch.where((said == 0)[:, None, None], free, at), free, g)


def tuned(model: Flux2, loss: Any, steps: int, start: Any = None) -> Any:
    """The role `model` after updates by `loss(roles, step)`."""
    roles = Roles({"model": RoleSpec(trainable=True)}, copy.deepcopy(model), None, None)
    if start is not None:
        roles["model"].backbone.load_state_dict(start.backbone.state_dict())
    descend(roles["model"].backbone, lambda k: loss(roles, k), steps, 3e-3)
    return roles["model"]


@torch.no_grad()
def missed(role: Any, world: Plane) -> float:
    """`misguided`, in the plane."""
    batch, rng = world.batch(256, 99, dropped=0.0), Quick(98)
    t = 0.1 + 0.85 * rng.uniform("", batch.ids)
    x = between(batch, t, rng("", batch.ids, batch.shape))
    g = LOW + (HIGH - LOW) * rng.uniform("", batch.ids)
    want, plain = (world.optimum(x, t, batch.groups, k)[..., :2] for k in (g, torch.ones_like(g)))
    got = role(x, t, replace(batch.cond, null=None, guidance=g))[..., :2]
    return float((got - want).norm() / (want - plain).norm())


@pytest.mark.slow
def test_a_flux2_with_an_embedder_keeps_its_guidance_too(embedded):
    world = Plane(embedded, OLD.means)

    def distil(roles: Any, step: int) -> Tensor:
        batch, rng = world.batch(64, step), Quick(step)
        t, eps = Uniform()(rng.uniform("", batch.ids)), rng("", batch.ids, batch.shape)
        x = between(batch, t, eps)
        g = LOW + (HIGH - LOW) * rng.uniform("", batch.ids)
        v = roles["model"](x, t, replace(batch.cond, null=None, guidance=g))
        return (v - world.optimum(x, t, batch.groups, g)).square().sum(-1).mean()

    def finetune(target: Any) -> Any:
        method = FlowMatching(Uniform(), target=target)
        return lambda roles, k: method.loss(roles, world.batch(64, 5000 + k), Quick(9000 + k))[0]

    start = tuned(embedded, distil, 500)
    assert missed(start, world) < 0.45
    plain = tuned(embedded, finetune(Plain()), 200, start)
    guided = tuned(embedded, finetune(Guided((LOW, HIGH))), 200, start)
    assert missed(plain, world) > 0.85 and missed(guided, world) < 0.6
