"""Where weights come from, and what they may be used for.

A manifest (manifest.json of a run or an export) names its parents: where their weights lie, the id
of the run that made them, and a hash of them. So every ancestor can be found, and recognised. What
must agree between a run and its parent is refused in one line before any weight is loaded, unless a
flag says that it is meant:

    allow=[role]       a distilled model trained as if it were a base, or the other way round
    allow=[schedule]   another noise schedule than the parent's
    allow=[base]       another base model than the parent's, or weights that have changed since
"""

from __future__ import annotations

import hashlib
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flux2.checkpoint import (
    META,
    damage_of,
    find_best,
    find_latest,
    is_checkpoint,
    on_main,
    weights_hash,
)
from flux2.errors import InputError
from flux2.files import digest, read_json, sha256_of

ROLES = ("base", "distilled", "guidance-distilled")
FLAGS = ("role", "schedule", "base")
MANIFEST = "manifest.json"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "hydra-core")
OPTIONAL = ("deepspeed", "bitsandbytes", "torchao")
_HARM = {
    "distilled": "training a distilled klein as a base gives grey, blurred images",
    "guidance-distilled": "training a guidance-distilled model as a base undoes its guidance "
    "(stage=sft target=guided keeps it)",
    "base": "a base needs its own guidance and many steps, which this stage does not give it",
}
_INHERITED = (
    "stage", "model", "model_role", "result_role", "base", "trained", "rewards", "schedule_hash",
    "exported", "embedded_guidance", "policy",
)  # fmt: skip


# ---------------------------------------------------------------- the weights a run starts from


@dataclass(frozen=True)
class Init:
    """The weights of an earlier run, or an export.

    Attributes:
        run: its directory; the export's own where that has a manifest.
        manifest: its manifest.json.
        weights: a checkpoint folder, or an export in diffusers' layout.
        is_export: which of the two.
    """

    run: Path
    manifest: Mapping[str, Any]
    weights: Path
    is_export: bool

    def parent(self) -> dict[str, str]:
        """The entry of `parents` in a manifest: where, which run, and the hash of these weights.
        Reads all of an export."""
        found = _hash(self.weights)
        return {"path": str(self.weights), "id": self.manifest["id"], "hash": found}


def resolve_init(path: str | Path) -> Init:
    """The weights that `init_from=` names, verified by rank 0; every rank must call.

    path: a run (then the checkpoint that is its result, or its newest, else its export/),
        <run>/checkpoints/step_NNNNNN, <run>/checkpoints/best, or an export.

    Raises:
        InputError: there is no run, or it has no weights that are whole.
    """
    return on_main(lambda: find_init(path))


def init_of(cfg: DictConfig) -> Init | None:
    """What cfg.init_from names, verified; None where it names nothing. Every rank must call."""
    return resolve_init(cfg.init_from) if cfg.init_from is not None else None


def find_init(path: str | Path) -> Init:
    """resolve_init for one process alone."""
    path = Path(path).resolve()
    if path.name == "best" and path.parent.name == "checkpoints" and not path.exists():
        weights = find_best(path.parent)
        if weights is None:
            raise InputError(
                f"init_from={path}: no undamaged checkpoint there has a score; name a step"
            )
        return _init(path.parent.parent, weights)
    if is_checkpoint(path):
        damage = damage_of(path)
        if damage is not None:
            raise InputError(f"init_from={path} is damaged: {damage}; name another checkpoint")
        return _init(path.parent.parent, path)
    if (path / "model_index.json").is_file():
        homes = (path, path.parent, path.parent.parent)
        run = next((p for p in homes if (p / MANIFEST).is_file()), None)
        if run is None:
            raise InputError(
                f"init_from={path} has no {MANIFEST}: give a model that no run made as model.path"
            )
        return _init(run, path, is_export=True)
    if not (path / MANIFEST).is_file():
        raise InputError(f"init_from={path} is no run (no {MANIFEST} there); name a run directory")
    if (weights := _result(path)) is not None:
        return _init(path, weights)
    for folder in (path / "export", path / "export" / "diffusers"):
        if (folder / "model_index.json").is_file():
            return _init(path, folder, is_export=True)
    raise InputError(
        f"init_from={path} has neither an undamaged checkpoint nor an export in diffusers' layout"
    )


