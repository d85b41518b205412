"""Loading: what is refused before a weight is read, and what comes out."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from flux2 import sources
from flux2.errors import InputError
from flux2.model import check_model, load_model, meta_parts

httpx = import_module(HTTPError.__module__.partition(".")[0])  # as the hub's library has it

CPU = torch.device("cpu")
CONF = Path(__file__).parents[2] / "conf" / "model"
HUB = "black-forest-labs/FLUX.2-klein-base-4B"


def write(model, folder: Path, shard: str = "10GB") -> Path:
    """The model as a folder in diffusers' layout, in shards of at most this size."""
    model.transformer.save_pretrained(folder / "transformer", max_shard_size=shard)
    model.vae.save_pretrained(folder / "vae")
    model.text.encoder.save_pretrained(folder / "text_encoder", max_shard_size=shard)
    model.text.tokenizer.save_pretrained(folder / "tokenizer")
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(tiny, tmp_path):
    return write(tiny, tmp_path / "model")


@pytest.fixture
def unread(monkeypatch):
    """Fails a test in which weights are read."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    for name in ("load_folder", "load_file", "load_text_encoder"):
        monkeypatch.setattr(sources, name, read)


def at(cfg, folder, **more):
    out = cfg.copy()
    out.path, out.architecture = str(folder), None
    for key, value in more.items():
        out[key] = value
    return out


def conf(name: str):
    return OmegaConf.load(CONF / f"{name}.yaml")


# ---------------------------------------------------------------- what comes out


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


def test_random_weights_have_their_dtype(tiny_config):
    model = load_model(OmegaConf.merge(tiny_config, {"dtype": "bf16"}), CPU)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.text.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_a_folder_gives_back_the_model_of_one_file_or_of_shards(tiny_config, tiny, tmp_path, shard):
    folder = write(tiny, tmp_path / "model", shard)
    count = len(list((folder / "transformer").glob("*.safetensors")))
    assert (count == 1) == (shard == "10GB")
    model = load_model(at(tiny_config, folder), CPU)
    for part in ("transformer", "vae"):
        want = getattr(tiny, part).state_dict()
        got = getattr(model, part).state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)
    prompts = ["a red circle", ""]
    assert torch.equal(model.text(prompts), tiny.text(prompts))
    assert model.info.source == str(folder) and len(model.info.hash) == 16


def test_dtype_is_the_transformers_and_the_autoencoder_stays_fp32(tiny_config, folder, tiny):
    model = load_model(at(tiny_config, folder, dtype="bf16"), CPU)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.text.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    assert torch.equal(model.codec.mean, tiny.codec.mean)


def test_an_autoencoder_in_bf16_normalises_by_the_files_fp32_statistics(tiny_config, folder, tiny):
    model = load_model(at(tiny_config, folder, vae_dtype="bf16"), CPU)
    assert {p.dtype for p in model.vae.parameters()} == {torch.bfloat16}
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    mean, variance = stored["bn.running_mean"], stored["bn.running_var"]
    assert not torch.equal(mean.bfloat16().float(), mean)  # rounding would be seen
    assert torch.equal(model.codec.mean, mean)
    assert torch.equal(model.codec.std, torch.sqrt(variance + 1e-4))
    assert torch.equal(model.vae.bn.running_mean, mean)  # and an export writes them whole
    z = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(model.codec.normalise(z), tiny.codec.normalise(z), atol=0, rtol=0)


def test_another_autoencoder_replaces_the_folders(tiny_config, folder, tiny, tmp_path):
    tiny.vae.bn.running_mean += 1
    tiny.vae.save_pretrained(tmp_path / "vae")
    model = load_model(at(tiny_config, folder, vae=str(tmp_path / "vae")), CPU)
    torch.testing.assert_close(model.codec.mean, tiny.codec.mean + 1)


def test_quantisation_is_checked_before_the_weights_and_applied_after(
    tiny_config, folder, monkeypatch
):
    said: list[Any] = []

    def apply(transformer, name, device):
        assert not any(p.requires_grad for p in transformer.parameters())
        said.append(("apply", name, device))

    fake = SimpleNamespace(check=lambda name, device: said.append(("check", name)), apply=apply)
    monkeypatch.setitem(sys.modules, "flux2.quantise", fake)
    monkeypatch.setattr("flux2.quantise", fake, raising=False)
    load = sources.load_folder
    monkeypatch.setattr(
        sources, "load_folder", lambda *a: said.append(("load", a[1])) or load(*a)
    )
    load_model(at(tiny_config, folder, quantise="nf4"), CPU)
    assert said == [("check", "nf4"), ("load", "transformer"), ("load", "vae"),
                    ("apply", "nf4", CPU)]  # fmt: skip


# ---------------------------------------------------------------- shapes without weights

COUNTS = {
    "klein-4b-base": 3_875_544_576, "klein-4b": 3_875_544_576,
    "klein-9b-base": 9_078_581_248, "klein-9b": 9_078_581_248,
    "dev": 32_223_281_152,
    "nano": 8_176_128, "nano-scratch": 8_176_128, "nano-dev": 8_307_200,
}  # fmt: skip
ENCODERS = {"klein-4b": 4_022_468_096, "klein-9b": 8_190_735_360, "dev": 24_011_361_280}
"""Whole: Qwen3-4B, Qwen3-8B and Mistral Small 3.2, as their cards count them."""


def test_every_model_is_counted():
    assert {p.stem for p in CONF.glob("*.yaml")} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_on_the_meta_device_without_network(name, monkeypatch):
    """flux2.md's counts, from conf/model alone: the classes are FLUX.2's own."""

    def connect(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    cfg = conf(name)
    if name == "nano":
        cfg.path = str(CONF.parents[1] / "experiments" / "nano" / "base")
    parts = meta_parts(cfg)
    assert set(parts) == {"transformer", "vae", "text_encoder"}
    tensors = [t for m in parts.values() for t in (*m.parameters(), *m.buffers())]
    assert {t.device.type for t in tensors} == {"meta"}
    assert sum(p.numel() for p in parts["transformer"].parameters()) == COUNTS[name]
    assert parts["transformer"].dtype == (torch.float32 if "nano" in name else torch.bfloat16)
    if "nano" not in name:
        assert sum(p.numel() for p in parts["vae"].parameters()) == 84_046_115


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_are_those_of_the_family(name):
    cfg = conf(name)
    cut: Any = meta_parts(cfg)["text_encoder"]
    assert cut.config.num_hidden_layers == len(cut.layers) == max(cfg.text_layers)
    assert len(cfg.text_layers) * cut.config.hidden_size == (
        cfg.architecture.transformer.joint_attention_dim
    )
    cfg.path = None  # random weights: nothing is cut off
    whole: Any = meta_parts(cfg)["text_encoder"]
    assert sum(p.numel() for p in whole.parameters()) == ENCODERS[name]
    # flux2.md: the layers above the last one used are a fifth to a quarter of the encoder.
    body = whole.base_model
    layers = getattr(body, "language_model", body).layers
    unused = layers[max(cfg.text_layers) :]
    share = sum(p.numel() for p in unused.parameters()) / ENCODERS[name]
    assert 0.19 < share < 0.26


@pytest.mark.parametrize("name", ["klein-4b-base", "dev"])
def test_the_hub_ids_and_their_facts(name):
    cfg = conf(name)
    assert sources.HUB_ID.fullmatch(cfg.path) and cfg.licence and cfg.max_sequence_length == 512
    assert (cfg.role, list(cfg.text_layers)) == {
        "klein-4b-base": ("base", [9, 18, 27]), "dev": ("guidance-distilled", [10, 20, 30])
    }[name]  # fmt: skip


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("role", "turbo", "model.role"), ("role", "guidance-distilled", "no guidance embedder"),
     ("dtype", "fp8", "model.dtype"), ("vae_dtype", "fp8", "model.vae_dtype"),
     ("vae_autocast", "fp16", "vae_autocast"), ("vae", "/no/such/folder", "model.vae"),
     ("path", "/no/such/folder", "model.path"), ("architecture", None, "model.path"),
     ("transformer", "/no/such/file", "model.path"), ("attention", "none", "model.attention")],
)  # fmt: skip
def test_wrong_settings_are_refused(tiny_config, unread, key, value, message):
    cfg = tiny_config.copy()
    cfg[key] = value
    with pytest.raises(InputError, match=message):
        check_model(cfg)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"transformer": {"num_layrs": 3}}, "num_layrs"),
     ({"vae": {"latents": 3}}, "latents"),
     ({"text_encoder": {"hidden_sise": 3}}, "hidden_sise"),
     ({"text_encoder": {"model_type": "t5"}}, "model_type")],
)  # fmt: skip
def test_an_unknown_key_of_the_architecture_is_refused(tiny_config, unread, keys, message):
    with pytest.raises(InputError, match=message):
        check_model(OmegaConf.merge(tiny_config, {"architecture": keys}))


def test_a_distilled_model_is_not_mistaken_for_the_base(tiny_config, folder, unread):
    check_model(at(tiny_config, folder))
    with pytest.raises(InputError, match="not distilled"):
        check_model(at(tiny_config, folder, role="distilled"))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    check_model(at(tiny_config, folder, role="distilled"))
    with pytest.raises(InputError, match="is distilled"):
        check_model(at(tiny_config, folder))


def test_a_guidance_embedder_is_no_bases(tiny_config, unread):
    cfg = OmegaConf.merge(
        tiny_config, {"architecture": {"transformer": {"guidance_embeds": True}}}
    )
    with pytest.raises(InputError, match="guidance embedder, which a base lacks"):
        check_model(cfg)
    cfg.role = "guidance-distilled"
    check_model(cfg)


def test_broken_folders_are_one_line(tiny_config, folder, unread):
    (weights,) = (folder / "transformer").glob("*.safetensors")
    whole = weights.read_bytes()
    for torn in (whole[:1000], whole[:-4], b"version https://git-lfs.github.com/spec/v1"):
        weights.write_bytes(torn)
        with pytest.raises(InputError, match="restore") as caught:
            check_model(at(tiny_config, folder))
        assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(InputError, match="has no diffusion_pytorch_model"):
        check_model(at(tiny_config, folder))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        check_model(at(tiny_config, folder))
    (folder / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"no model_index\.json"):
        check_model(at(tiny_config, folder))


def test_a_missing_shard_is_found_before_loading(tiny_config, tiny, tmp_path, unread):
    folder = write(tiny, tmp_path / "model", "100KB")
    check_model(at(tiny_config, folder))
    shard = sorted((folder / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"has no {re.escape(shard.name)}"):
        check_model(at(tiny_config, folder))


def test_text_layers_must_fit_the_transformer(tiny_config, folder, unread):
    with pytest.raises(InputError, match="text_layers"):
        check_model(at(tiny_config, folder, text_layers=[9, 18]))
    with pytest.raises(InputError, match="not below the encoder's last"):
        check_model(at(tiny_config, folder, text_layers=[9, 18, 28]))


def test_another_architecture_is_refused_by_name(folder, unread):
    """A folder of another size than conf/model says: by config.json."""
    cfg = conf("klein-4b-base")
    cfg.path = str(folder)
    with pytest.raises(InputError, match="num_layers 1 and the model should have 5"):
        check_model(cfg)


def test_weights_of_another_shape_than_the_config_are_refused(tiny_config, tiny, folder, unread):
    """config.json says one thing and the file's header another."""
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = {k: v.clone() for k, v in tiny.transformer.state_dict().items()}
    for change, message in (
        ({"x_embedder.weight": torch.zeros(64, 96)}, r"x_embedder.weight is \[64, 96\]"),
        ({"x_embedder.bias": torch.zeros(64)}, "x_embedder.bias is one too many"),
        ({"x_embedder.weight": state["x_embedder.weight"].to(torch.float8_e4m3fn)}, "F8_E4M3"),
    ):
        save_file(state | change, path)
        with pytest.raises(InputError, match=message):
            check_model(at(tiny_config, folder))
    del state["proj_out.weight"]
    save_file(state, path)
    with pytest.raises(InputError, match=r"proj_out.weight is missing"):
        check_model(at(tiny_config, folder))


