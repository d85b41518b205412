"""A student that is told its strength: on the real transformer, and through the stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

import run
from distill.guidance import GuidanceDistillation
from eval.parity import Parity
from flux2.adapters import LoRA
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.export import expected, export_run
from flux2.lineage import find_init, inserted
from flux2.merge import opened
from flux2.model import check_initial, load_initial, load_model
from flux2.rng import Rng
from flux2.roles import Roles, velocity_of
from flux2.types import RoleSpec

QUICK = ("launch.threads=1", "evaluation=none", "data.batch_size=2", "optim=adamw",
         "optim.optimizer.lr=0.02", "heldout.samples=3", "heldout.strengths=[1,4]",
         "heldout.every=2")  # fmt: skip
TRAIN = ("stage=guidance", "method.scale=[1,5]", "train.steps=2", "train.export=false",
         *QUICK)  # fmt: skip
STRONG = "model.role=guidance-distilled"
SAMPLE = ("stage=sample", "sampler.steps=2", "sampler.guidance=1", "count=1", "prompts=['a sign']",
          QUICK[0])  # fmt: skip
TOLD = GuidanceDistillation((1.0, 5.0), micro=4)
WORLD = SignWorld("heldout", length=8, tasks={"t2i": 1.0})


def composed(folder: Path, *overrides: str) -> Any:
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        return compose("config", overrides=[*overrides, f"run.dir={folder}"])


def job(folder: Path, *overrides: str) -> dict[str, Any]:
    return run.job(composed(folder, *overrides))


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory) -> Path:
    """The tiny model as a folder."""
    torch.set_num_threads(1)
    model = load_model(tiny_config, torch.device("cpu"))
    roles = Roles({"model": RoleSpec()}, model, None, None)
    folder = tmp_path_factory.mktemp("base") / "folder"
    return export_run(model, roles, "model", folder, torch.float32)


def trained(base: Path, folder: Path, *more: str) -> Path:
    job(folder, *TRAIN, f"model.path={base}", *more)
    return folder


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return trained(base, folder, "adapter=lora", "adapter.rank=3")


@pytest.fixture(scope="module")
def full_run(base, tmp_path_factory) -> Path:
    return trained(base, tmp_path_factory.mktemp("runs") / "full")


def initial(base: Path, *overrides: str) -> Any:
    """The model that a stage=sample would draw with."""
    cfg = composed(Path("unused"), *SAMPLE, f"model.path={base}", *overrides)
    return load_initial(cfg, torch.device("cpu"))


def answers(model: Any, *strengths: float) -> list[Tensor]:
    """The velocity at each of them; without one: at the model's own."""
    batch = Collator(model)([WORLD[0]], torch.tensor([0]))
    assert batch.cond is not None and batch.x0 is not None
    told = [replace(batch.cond, guidance=torch.tensor([g])) for g in strengths] or [batch.cond]
    with torch.no_grad():
        return [velocity_of(model)(batch.x0, torch.tensor([0.7]), c) for c in told]


# ---------------------------------------------------------------- where it starts


@pytest.mark.parametrize("lora", [LoRA(4), None], ids=["lora", "full"])
def test_the_student_starts_as_the_conditional_teacher_bit_for_bit(tiny, make_batch, lora):
    batch = make_batch(3)
    plain = Roles({"only": RoleSpec()}, tiny, None, None)["only"]
    t = torch.tensor([0.2, 0.6, 0.95])
    with torch.no_grad():
        want = plain(batch.x0, t, batch.cond)
    roles = Roles(TOLD.roles, tiny, lora, None)
    assert tiny.info.guidance_embeds and tiny.info.guidance == 3.0
    for g in (0.0, 1.0, 3.7):
        v = roles["student"](batch.x0, t, TOLD.asked(batch.cond, torch.full((3,), g)))
        assert torch.equal(v, want)
    rng = Rng(0, 0)
    TOLD.loss(roles, make_batch(3), rng)[0].backward()
    mine = roles.parameters("student")
    assert all(p.grad is None for p in tiny.transformer.parameters() if not p.requires_grad)
    if lora is None:
        own = {id(p) for p in mine.values()}
        assert all(p.grad is None or id(p) in own for p in roles.backbones.parameters())
    touched = [k for k, p in mine.items() if p.grad is not None and p.grad.abs().max() > 0]
    assert any("guidance_embedder.linear_2" in k for k in touched)


def test_a_model_with_the_embedder_is_no_teacher(tiny):
    Roles(TOLD.roles, tiny, LoRA(2), None)  # gives it one
    with pytest.raises(InputError, match="teacher must be a model without a guidance embedder"):
        Roles(TOLD.roles, tiny, LoRA(2), None)


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("scale", "want"), [((1.0, 5.0), (1, 2, 3, 4.5)), ((2.0, 4.0), (2, 3)), ((5.0, 8.0), (5, 8))]
)
def test_the_strengths_are_those_that_training_draws(scale, want):
    method = GuidanceDistillation(scale, micro=4)
    assert Parity(WORLD, method, samples=5).strengths == want
    with pytest.raises(InputError, match=r"set heldout\.strengths=\[…\] within that"):
        Parity(WORLD, method, strengths=[9.0], samples=5)