def _result(run: Path) -> Path | None:
    """The checkpoint that a finished run chose as its result, else the newest; None where it is
    not whole. A later one than the chosen is what the run turned down, and never stands in."""
    manifest = read_json(run / MANIFEST)
    chosen = manifest.get("exported")
    if manifest.get("status") != "done" or not chosen or chosen["step"] == chosen["of"]:
        return find_latest(run / "checkpoints")
    best = run / "checkpoints" / f"step_{chosen['step']:06d}"
    return best if damage_of(best) is None else None


def _init(run: Path, weights: Path, is_export: bool = False) -> Init:
    return Init(run, read_json(run / MANIFEST), weights, is_export)


def _hash(weights: Path) -> str:
    """Of a checkpoint (from its meta.json) or of an export's files, its manifest and card aside."""
    if is_checkpoint(weights):
        return weights_hash(weights)
    aside = {MANIFEST, "README.md"}
    files = sorted(p for p in weights.rglob("*") if p.is_file() and p.name not in aside)
    names = [str(p.relative_to(weights)) for p in files]
    return digest(dict(zip(names, sha256_of(files), strict=True)))


def same_init(cfg: DictConfig, run: Path, recorded: Sequence[Mapping[str, str]]) -> Init | None:
    """The weights that a resumed run started from, though their run may have gone on since.

    recorded: `parents` of the run's manifest.

    Raises:
        InputError: cfg.init_from is another run's, or the weights are gone or have changed, and
            cfg.allow has no `base`.
    """
    # Parents that have weights are those that runs= or lora= names, and not where it began.
    if not recorded or "weight" in recorded[0]:
        if cfg.init_from is None:
            return None
        raise InputError(f"{run} was started from no run; leave out init_from, or another run.dir")
    entry = recorded[0]
    if cfg.init_from is None:
        raise InputError(f"{run} was started from {entry['path']}; add init_from={entry['path']}")
    for path in dict.fromkeys((str(cfg.init_from), entry["path"])):
        try:
            init = find_init(path)
        except InputError:
            continue
        if init.parent()["hash"] == entry["hash"]:
            return init
    if "base" in allowed(cfg):
        return find_init(cfg.init_from)
    raise InputError(
        f"the weights that {run} was started from ({entry['path']}) have changed or are gone; "
        "restore them, or add allow=[base]"
    )


# ---------------------------------------------------------------- what may be done with them


def allowed(cfg: DictConfig) -> tuple[str, ...]:
    """cfg.allow. Raises InputError for a flag that there is not."""
    flags = tuple(OmegaConf.select(cfg, "allow") or ())
    for flag in flags:
        if flag not in FLAGS:
            raise InputError(f"allow=[{flag}] is unknown; choose from {', '.join(FLAGS)}")
    return flags


def result_role(manifest: Mapping[str, Any]) -> str | None:
    """What a run made: base, distilled or guidance-distilled; None if its manifest does not say."""
    return manifest.get("result_role") or manifest.get("model_role")


def inserted(manifest: Mapping[str, Any]) -> bool:
    """Whether a run gave its model the embedder of a second number, which its base lacks."""
    had = (manifest.get("base") or {}).get("guidance_embeds", False)
    return manifest.get("trained") is not None and "embedded_guidance" in manifest and not had


def check_lineage(
    cfg: DictConfig,
    init: Init | None,
    accepts: Sequence[str] = ("base",),
    schedule_hash: str | None = None,
    base_hash: str | None = None,
) -> None:
    """Refuse a model or a parent that does not fit the run. Call before any weight is loaded.

    Args:
        cfg: the run's; model.{role,name} and `allow` count.
        init: what init_from names; None for a model of its own.
        accepts: roles of model that the stage's method is for.
        schedule_hash: of the run's sampler, see `schedule_hash`; None: the run has none, or may
            have another (sampling, evaluation).
        base_hash: of conf/model's weights (ModelInfo.hash), where that is known without loading.

    Raises:
        InputError: with the reason and the flag that allows it.
    """
    flags = allowed(cfg)
    if "role" not in flags:
        _check_role(cfg, init, accepts)
    if init is None:
        return
    theirs = init.manifest.get("schedule_hash")
    if "schedule" not in flags and schedule_hash and theirs and theirs != schedule_hash:
        raise InputError(
            f"init_from={init.weights} was trained on the schedule {theirs} and the sampler's is "
            f"{schedule_hash}: use its sampler.schedule, or add allow=[schedule]"
        )
    if "base" not in flags:
        _check_base(cfg, init, base_hash)