def test_another_class_is_refused(tiny_config, folder, unread):
    path = folder / "transformer" / "config.json"
    content = json.loads(path.read_text()) | {"_class_name": "FluxTransformer2DModel"}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="class_name FluxTransformer2DModel"):
        check_model(at(tiny_config, folder))
    content = json.loads((folder / "text_encoder" / "config.json").read_text())
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "_class_name": "Flux2Transformer2DModel"}))  # fmt: skip
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    with pytest.raises(InputError, match="is a llama"):
        check_model(at(tiny_config, folder))


def test_a_text_encoder_that_lacks_a_layer_is_refused(tiny_config, tiny, folder, unread):
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    keep = {k: v for k, v in state.items() if ".layers.26." not in k}
    save_file(keep, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.26\..* is missing"):
        check_model(at(tiny_config, folder))
    keep = {k: v for k, v in state.items() if ".layers.27." not in k}  # never used
    save_file(keep, path, {"format": "pt"})
    check_model(at(tiny_config, folder))


# ---------------------------------------------------------------- the hub


@pytest.fixture
def cache(tiny, tmp_path, monkeypatch):
    """A local cache of the hub with one model in it, laid out as huggingface_hub does."""
    hub = tmp_path / "hub"
    home = hub / f"models--{HUB.replace('/', '--')}"
    revision = "0" * 40
    write(tiny, home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home / "snapshots" / revision


def test_a_hub_id_is_read_from_the_local_cache_without_network(tiny_config, tiny, cache):
    model = load_model(at(tiny_config, HUB), CPU)
    assert model.info.source == str(cache) == str(model.text.source)
    want = tiny.transformer.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in model.transformer.state_dict().items())


def test_the_caches_file_names_are_hashes_already(cache, tmp_path):
    """Its files are links to blobs that bear their sha256: no need to read 60 GB for it."""
    (path,) = (cache / "transformer").glob("*.safetensors")
    before = sources.fingerprint([path])
    blob = tmp_path / hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(blob)
    path.symlink_to(blob)
    assert sources.fingerprint([path]) == before
    blob.write_bytes(b"no longer read")
    assert sources.fingerprint([path]) == before


def test_what_is_not_cached_is_one_line_offline(tiny_config, cache, unread):
    for missing in (HUB.replace("4B", "9B"), HUB):
        with pytest.raises(InputError, match="HF_HUB_OFFLINE") as caught:
            check_model(at(tiny_config, missing))
        assert f"hf download {missing}" in str(caught.value) and "\n" not in str(caught.value)
        (weights,) = (cache / "vae").glob("*.safetensors") if missing != HUB else [None]
        if weights is not None:
            weights.unlink()  # a download that was cut short is no model


def _error(cls: Any, status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return cls("refused", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [(httpx.ConnectError("no route to host"), "cannot be reached"),
     (_error(GatedRepoError, 403), "is gated: accept its licence"),
     (_error(RepositoryNotFoundError, 404), "the hub has no such model")],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(
    tiny_config, tmp_path, monkeypatch, unread, error, message
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(InputError, match=message) as caught:
        check_model(at(tiny_config, HUB))
    assert "\n" not in str(caught.value)


def test_a_misspelt_folder_is_no_hub_id(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    with pytest.raises(InputError, match="no folder outputs/mine"):
        check_model(at(tiny_config, "outputs/mine"))


# ---------------------------------------------------------------- single files


def original_transformer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' names → the reference code's."""
    state, out = dict(state), {}
    for key in list(state):
        if match := re.fullmatch(r"(.*)\.attn\.(to_|add_)q(_proj)?\.weight", key):
            stem, head, tail = match[1], match[2], match[3] or ""
            parts = [state.pop(f"{stem}.attn.{head}{x}{tail}.weight") for x in "qkv"]
            stem = stem.replace("transformer_blocks", "double_blocks")
            which = "img" if head == "to_" else "txt"
            out[f"{stem}.{which}_attn.qkv.weight"] = torch.cat(parts)
    scale, shift = state.pop("norm_out.linear.weight").chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    names = [
        ("x_embedder", "img_in"), ("context_embedder", "txt_in"),
        ("proj_out", "final_layer.linear"),
        ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
        ("modulation_img.linear", "modulation_img.lin"),
        ("modulation_txt.linear", "modulation_txt.lin"),
        ("stream_modulation.linear", "stream_modulation.lin"),
        ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
        ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
        ("attn.to_add_out", "txt_attn.proj"), ("attn.to_out.0", "img_attn.proj"),
        ("ff_context.linear_in", "txt_mlp.0"), ("ff_context.linear_out", "txt_mlp.2"),
        ("ff.linear_in", "img_mlp.0"), ("ff.linear_out", "img_mlp.2"),
        ("attn.to_qkv_mlp_proj", "linear1"), ("attn.to_out", "linear2"),
        ("single_transformer_blocks", "single_blocks"), ("transformer_blocks", "double_blocks"),
    ]  # fmt: skip
    for key, value in state.items():
        norm = "norm" if key.startswith("single") else "img_attn.norm"
        new = key.replace("attn.norm_q.weight", f"{norm}.query_norm.scale")
        new = new.replace("attn.norm_k.weight", f"{norm}.key_norm.scale")
        for old, name in names:
            new = new.replace(old, name)
        out[new] = value
    return {k: v.contiguous() for k, v in out.items()}


def original_vae(vae) -> dict[str, torch.Tensor]:
    """diffusers' names → the reference code's ae.safetensors; attention is a 1 × 1 convolution."""
    count, out = len(vae.config.block_out_channels), {}
    for key, value in vae.state_dict().items():
        key = re.sub(r"^(quant_conv)", r"encoder.\1", re.sub(r"^(post_)", r"decoder.\1", key))
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        for i in range(count):
            key = key.replace(f"up_blocks.{i}.upsamplers.0", f"up.{count - 1 - i}.upsample")
            key = key.replace(f"up_blocks.{i}.resnets", f"up.{count - 1 - i}.block")
        key = key.replace("mid_block.resnets.0", "mid.block_1")
        key = key.replace("mid_block.resnets.1", "mid.block_2")
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "attentions" in key:
            if key.endswith(".weight") and value.ndim == 2:
                value = value[:, :, None, None]
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = key.replace("to_out.0", "proj_out")
            key = re.sub(r"to_([qkv])\.", r"\1.", key)
        if "num_batches" not in key:
            out[key] = value.contiguous()
    return out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_transformer_file_replaces_the_folders(
    tiny_config, tiny, folder, tmp_path, prefix
):
    want = {k: v + 0.5 for k, v in tiny.transformer.state_dict().items()}
    file = tmp_path / "flux-2-tiny.safetensors"
    state = {f"{prefix}{k}": v for k, v in original_transformer(want).items()}
    save_file(state | ({"vae.decoder.conv_in.weight": torch.zeros(1)} if prefix else {}), file)
    shutil.rmtree(folder / "transformer")  # is not needed, where conf/model says the shape
    cfg = OmegaConf.merge(tiny_config, {"path": str(folder), "transformer": str(file)})
    model = load_model(cfg, CPU)
    got = model.transformer.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert len(model.info.hash) == 16
    half = load_model(OmegaConf.merge(cfg, {"dtype": "bf16"}), CPU)
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}


def test_a_single_file_of_another_shape_is_refused(tiny_config, tiny, folder, tmp_path, unread):
    state = original_transformer(tiny.transformer.state_dict())
    file = tmp_path / "model.safetensors"
    cfg = at(tiny_config, folder, transformer=str(file))

    def refused(state: dict[str, torch.Tensor], message: str) -> None:
        save_file(state, file)
        with pytest.raises(InputError, match=message) as caught:
            check_model(cfg)
        assert "\n" not in str(caught.value)

    save_file(state, file)
    check_model(cfg)
    refused(state | {"img_in.weight": torch.zeros(3, 3)}, r"x_embedder.weight is \[3, 3\]")
    refused(state | {"guidance_in.in_layer.weight": torch.zeros(3, 3)}, "one too many")
    refused({k: v for k, v in state.items() if "double" not in k}, "is missing")
    refused({"double_blocks.0.img_mod.lin.weight": torch.zeros(6, 2)}, "is missing")
    refused(state | {"double_blocks.0.img_mod.lin.weight": torch.zeros(6, 2)}, "no transformer of")
    scaled = {"img_in.weight": state["img_in.weight"].to(torch.float8_e4m3fn)}
    refused(state | scaled, "stored as F8_E4M3")
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="cannot read"):
        check_model(cfg)


def test_a_file_of_dev_needs_its_embedder(tmp_path):
    """The guidance embedder has other names in the original layout."""
    from diffusers import Flux2Transformer2DModel

    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32,
             "num_attention_heads": 2, "joint_attention_dim": 96, "axes_dims_rope": [8, 8, 8, 8],
             "guidance_embeds": True}  # fmt: skip
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**shape)
    save_file(original_transformer(model.state_dict()), tmp_path / "dev.safetensors")
    sources.check_file(tmp_path / "dev.safetensors", "transformer", model)
    got = sources.load_file(tmp_path / "dev.safetensors", "transformer", shape, CPU, torch.float32)
    want = model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in got.state_dict().items())


def test_an_original_autoencoder_file_replaces_the_folders(tiny_config, tiny, folder, tmp_path):
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(3)
    shape: Any = OmegaConf.to_container(tiny_config.architecture.vae)
    shape["mid_block_add_attention"] = True
    vae = AutoencoderKLFlux2(**shape).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    save_file(original_vae(vae), tmp_path / "ae.safetensors")
    cfg = OmegaConf.merge(
        tiny_config,
        {"path": str(folder), "vae": str(tmp_path / "ae.safetensors")},
    )
    with pytest.raises(InputError, match="one too many"):  # the nano model's has no attention
        check_model(cfg)
    one = sources.load_file(tmp_path / "ae.safetensors", "vae", vae.config, CPU, torch.float32)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert vae(images).sample.std() > 0.01
        assert torch.equal(one(images).sample, vae(images).sample)
    assert torch.equal(one.bn.running_var, vae.bn.running_var)
    save_file(original_vae(tiny.vae), tmp_path / "ae.safetensors")
    model = load_model(cfg, CPU)
    want = tiny.vae.state_dict()
    got = model.vae.state_dict()
    assert all(torch.equal(got[k], want[k]) for k in want if "num_batches" not in k)
    assert torch.equal(model.codec.mean, tiny.codec.mean)


# ---------------------------------------------------------------- memory


def _anonymous() -> int:
    """Bytes of this process's memory that no file backs: what its allocators hold."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", text)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it")
def test_loading_makes_no_second_copy_in_host_memory(tmp_path):
    """fp32 weights stay in the file's pages, which all ranks of a machine share; a cast holds the
    cast weights and, at any time, little else."""
    shape = {"num_layers": 1, "num_single_layers": 4, "attention_head_dim": 128,
             "num_attention_heads": 6, "joint_attention_dim": 192}  # fmt: skip
    from diffusers import Flux2Transformer2DModel

    from flux2.model import quiet

    quiet()
    model = Flux2Transformer2DModel(**shape)
    size = sum(4 * p.numel() for p in model.parameters())
    assert size > 150e6
    model.save_pretrained(tmp_path / "transformer", max_shard_size="50MB")
    save_file(original_transformer(model.state_dict()), tmp_path / "one.safetensors")
    del model

    def grown(load) -> float:
        before = _anonymous()
        kept = load()
        out = (_anonymous() - before) / size
        assert sum(p.float().sum().item() for p in kept.parameters()) != 0
        return out

    for load in (
        lambda dtype: sources.load_folder(tmp_path / "transformer", "transformer", CPU, dtype),
        lambda dtype: sources.load_file(
            tmp_path / "one.safetensors", "transformer", shape, CPU, dtype
        ),
    ):
        load(torch.float32)
        assert grown(lambda: load(torch.float32)) < 0.1  # noqa: B023
        assert grown(lambda: load(torch.bfloat16)) < 0.6  # noqa: B023


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_on_a_gpu_leaves_nothing_on_the_host(tiny_config, tiny, tmp_path):
    folder = write(tiny, tmp_path / "model", "100KB")
    gpu = torch.device("cuda", torch.cuda.current_device())
    model = load_model(at(tiny_config, folder, dtype="bf16"), gpu)
    for part in (model.transformer, model.vae, model.text.encoder):
        assert {t.device for t in (*part.parameters(), *part.buffers())} == {gpu}
    want = tiny.transformer.state_dict()
    for k, v in model.transformer.state_dict().items():
        assert torch.equal(v.cpu(), want[k].bfloat16())


def test_the_page_on_models_counts_as_the_code_does():
    page = (CONF.parents[1] / "docs" / "models.md").read_text()
    for name, count in COUNTS.items():
        (line,) = [x for x in page.splitlines() if x.startswith(f"| `{name}` |")]
        assert f"{count:,}" in line
        if "nano" not in name:
            encoder = sum(p.numel() for p in meta_parts(conf(name))["text_encoder"].parameters())
            assert f"{encoder / 1e9:.2f}B" in line
            assert f"{2 * count / 1e9:.1f} + {2 * encoder / 1e9:.1f}" in line