def test_parity_is_1_where_a_student_starts_and_0_at_the_target(tiny):
    roles = Roles(TOLD.roles, tiny, LoRA(2), None)
    parity = Parity(WORLD, TOLD, strengths=(1.0, 2.0, 4.5), samples=5, chunk=3)
    start = parity.measure(tiny, roles["teacher"], roles["student"])
    assert list(start) == [1.0, 2.0, 4.5] and start[1.0] < 1e-4
    assert start[2.0] == pytest.approx(1, abs=1e-4) and start[4.5] == pytest.approx(1, abs=1e-4)
    null: list[Any] = []

    def perfect(x, t, cond):
        """The target itself at a strength that is off by the factor `slack`."""
        g = slack * cond.guidance
        return TOLD.target(roles["teacher"], x, t, replace(cond, null=null[0](len(x))), g)

    def empty(rows: int) -> Any:
        batch = Collator(tiny, unconditional=True)([WORLD[k] for k in range(rows)],
                                                   torch.arange(rows))  # fmt: skip
        assert batch.cond is not None
        return batch.cond.null

    null.append(empty)
    slack = 1.0
    found = parity.measure(tiny, roles["teacher"], perfect)
    assert max(found.values()) < 1e-4
    # Off by 10 % of g where the way is g − 1; at g = 1 in units of one strength.
    slack = 1.1
    found = parity.measure(tiny, roles["teacher"], perfect)
    want = {1.0: 0.1, 2.0: 0.2 / 1, 4.5: 0.45 / 3.5}
    assert found == pytest.approx(want, rel=1e-3)


def test_parity_of_a_baked_strength_is_that_strengths():
    baked = GuidanceDistillation(2.5)
    assert tuple(Parity(WORLD, baked, samples=2).strengths) == (2.5,)
    for wrong in ({"samples": 9}, {"samples": 0}, {"chunk": 0}, {"strengths": (6.0,)}):
        with pytest.raises(InputError, match=f"heldout.{next(iter(wrong))}"):
            Parity(WORLD, TOLD, **{"samples": 2, **wrong})


# ---------------------------------------------------------------- runs


def test_a_run_says_what_it_made(lora_run, base):
    manifest = json.loads((lora_run / "manifest.json").read_text())
    assert manifest["result_role"] == "guidance-distilled" and inserted(manifest)
    assert manifest["embedded_guidance"] == 3.0 and manifest["base"]["guidance_embeds"] is False
    summary = json.loads((lora_run / "summary.json").read_text())
    rows = [json.loads(x) for x in (lora_run / "metrics.jsonl").read_text().splitlines()]
    assert summary["parity"].keys() == {"1", "4"}
    assert rows[1]["parity/g4"] == summary["parity"]["4"] and "parity/g4" not in rows[0]
    # The role is the result's; what lies under it, in conf/model, is a base.
    check_initial(composed(Path("unused"), *SAMPLE, f"model.path={base}", f"init_from={lora_run}",
                           STRONG))  # fmt: skip
    model = initial(base, f"init_from={lora_run}", STRONG)
    assert model.info.guidance_embeds and model.info.guidance == 3.0
    [own] = answers(model)
    weak, same = answers(model, 1.0, 3.0)
    assert torch.equal(own, same) and not torch.allclose(own, weak, rtol=1e-3)
    # model.embedded_guidance is another strength than the run's own.
    [told] = answers(initial(base, f"init_from={lora_run}", STRONG, "model.embedded_guidance=1"))
    assert torch.equal(told, weak)
    # The checkpoint's merged adapter is the role that was trained.
    cfg = OmegaConf.load(lora_run / "config.yaml")
    student = Roles(TOLD.roles, load_initial(cfg, torch.device("cpu")), LoRA(3), None)
    assert set(student.parameters("student")) >= {
        f"time_guidance_embed.guidance_embedder.linear_{k}.lora_A.student.weight" for k in (1, 2)
    }


