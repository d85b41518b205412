"""Where weights come from, and what they may be used for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from flux2 import runs
from flux2.checkpoint import load_checkpoint, write_checkpoint
from flux2.errors import InputError
from flux2.files import write_json
from flux2.lineage import (
    MANIFEST,
    Init,
    allowed,
    ancestry,
    check_lineage,
    check_same_base,
    describe,
    export_manifest,
    find_init,
    licence_note,
    manifests_of,
    provenance,
    resolve_init,
    result_role,
    rewards_of,
    schedule_hash,
)
from flux2.runs import Run
from flux2.schedule import EmpiricalShift, Linear, StaticShift


@pytest.fixture(autouse=True)
def _let_go():
    yield
    for path in list(runs._held):
        runs.release(path)


def config(path: Path, init_from: object = None, model: str = "nano", **more: Any):
    role = more.pop("role", "base")
    return OmegaConf.create(
        {
            "run": {"dir": str(path), "id": None}, "stage": {"name": "sft"}, "seed": 4,
            "init_from": None if init_from is None else str(init_from),
            "resume": more.pop("resume", None),
            "model": {"name": model, "role": role}, "allow": [], **more,
        }
    )  # fmt: skip


def write(run: Run, step: int, score: float | None = None) -> Path:
    best = None if score is None else ("ocr", score, "max")
    weights = {"model/w": torch.full((2,), float(step))}
    return write_checkpoint(run.checkpoints, step, weights, {}, {}, best=best)


def make(path: Path, init_from: object = None, model: str = "nano", **facts: Any) -> Run:
    """A run with a checkpoint, as a training stage leaves it."""
    run = Run.create(config(path, init_from, model))
    base = {"hash": "0123456789abcdef", **facts.pop("base", {})}
    run.update(base=base, trained=["model"], **facts)
    write(run, 1)
    return run


def export(run: Run, folder: Path, **facts: Any) -> Path:
    """What stage=export leaves, in small."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "model.safetensors").write_bytes(b"weights")
    (folder / "model_index.json").write_text("{}")
    parent = find_init(run.path).parent()
    write_json(folder / "manifest.json", export_manifest(run.manifest, parent, **facts))
    return folder


# ---------------------------------------------------------------- what init_from names