def _check_role(cfg: DictConfig, init: Init | None, accepts: Sequence[str]) -> None:
    role = cfg.model.role
    if init is not None and (made := result_role(init.manifest)) not in (None, role):
        raise InputError(
            f"init_from={init.weights} is a {made} model and model.role is {role}: set model.role "
            "to match, or add allow=[role]"
        )
    if role not in accepts:
        raise InputError(
            f"stage={cfg.stage.name} trains a {' or '.join(accepts)} model and "
            f"{cfg.model.name} is {role}: {_HARM.get(role, 'it is another kind of model')}; "
            "choose another model, or add allow=[role]"
        )


def _check_base(cfg: DictConfig, init: Init, base_hash: str | None) -> None:
    line = manifests_of(init.run)
    hashes = {m["base"]["hash"] for m in line if m.get("base") and m["base"].get("hash")}
    names = {m["model"]: None for m in line if m.get("model")}
    told = " and ".join(names)
    if base_hash and hashes:
        if base_hash not in hashes:
            raise InputError(
                f"init_from={init.weights} was trained on other weights of {told} (hash "
                f"{' or '.join(sorted(hashes))}) than conf/model's (hash {base_hash}): give the "
                "model that it was trained on, or add allow=[base]"
            )
    elif names and cfg.model.name not in names:
        raise InputError(
            f"init_from={init.weights} was trained on {told} and the model is {cfg.model.name}: "
            f"add model={list(names)[-1]}, or allow=[base]"
        )


def check_same_base(cfg: DictConfig, manifest: Mapping[str, Any], found: str) -> None:
    """Refuse to resume a run on other base weights than it began with: an adapter lies on them.

    Args:
        manifest: of the run that is resumed. found: ModelInfo.hash of the model as it is now.

    Raises:
        InputError: they differ, and cfg.allow has no `base`.
    """
    before = (manifest.get("base") or {}).get("hash")
    if before and found and before != found and "base" not in allowed(cfg):
        raise InputError(
            f"the run began on {cfg.model.name} with weights {before}, and they are {found} now: "
            "restore them, or add allow=[base]"
        )


def schedule_hash(schedule: Callable[[int, int], Any]) -> str:
    """12 hex digits of what a flux2.schedule.Schedule does: of its grids at a few numbers of steps
    and tokens. The number of steps is no part of it: a run may be sampled in more or fewer."""
    grids = [schedule(steps, tokens).hash for steps, tokens in ((4, 16), (10, 1024), (50, 4096))]
    return hashlib.blake2b(" ".join(grids).encode(), digest_size=6).hexdigest()


def licence_note(cfg: DictConfig) -> str | None:
    """A line to print where a model is distilled whose licence limits what may be done with the
    result; None where there is nothing to say."""
    target = str(OmegaConf.select(cfg, "method._target_") or "")
    licence = str(OmegaConf.select(cfg, "model.licence") or "")
    if not target.startswith("distill.") or "non-commercial" not in licence.lower():
        return None
    return (
        f"note: {cfg.model.name} is under the {licence}, which forbids training models on its "
        "outputs that compete with it; what is distilled from it stays under that licence"
    )


# ---------------------------------------------------------------- ancestors


@dataclass(frozen=True)
class Ancestor:
    """A parent, or a parent's parent, as its child's manifest names it.

    Attributes:
        path: of the weights. id: of the run that made them. hash: of the weights as they were.
        manifest: of that run, as it is now; None if it is gone.
        state: "unchanged", "changed" (other weights, or another run, lie there now), or "gone".
    """

    path: Path
    id: str
    hash: str
    manifest: Mapping[str, Any] | None
    state: str


def ancestry(run: str | Path) -> list[Ancestor]:
    """All ancestors of a run or an export, nearest first. Reads and hashes all of every export
    among them: `manifests_of` is for those that only ask what they say."""
    return [_ancestor(*found) for found in _walk(run)]


