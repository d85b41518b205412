"""Roles are functions: what one is called with, another never notices."""

from __future__ import annotations

import itertools

import pytest
import torch

from flux2.adapters import LoRA
from flux2.errors import InputError
from flux2.latents import grid_ids, reference_ids
from flux2.roles import Roles
from flux2.text import text_ids
from flux2.types import Condition, RoleSpec

TWO = {
    "policy": RoleSpec(trainable=True),
    "other": RoleSpec(trainable=True),
    "reference": RoleSpec(),
    "ema": RoleSpec(follows="policy", decay=0.75),
}
NAMES = tuple(TWO)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tiny, b: int = 2):
    cond = Condition(
        text=draw(b, 5, tiny.text.dim, seed=3),
        text_ids=text_ids(b, 5),
        ids=grid_ids((2, 3)).expand(b, -1, -1),
    )
    return draw(b, 6, 128), torch.linspace(0.2, 0.9, b), cond


@torch.no_grad()
def perturb(roles: Roles, *names: str, scale: float = 0.1) -> None:
    for k, name in enumerate(names):
        g = torch.Generator().manual_seed(100 + k)
        for p in roles.parameters(name).values():
            p.add_(scale * torch.randn(p.shape, generator=g))


def build(tiny, lora: bool, specs=None, **kwargs) -> Roles:
    return Roles(specs or TWO, tiny, LoRA(4) if lora else None, None, **kwargs)


@pytest.mark.parametrize("lora", [True, False])
def test_roles_start_as_the_model_and_never_leak(tiny, lora):
    x, t, cond = inputs(tiny)
    with torch.no_grad():
        bare = build(tiny, lora=False, specs={"only": RoleSpec()})["only"](x, t, cond)
        roles = build(tiny, lora)
        for name in NAMES:
            torch.testing.assert_close(roles[name](x, t, cond), bare, atol=1e-6, rtol=0)
        perturb(roles, "policy", "other", "ema")
        alone = {name: roles[name](x, t, cond) for name in NAMES}
        assert torch.equal(alone["reference"], bare)
        for a, b in itertools.permutations(NAMES, 2):
            assert (alone[a] - alone[b]).abs().max() > 1e-3
            roles[b](x, t, cond)
            assert torch.equal(roles[a](x, t, cond), alone[a]), (a, b)


@pytest.mark.parametrize("lora", [True, False])
def test_only_a_roles_own_parameters_get_gradients(tiny, lora):
    x, t, cond = inputs(tiny)
    roles = build(tiny, lora)
    assert roles.trainable == ("policy", "other")
    mine = {id(p) for name in ("policy", "other") for p in roles.parameters(name).values()}
    wanting = {id(p) for p in roles.backbones.parameters() if p.requires_grad}
    assert wanting == mine and mine
    perturb(roles, "policy", "other")
    roles["policy"](x, t, cond).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in roles.parameters("policy").values())
    own = {id(p) for p in roles.parameters("policy").values()}
    assert all(p.grad is None for p in roles.backbones.parameters() if id(p) not in own)
    assert roles.parameters("reference") == {}