def test_a_run_one_of_its_checkpoints_or_its_best(tmp_path):
    run = Run.create(config(tmp_path / "run"))
    with pytest.raises(InputError, match="neither"):
        resolve_init(run.path)
    one, two, three = (write(run, s, score) for s, score in ((1, 0.2), (2, 0.9), (3, 0.5)))
    newest, named, best = (
        resolve_init(p) for p in (run.path, one, run.checkpoints / "best")
    )
    assert (newest.weights, named.weights, best.weights) == (three, one, two)
    assert newest.run == named.run == best.run == run.path and not newest.is_export
    assert newest.manifest["id"] == run.manifest["id"]
    assert len({init.parent()["hash"] for init in (newest, named, best)}) == 3

    (one / "state.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"state\.pt was altered"):
        resolve_init(one)
    with pytest.raises(InputError, match="is no run"):
        resolve_init(tmp_path)
    other = make(tmp_path / "other")
    with pytest.raises(InputError, match="has a score"):
        resolve_init(other.checkpoints / "best")


def test_a_finished_run_is_its_result_and_never_what_it_turned_down(tmp_path):
    run = make(tmp_path / "run")
    two, three = write(run, 2), write(run, 3)
    run.update(exported={"step": 2, "of": 3, "why": "better"})
    assert resolve_init(run.path).weights == three  # it still runs
    run.update(status="done")
    assert resolve_init(run.path).weights == two
    inside = export(run, run.path / "export")
    shutil.rmtree(two)
    assert resolve_init(run.path).weights == inside
    shutil.rmtree(inside)
    with pytest.raises(InputError, match="neither"):
        resolve_init(run.path)
    run.update(exported={"step": 3, "of": 3, "why": "the last"})
    assert resolve_init(run.path).weights == three


def test_a_folder_with_a_manifest_and_no_weights_is_refused_in_one_line(tmp_path):
    run = make(tmp_path / "run")
    single = tmp_path / "single"  # an export in one file, which init_from does not take
    single.mkdir()
    write_json(single / "manifest.json", export_manifest(run.manifest, None, format="single"))
    with pytest.raises(InputError, match="neither"):
        resolve_init(single)


def test_a_merger_is_gone_on_with_though_it_has_parents(tmp_path):
    run = Run.create(config(tmp_path / "run"))
    run.update(parents=[{"path": "/x", "id": "a", "hash": "b", "weight": 0.5}])
    run.finish("interrupted")
    again = Run.create(config(tmp_path / "run", resume="auto"))
    assert again.manifest["id"] == run.manifest["id"]
    again.finish("done", {"stage": "sft"})
    assert runs.finished(config(tmp_path / "run", resume="auto")) == {"stage": "sft"}


def test_an_export_of_a_run_or_one_that_was_moved_away(tmp_path):
    run = make(tmp_path / "run", result_role="guidance-distilled")
    inside = export(run, run.path / "export")
    moved = shutil.copytree(inside, tmp_path / "moved")
    for path in (inside, moved):
        init = resolve_init(path)
        assert init.is_export and init.weights == path
        assert result_role(init.manifest) == "guidance-distilled"
        assert init.manifest["trained"] == ["model"]
    assert resolve_init(inside).parent()["hash"] == resolve_init(moved).parent()["hash"]

    before = resolve_init(moved).parent()["hash"]
    write_json(moved / "manifest.json", {**init.manifest, "created": "later"})
    assert resolve_init(moved).parent()["hash"] == before
    (moved / "transformer" / "model.safetensors").write_bytes(b"weightz")
    assert resolve_init(moved).parent()["hash"] != before

    (moved / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest\.json: .*model\.path"):
        resolve_init(moved)

    shutil.rmtree(run.checkpoints)  # then the run itself names its export
    for place in ("export", "export/diffusers"):
        if place != "export":
            inside.rename(tmp_path / "aside")
            inside.mkdir()
            (tmp_path / "aside").rename(run.path / place)
        init = resolve_init(run.path)
        assert init.weights == run.path / place and init.manifest["id"] == run.manifest["id"]
        child = make(tmp_path / "child" / place, run.path)
        assert [a.state for a in ancestry(child.path)] == ["unchanged"]


# ---------------------------------------------------------------- ancestors


def chain(tmp_path: Path) -> list[Run]:
    """pretrain ← sft ← grpo."""
    out = [make(tmp_path / "a")]
    for name in "bc":
        out.append(make(tmp_path / name, out[-1].path))
    return out


def test_every_ancestor_is_found_nearest_first(tmp_path):
    a, b, c = chain(tmp_path)
    found = ancestry(c.path)
    assert [x.id for x in found] == [b.manifest["id"], a.manifest["id"]]
    assert [x.path for x in found] == [r.checkpoints / "step_000001" for r in (b, a)]
    assert [x.state for x in found] == ["unchanged"] * 2
    line = describe(c.path)
    assert line is not None and line.index(b.manifest["id"]) < line.index(a.manifest["id"])
    assert ancestry(a.path) == [] and describe(a.path) is None


def test_the_chain_goes_on_through_exports(tmp_path):
    a, b, _ = chain(tmp_path)
    folder = export(b, tmp_path / "exported")
    child = make(tmp_path / "child", folder)
    wanted = [resolve_init(folder).manifest["id"], b.manifest["id"], a.manifest["id"]]
    assert [x.id for x in ancestry(child.path)] == wanted


def test_ancestors_that_changed_or_are_gone_are_told(tmp_path):
    a, b, c = chain(tmp_path)
    weights = {"model/w": torch.zeros(2)}
    write_checkpoint(a.checkpoints, 1, weights, {}, {})  # the same step, other weights
    assert [x.state for x in ancestry(c.path)] == ["unchanged", "changed"]
    assert "changed since" in str(describe(c.path))
    b.update(id="deadbeef")  # another run lies where b was
    assert [x.state for x in ancestry(c.path)] == ["changed"]
    shutil.rmtree(b.path)
    assert [x.state for x in ancestry(c.path)] == ["gone"]
    assert "gone since" in str(describe(c.path))


def test_a_checkpoint_that_was_deleted_breaks_no_chain(tmp_path):
    a, b, c = chain(tmp_path)
    write(b, 2)
    shutil.rmtree(b.checkpoints / "step_000001")
    assert [(x.id, x.state) for x in ancestry(c.path)] == [
        (b.manifest["id"], "gone"), (a.manifest["id"], "unchanged"),
    ]  # fmt: skip


# ---------------------------------------------------------------- refusals


def init_of(run: Run) -> Init:
    return find_init(run.path)


def refused(cfg: Any, init: Init | None, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_lineage(cfg, init, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_distilled_model_is_not_trained_as_a_base(tmp_path):
    cfg = config(tmp_path / "x", model="klein-4b", role="distilled")
    reason = refused(cfg, None)
    assert "grey, blurred images" in reason and "allow=[role]" in reason and "klein-4b" in reason
    check_lineage(cfg, None, accepts=("base", "distilled"))
    cfg.allow = ["role"]
    check_lineage(cfg, None)
    cfg.allow = ["schedule", "base"]
    assert "grey" in refused(cfg, None)
    dev = config(tmp_path / "x", model="dev", role="guidance-distilled")
    assert "undoes its guidance" in refused(dev, None)
    base = config(tmp_path / "x")
    check_lineage(base, None)
    reason = refused(base, None, accepts=("distilled",))
    assert "trains a distilled model and nano is base" in reason


def test_what_a_run_made_counts_and_not_what_it_began_with(tmp_path):
    run = make(tmp_path / "run", result_role="distilled")
    assert run.manifest["model_role"] == "base" and result_role(run.manifest) == "distilled"
    assert "is a distilled model and model.role is base" in refused(
        config(tmp_path / "x", run.path), init_of(run)
    )
    cfg = config(tmp_path / "x", run.path, role="distilled")
    assert "grey, blurred" in refused(cfg, init_of(run))
    check_lineage(cfg, init_of(run), accepts=("distilled",))
    check_lineage(config(tmp_path / "x", run.path, allow=["role"]), init_of(run))


def test_another_schedule_is_refused(tmp_path):
    ours, theirs = schedule_hash(EmpiricalShift()), schedule_hash(StaticShift(3.0))
    run = make(tmp_path / "run", schedule_hash=theirs)
    cfg = config(tmp_path / "x", run.path)
    reason = refused(cfg, init_of(run), schedule_hash=ours)
    assert ours in reason and theirs in reason and "allow=[schedule]" in reason
    check_lineage(cfg, init_of(run), schedule_hash=theirs)
    check_lineage(cfg, init_of(run), schedule_hash=None)
    cfg.allow = ["schedule"]
    check_lineage(cfg, init_of(run), schedule_hash=ours)
    unknown = make(tmp_path / "unknown")
    check_lineage(config(tmp_path / "x", unknown.path), init_of(unknown), schedule_hash=ours)


def test_the_hash_is_of_what_a_schedule_does():
    hashes = {schedule_hash(s) for s in (EmpiricalShift(), Linear(), StaticShift(3.0))}
    assert len(hashes) == 3 and all(len(h) == 12 for h in hashes)
    assert schedule_hash(StaticShift(1.0)) == schedule_hash(Linear())


def test_another_base_model_is_refused(tmp_path):
    run = make(tmp_path / "run", model="klein-4b-base")
    same = config(tmp_path / "x", run.path, model="klein-4b-base")
    check_lineage(same, init_of(run))
    check_lineage(same, init_of(run), base_hash="0123456789abcdef")
    assert "other weights of klein-4b-base" in refused(same, init_of(run), base_hash="f" * 16)
    other = config(tmp_path / "x", run.path, model="klein-9b-base")
    assert "add model=klein-4b-base" in refused(other, init_of(run))
    check_lineage(other, init_of(run), base_hash="0123456789abcdef")  # the same under another name
    other.allow = ["base"]
    check_lineage(other, init_of(run), base_hash="f" * 16)


def test_a_run_is_not_resumed_on_other_base_weights(tmp_path):
    run = make(tmp_path / "run")
    cfg = config(run.path, resume="auto")
    check_same_base(cfg, run.manifest, "0123456789abcdef")
    check_same_base(cfg, run.manifest, "")  # random weights have no hash
    with pytest.raises(InputError, match=r"weights 0123456789abcdef, and they are ffff now"):
        check_same_base(cfg, run.manifest, "ffff")
    cfg.allow = ["base"]
    check_same_base(cfg, run.manifest, "ffff")


def test_the_base_of_the_whole_chain_counts(tmp_path):
    """A run from an export has that as its base; the model under it is still its own."""
    run = make(tmp_path / "run", base={"hash": "a" * 16})
    folder = export(run, tmp_path / "exported")
    child = make(tmp_path / "child", folder, base={"hash": "b" * 16})
    cfg = config(tmp_path / "x", child.path)
    check_lineage(cfg, init_of(child), base_hash="a" * 16)
    check_lineage(cfg, init_of(child), base_hash="b" * 16)
    assert "other weights" in refused(cfg, init_of(child), base_hash="c" * 16)


def test_a_flag_that_is_none_is_refused(tmp_path):
    cfg = config(tmp_path / "x", allow=["roles"])
    with pytest.raises(InputError, match="choose from role, schedule, base"):
        allowed(cfg)
    assert "allow=[roles]" in refused(cfg, None)
    del cfg["allow"]
    assert allowed(cfg) == ()


@pytest.mark.parametrize(
    ("licence", "target", "said"),
    [
        ("FLUX Non-Commercial License", "distill.guidance.Guidance", True),
        ("FLUX Non-Commercial License", "posttrain.sft.FlowMatching", False),
        ("Apache-2.0", "distill.guidance.Guidance", False),
        (None, "distill.guidance.Guidance", False),
    ],
)
def test_distilling_under_dev_s_licence_is_told(licence, target, said):
    cfg = OmegaConf.create(
        {"model": {"name": "dev", "licence": licence}, "method": {"_target_": target}}
    )
    note = licence_note(cfg)
    assert (note is not None) == said
    if note:
        assert "dev" in note and "compete" in note and "\n" not in note


# ---------------------------------------------------------------- manifests


def test_an_export_s_manifest_says_all_that_its_user_must_know(tmp_path):
    run = make(tmp_path / "run", schedule_hash="abc", result_role="distilled")
    folder = export(run, run.path / "export", format="diffusers")
    got = json.loads((folder / "manifest.json").read_text())
    assert got["id"] != run.manifest["id"]
    [parent] = got["parents"]
    assert parent == find_init(run.path).parent()
    for key in ("stage", "model", "model_role", "result_role", "base", "schedule_hash", "seed",
                "versions", "git_commit"):  # fmt: skip
        assert got[key] == run.manifest[key], key
    assert got["format"] == "diffusers" and got["result_role"] == "distilled"


def test_versions_name_what_is_installed(monkeypatch):
    from flux2 import lineage

    monkeypatch.setattr(lineage, "OPTIONAL", ("einops", "no-such-package"))
    versions = provenance()["versions"]
    assert "einops" in versions and "no-such-package" not in versions and "torch" in versions


def test_the_weights_that_are_named_are_the_weights_that_load(tmp_path):
    run = make(tmp_path / "run")
    write(run, 2)
    init = resolve_init(run.path)
    assert float(load_checkpoint(init.weights).weights["model/w"][0]) == 2


def test_rewards_of_a_manifest_that_names_none(tmp_path: Path):
    """An export of a run without rewards says null; an older run says nothing."""
    for name, facts in (("null", {"rewards": None}), ("old", {}), ("two", {"rewards": ["a", "b"]})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / MANIFEST, {"id": name, "parents": [], **facts})
    assert rewards_of(tmp_path / "null") == [] and rewards_of(tmp_path / "old") == []
    assert rewards_of(tmp_path / "two") == ["a", "b"]


def test_what_manifests_say_is_read_without_weights(tmp_path: Path, monkeypatch):
    """An export of a large model takes minutes to hash, and a run asks at its start for its
    ancestors' rewards, and for their base."""
    a = make(tmp_path / "a", rewards=["judge(v=1)"])
    b = make(tmp_path / "b", export(a, tmp_path / "exported"), rewards=["ocr(v=2)"])
    cfg = config(tmp_path / "c", b.path)
    init = init_of(b)

    def hashed(weights: Path) -> str:
        raise AssertionError(f"{weights} was read")

    monkeypatch.setattr("flux2.lineage._hash", hashed)
    assert rewards_of(b.path) == ["ocr(v=2)", "judge(v=1)"]
    assert [m["id"] for m in manifests_of(b.path)][::2] == [b.manifest["id"], a.manifest["id"]]
    check_lineage(cfg, init, base_hash="0123456789abcdef")
    assert "other weights" in refused(cfg, init, base_hash="f" * 16)
    with pytest.raises(AssertionError, match="was read"):
        ancestry(b.path)