def manifests_of(run: str | Path) -> list[Mapping[str, Any]]:
    """The manifests of a run or an export and of its ancestors, nearest first, as far as they are
    still there. Reads no weights."""
    found = [_manifest(Path(run)), *(manifest for _, manifest, _ in _walk(run))]
    return [m for m in found if m is not None]


def rewards_of(run: str | Path) -> list[str]:
    """What rewards a run and its ancestors were trained on: the scorers' engines."""
    found = [r for m in manifests_of(run) for r in m.get("rewards") or ()]
    return list(dict.fromkeys(found))


def trained_rewards(cfg: DictConfig, run: Path, own: Iterable[str]) -> list[str]:
    """All that a run's weights were trained on: by its ancestors, by the export that it starts
    from, by itself before a resume, and now. It goes into the manifest, so that what comes of the
    run knows it when the ancestors are gone."""
    start = [Path(cfg.model.path)] if cfg.model.path else []
    found = [r for home in (run, *start) for r in rewards_of(home)]
    return list(dict.fromkeys([*found, *own]))


def _walk(
    run: str | Path,
) -> Iterator[tuple[Mapping[str, str], Mapping[str, Any] | None, bool]]:
    """Each ancestor once, nearest first, by the manifests alone: its entry in its child's manifest,
    its own manifest (None: not there), and whether another run lies in its place."""
    todo = list(_parents(_manifest(Path(run))))
    seen: set[tuple[str, str]] = set()
    while todo:
        entry = todo.pop(0)
        if (entry["id"], entry["hash"]) in seen:
            continue
        seen.add((entry["id"], entry["hash"]))
        path = Path(entry["path"])
        homes = [path, path.parent, path.parent.parent][2 if is_checkpoint(path) else 0 :]
        there = [m for home in homes if (m := _manifest(home)) is not None]
        manifest = next((m for m in there if m.get("id") == entry["id"]), None)
        yield entry, manifest, bool(there) and manifest is None
        todo += _parents(manifest)


def _ancestor(
    entry: Mapping[str, str], manifest: Mapping[str, Any] | None, replaced: bool
) -> Ancestor:
    path = Path(entry["path"])
    there = (path / META).is_file() if is_checkpoint(path) else path.is_dir()
    if replaced:
        state = "changed"
    elif manifest is None or not there:
        state = "gone"
    else:
        state = "unchanged" if _hash(path) == entry["hash"] else "changed"
    return Ancestor(path, entry["id"], entry["hash"], manifest, state)


def _manifest(home: Path) -> Mapping[str, Any] | None:
    return read_json(home / MANIFEST) if (home / MANIFEST).is_file() else None


def _parents(manifest: Mapping[str, Any] | None) -> Iterable[Mapping[str, str]]:
    return manifest.get("parents", ()) if manifest is not None else ()


def describe(run: str | Path) -> str | None:
    """A line on where a run comes from; None if it started from no run."""
    parts = []
    for a in ancestry(run):
        stage = "?" if a.manifest is None else a.manifest["stage"]
        note = "" if a.state == "unchanged" else f", {a.state} since"
        parts.append(f"{stage} {a.id} ({a.path}{note})")
    return f"lineage: from {' ← '.join(parts)}" if parts else None


# ---------------------------------------------------------------- manifests


def provenance() -> dict[str, Any]:
    """Versions of what made a run, and the source's commit."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in PACKAGES:
                raise
    return {"versions": versions, "git_commit": _git_commit()}


def export_manifest(
    source: Mapping[str, Any], parent: Mapping[str, str] | None, **facts: Any
) -> dict[str, Any]:
    """manifest.json of an export.

    Args:
        source: the manifest of the run whose weights are exported.
        parent: Init.parent() of those weights; None where they come from no run.
        facts: e.g. format="diffusers", files={…}; they win.
    """
    return {
        "id": secrets.token_hex(4),
        "parents": [] if parent is None else [dict(parent)],
        **{key: source[key] for key in _INHERITED if key in source},
        "seed": source.get("seed"),
        **provenance(),
        "created": now(),
        **facts,
    }


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The source's commit, "-dirty" appended if files differ from it; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