def test_its_folder_is_ours_to_open_and_no_pipelines(lora_run, base, tmp_path):
    """Written, opened part by part by diffusers, and the same model as the checkpoint's."""
    from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel

    summary = job(tmp_path / "out", "stage=export", f"init_from={lora_run}", "dtype=fp32",
                  "format=[diffusers,single]", QUICK[0])  # fmt: skip
    found = summary["exports"]["diffusers"]["differences"]
    assert found["weights"] == 0 and found.keys() == {"weights", "velocity", "sigmas", "image"}
    folder = tmp_path / "out/export/diffusers"
    assert json.loads((folder / "manifest.json").read_text())["embedded_guidance"] == 3.0
    with pytest.raises(AttributeError, match="Flux2EmbeddedPipeline"):
        DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    with pytest.raises(ValueError, match="Flux2EmbeddedTransformer2DModel"):
        Flux2KleinPipeline.from_pretrained(folder, local_files_only=True)
    alone = Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    before = initial(base, f"init_from={lora_run}", STRONG)
    want = expected(before, before.transformer, None)
    weights = before.transformer.state_dict()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(tensor, weights[name])
    for how in ((f"init_from={folder}",), (f"model.path={folder}",)):
        after = initial(base, *how, STRONG)
        assert after.info.guidance_embeds and after.info.guidance == 3.0
        torch.testing.assert_close(expected(after, after.transformer, None), want)
    assert initial(folder, STRONG, "model.embedded_guidance=2").info.guidance == 2.0
    with pytest.raises(InputError, match="a base lacks"):
        initial(folder)


@pytest.mark.parametrize("format", ["lora-diffusers", "lora-original"])
def test_its_lora_has_no_place_on_its_base(lora_run, tmp_path, monkeypatch, format):
    monkeypatch.setattr("flux2.origin.load_initial", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="a base that lacks one: choose diffusers or single"):
        job(tmp_path / "out", "stage=export", f"init_from={lora_run}", f"format={format}")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("stage=guidance", "method.scale=[1,5]", "model.embedded_guidance=3"), "no guidance embe"),
        (("stage=guidance", "method.scale=[1,5]", "heldout.strengths=[6]"), "heldout.strengths"),
        (("stage=guidance", "method.scale=[5,1]"), "method.scale"),
        (("stage=sample", "model.embedded_guidance=3"), "no guidance embedder: leave it out"),
    ],
    ids=lambda x: x[-1] if isinstance(x, tuple) else "",
)
def test_a_strength_that_nothing_takes_is_refused(base, tmp_path, monkeypatch, overrides, says):
    monkeypatch.setattr("flux2.model._stored", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=says):
        job(tmp_path / "out", *overrides, *((*QUICK[:2],) if "guidance" in overrides[0] else ()),
            f"model.path={base}")  # fmt: skip


def test_its_checkpoint_is_not_merged_without_its_embedder(lora_run):
    with pytest.raises(InputError, match="name its export/"):
        opened(find_init(lora_run))


def test_a_baked_student_is_told_no_strength(base, tmp_path):
    folder = trained(base, tmp_path / "baked", "method.scale=2.5", "heldout.strengths=[1]")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["result_role"] == "distilled" and "embedded_guidance" not in manifest
    assert json.loads((folder / "summary.json").read_text())["parity"].keys() == {"2.5"}
    with pytest.raises(InputError, match="no guidance embedder"):
        initial(base, f"init_from={folder}", "model.role=distilled", "model.embedded_guidance=3")


@pytest.mark.slow
def test_a_resumed_run_is_a_run(base, lora_run, tmp_path):
    half = trained(base, tmp_path / "half", "adapter=lora", "adapter.rank=3", "train.steps=1")
    job(tmp_path / "half", *TRAIN, f"model.path={base}", "adapter=lora", "adapter.rank=3",
        f"resume={half}")  # fmt: skip

    def lines(folder: Path) -> list[dict[str, float]]:
        rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]

    assert lines(half) == lines(lora_run)


@pytest.mark.slow
def test_all_weights_a_sweep_of_strengths_and_what_comes_after(full_run, base, tmp_path):
    """Exported, sampled at two strengths, finetuned with its guidance kept, and exported again."""
    summary = job(tmp_path / "out", "stage=export", f"init_from={full_run}", QUICK[0])
    assert summary["exports"]["diffusers"]["differences"]["weights"] == 0
    images = []
    for g in (1.5, 5):
        job(tmp_path / f"g{g}", *SAMPLE, f"model.path={base}", f"init_from={full_run}", STRONG,
            f"model.embedded_guidance={g}")  # fmt: skip
        images.append((tmp_path / f"g{g}/samples/00000.png").read_bytes())
    assert images[0] != images[1]
    tuned = tmp_path / "tuned"
    job(tuned, "stage=sft", "target=guided", "method.target.scale=[1,5]", f"model.path={base}",
        STRONG, f"init_from={full_run}", "train.steps=1", "data.batch_size=2", "adapter=lora",
        "evaluation=none", "heldout=none", QUICK[0])  # fmt: skip
    assert (tuned / "export/model_index.json").is_file()
    model = initial(base, f"init_from={tuned}", STRONG)
    assert model.info.guidance_embeds and model.info.guidance == 3.0
    weak, strong = answers(model, 1.0, 5.0)
    assert not torch.allclose(weak, strong)
    [told] = answers(initial(base, f"init_from={tuned}", STRONG, "model.embedded_guidance=5"))
    assert torch.equal(told, strong)
    job(tmp_path / "lora", "stage=export", f"init_from={tuned}", "format=[diffusers,lora-original]",
        QUICK[0])  # fmt: skip