@pytest.mark.parametrize("lora", [True, False])
def test_gradients_under_checkpointing_equal_those_without(tiny, lora):
    """While other roles are called between forward and backward: the recomputation must run with
    the adapter of its own first pass."""
    x, t, cond = inputs(tiny)
    roles = build(tiny, lora)
    perturb(roles, "policy", "other", "ema")
    grads = []
    for checkpointing in (False, True):
        for name in ("policy", "other"):
            backbone = roles[name].backbone
            if checkpointing:
                backbone.enable_gradient_checkpointing(roles[name].checkpointed)
        runs = []
        block = roles["policy"].backbone.transformer_blocks[0]
        handle = block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        a = roles["policy"](x, t, cond)
        b = roles["other"](x, t, cond)
        with torch.no_grad():
            roles["reference"](x, t, cond)
            roles["ema"](x, t, cond)
        first = len(runs)
        (a.square().sum() + 2 * b.pow(3).sum()).backward()
        assert (len(runs) > first) == checkpointing  # it did recompute
        handle.remove()
        params = [p for n in ("policy", "other") for p in roles.parameters(n).values()]
        grads.append([p.grad.clone() for p in params])
        roles.backbones.zero_grad()
    for plain, recomputed in zip(*grads, strict=True):
        assert plain.any()
        torch.testing.assert_close(recomputed, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_checkpointing_is_enabled_on_every_backbone(tiny, lora):
    """Of frozen roles, too: a critic's gradients pass through the teacher."""
    roles = build(tiny, lora, checkpointing=True)
    assert all(roles[name].backbone.gradient_checkpointing for name in NAMES)


@pytest.mark.parametrize("lora", [True, False])
def test_follow_is_the_exact_average(tiny, lora):
    """w ← decay·w + (1 − decay)·leader, in fp64 beside it; it starts at the leader's weights."""
    roles = build(tiny, lora)
    key = lambda k, name: k.replace(f".{name}.", ".")  # noqa: E731

    def weights(name: str) -> dict[str, torch.Tensor]:
        return {key(k, name): p.detach().double() for k, p in roles.parameters(name).items()}

    leader, mean = weights("policy"), weights("ema")
    assert leader.keys() == mean.keys()
    for k in leader:
        assert torch.equal(leader[k], mean[k]), k
    mean = {k: v.clone() for k, v in mean.items()}
    for _ in range(3):
        perturb(roles, "policy")
        roles.follow("policy")
        mean = {k: 0.75 * mean[k] + 0.25 * v for k, v in weights("policy").items()}
    for k, v in weights("ema").items():
        torch.testing.assert_close(v, mean[k], atol=1e-6, rtol=1e-6)
    before = weights("ema")
    roles.follow("other")  # nobody follows it
    assert all(torch.equal(v, before[k]) for k, v in weights("ema").items())


@pytest.mark.parametrize("lora", [True, False])
def test_a_decay_of_zero_copies(tiny, lora):
    specs = {"policy": RoleSpec(trainable=True), "old": RoleSpec(follows="policy", decay=0.0)}
    roles = build(tiny, lora, specs)
    perturb(roles, "policy")
    roles.follow("policy")
    for a, b in zip(*(roles.parameters(n).values() for n in specs), strict=True):
        assert torch.equal(a, b)


def test_full_training_copies_only_where_it_must(tiny):
    alone = build(tiny, False, {"model": RoleSpec(trainable=True)})
    assert alone["model"].backbone is tiny.transformer
    tiny.transformer.requires_grad_(False)
    two = build(tiny, False, {"model": RoleSpec(trainable=True), "reference": RoleSpec()})
    assert two["reference"].backbone is tiny.transformer
    assert two["model"].backbone is not tiny.transformer
    assert not any(p.requires_grad for p in tiny.transformer.parameters())


def test_lora_shares_one_backbone(tiny):
    roles = build(tiny, True)
    assert list(roles.backbones) == ["base"] and {id(r.backbone) for r in roles.values()} == {
        id(tiny.transformer)
    }


@pytest.mark.parametrize("lora", [True, False])
def test_tensors_round_trip(tiny, lora):
    import copy

    second = copy.deepcopy(tiny)
    x, t, cond = inputs(tiny)
    roles = build(tiny, lora)
    perturb(roles, "policy", "other", "ema")
    state = {k: v.clone() for k, v in roles.tensors()}
    assert not any(k.startswith("reference") for k in state)
    fresh = build(second, lora)
    fresh.load(state)
    with torch.no_grad():
        for name in NAMES:
            assert torch.equal(fresh[name](x, t, cond), roles[name](x, t, cond)), name


def test_state_that_does_not_fit_is_refused(tiny):
    roles = build(tiny, True)
    state = dict(roles.tensors())
    with pytest.raises(InputError, match="one side"):
        roles.load(dict(list(state.items())[1:]))
    key = next(k for k in state if "lora_A" in k)
    with pytest.raises(InputError, match="shape"):
        roles.load({**state, key: state[key][:1]})


def test_following_nobody_is_refused(tiny):
    with pytest.raises(ValueError, match="follows"):
        build(tiny, True, {"ema": RoleSpec(follows="policy", decay=0.9)})


def test_guidance_is_given_to_models_with_the_embedder_alone(tiny):
    x, t, cond = inputs(tiny)
    role = build(tiny, True, {"reference": RoleSpec()})["reference"]
    with pytest.raises(ValueError, match="guidance"):
        role(x, t, Condition(**{**vars(cond), "guidance": torch.ones(2)}))


def test_references_reach_the_target_and_only_it_comes_back(tiny):
    x, t, cond = inputs(tiny)
    role = build(tiny, True, {"reference": RoleSpec()})["reference"]
    with torch.no_grad():
        plain = role(x, t, cond)
        ids = reference_ids([(2, 2), (1, 3)]).expand(2, -1, -1)
        ref = draw(2, 7, 128, seed=9)
        both = Condition(cond.text, cond.text_ids, cond.ids, ref, ids)
        got = role(x, t, both)
        assert got.shape == x.shape and (got - plain).abs().max() > 1e-3
        # A reference is told from another by its place alone: exchanged with their ids, no change.
        order = torch.tensor([4, 5, 6, 0, 1, 2, 3])
        moved = Condition(cond.text, cond.text_ids, cond.ids, ref[:, order], ids[:, order])
        torch.testing.assert_close(role(x, t, moved), got, atol=1e-5, rtol=1e-5)
        swapped = Condition(cond.text, cond.text_ids, cond.ids, ref[:, order], ids)
        assert (role(x, t, swapped) - got).abs().max() > 1e-4


def test_the_autoencoder_role(tiny):
    roles = build(tiny, False, {"autoencoder": RoleSpec(trainable=True, kind="autoencoder")})
    images = draw(2, 3, 32, 32).clamp(-1, 1)
    out, mean, logvar = roles["autoencoder"].reconstruct(images)
    with torch.no_grad():
        posterior = tiny.vae.encode(images).latent_dist
        torch.testing.assert_close(mean, posterior.mode())
        torch.testing.assert_close(out, tiny.vae.decode(posterior.mode()).sample)
        noise = draw(2, *mean.shape[1:], seed=4)
        z = posterior.mean + torch.exp(0.5 * logvar) * noise
        again = roles["autoencoder"].reconstruct(images, lambda shape: noise.reshape(2, *shape))[0]
        torch.testing.assert_close(again, tiny.vae.decode(z).sample, atol=1e-5, rtol=1e-5)
    assert "vae/bn.running_mean" in dict(roles.tensors())
