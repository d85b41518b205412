"""Loading: what is refused before a weight is read, and what comes out."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from flux2.errors import InputError
from flux2.export import export_pipeline
from flux2.model import check_model, load_model
from flux2.roles import Roles
from flux2.types import RoleSpec

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny, tmp_path):
    roles = Roles({"model": RoleSpec()}, tiny, None, None)
    return export_pipeline(tiny, roles, "model", tmp_path / "export", torch.float32)


def at(cfg, folder, **more):
    out = cfg.copy()
    out.path, out.architecture = str(folder), None
    for key, value in more.items():
        out[key] = value
    return out


def test_a_model_is_frozen_and_described(tiny):
    for part in (tiny.transformer, tiny.vae, tiny.text.encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert tiny.info.parameters == sum(p.numel() for p in tiny.transformer.parameters())
    assert (tiny.info.role, tiny.info.guidance_embeds, tiny.info.source) == ("base", False, "")
    assert tiny.transformer.config.joint_attention_dim == tiny.text.dim == 96


def test_random_weights_are_keyed_by_the_seed(tiny_config, tiny):
    again, other = (load_model(tiny_config, CPU, seed) for seed in (0, 1))
    for part in ("transformer", "vae"):
        mine = dict(getattr(tiny, part).named_parameters())
        for k, p in getattr(again, part).named_parameters():
            assert torch.equal(p, mine[k])
    key = "x_embedder.weight"
    assert not torch.equal(other.transformer.state_dict()[key], tiny.transformer.state_dict()[key])


def test_shapes_of_the_family():
    """flux2.md's counts, on the meta device: the class is FLUX.2's."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        klein = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
            guidance_embeds=False,
        )  # fmt: skip
    assert sum(p.numel() for p in klein.parameters()) == 3_875_544_576


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("role", "turbo", "model.role"), ("dtype", "fp8", "model.dtype"),
     ("vae_autocast", "fp16", "vae_autocast"), ("vae", "/no/such/folder", "model.vae"),
     ("path", "/no/such/folder", "model.path"), ("architecture", None, "model.path"),
     ("attention", "none", "model.attention")],
)  # fmt: skip
def test_wrong_settings_are_refused(tiny_config, key, value, message):
    cfg = tiny_config.copy()
    cfg[key] = value
    with pytest.raises(InputError, match=message):
        load_model(cfg, CPU)


def test_an_unknown_key_of_the_architecture_is_refused(tiny_config):
    cfg = OmegaConf.merge(tiny_config, {"architecture": {"transformer": {"num_layrs": 3}}})
    with pytest.raises(InputError, match="num_layrs"):
        load_model(cfg, CPU)


def test_a_distilled_model_is_not_mistaken_for_the_base(tiny_config, folder):
    check_model(at(tiny_config, folder))
    with pytest.raises(InputError, match="not distilled"):
        check_model(at(tiny_config, folder, role="distilled"))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    check_model(at(tiny_config, folder, role="distilled"))
    with pytest.raises(InputError, match="is distilled"):
        check_model(at(tiny_config, folder))


def test_broken_folders_are_one_line(tiny_config, folder):
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="restore") as caught:
        load_model(at(tiny_config, folder), CPU)
    assert "\n" not in str(caught.value)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        check_model(at(tiny_config, folder))
    (folder / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"no model_index\.json"):
        check_model(at(tiny_config, folder))


def test_text_layers_must_fit_the_transformer(tiny_config, folder):
    with pytest.raises(InputError, match="text_layers"):
        load_model(at(tiny_config, folder, text_layers=[9, 18]), CPU)


def test_dtype_is_the_transformers_and_the_autoencoder_stays_fp32(tiny_config, folder, tiny):
    model = load_model(at(tiny_config, folder, dtype="bf16"), CPU)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    assert torch.equal(model.codec.mean, tiny.codec.mean)


def test_another_autoencoder_replaces_the_folders(tiny_config, folder, tiny, tmp_path):
    tiny.vae.bn.running_mean += 1
    tiny.vae.save_pretrained(tmp_path / "vae")
    model = load_model(at(tiny_config, folder, vae=str(tmp_path / "vae")), CPU)
    torch.testing.assert_close(model.codec.mean, tiny.codec.mean + 1)
