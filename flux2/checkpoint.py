"""Run directories, checkpoints that are whole or absent, lineage, and interrupts.

    run directory    config.yaml  manifest.json  metrics.jsonl  summary.json  samples/  export/
    checkpoint       checkpoints/step_000012/{weights.safetensors, state.pt, meta.json}

Everything is written beside its place, synced and renamed, so a reader, or a run that resumes after
a power cut, sees the old file or the new one and nothing between. Only the functions that move
tensors import torch: a wrong path is refused before the seconds that this takes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from flux2.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, STATE, META = "weights.safetensors", "state.pt", "meta.json"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "hydra-core")
_STEP = re.compile(r"step_(\d{6,})")


# ---------------------------------------------------------------- files


def jsonable(value: Any) -> Any:
    """`value` in JSON's types. NaN and infinities, which JSON lacks, become None.

    Tensors and numpy values become numbers or lists, paths strings. Raises TypeError on the rest.
    """
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "tolist", None)):
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")


def write_text(path: Path, text: str) -> None:
    """Put `text` at `path` in one step: after a crash the old content is there, or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON at `path`, in one step."""
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; restore it or name another run") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; restore it or name another run")
    return value


def _sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: weights by name, the state of everything else, notes."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    meta: dict[str, Any]


def write_checkpoint(
    root: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Write root/step_NNNNNN, whole or not at all.

    Args:
        root: the run's checkpoints folder; made if absent.
        step: updates done.
        weights: tensors of any shape and device. Those that share memory are stored apart.
        state: optimizer, method, counters: dicts, lists, tensors and plain values only, since it is
            read back with weights_only=True. Anything else raises TypeError now, not at the resume.
        meta: JSON-able notes.
        keep: afterwards delete all but the newest `keep` checkpoints; None keeps all.

    Raises:
        ValueError: keep < 1 or step < 0.
    """
    import torch
    from safetensors.torch import save_file

    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step={step} must be at least 0 and keep={keep} at least 1")
    _check_plain(state, "state")
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step_{step:06d}"
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed writer left
    temporary.mkdir()
    try:
        save_file(_unshared(weights), temporary / WEIGHTS)
        torch.save(dict(state), temporary / STATE)
        body = {
            "step": step,
            "meta": jsonable(meta),
            "sha256": {name: _sha256(temporary / name) for name in (WEIGHTS, STATE)},
        }
        for name in (WEIGHTS, STATE):
            _sync_file(temporary / name)
        write_json(temporary / META, {**body, "digest": _digest(body)})
        _remove(final)  # a step that is done again after a resume
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(root)
    if keep is not None:
        # Later ones, should there be any, are damaged (else the run had resumed from them): they
        # must not push out good ones, so they do not count.
        for old in [p for s, p in _steps(root) if s <= step][:-keep]:
            _remove(old)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The newest undamaged checkpoint under `root`; None if there is none.

    Every file is compared with its checksum. A damaged checkpoint is skipped, and a line on stderr
    says so.
    """
    for _, path in reversed(_steps(root)):
        damage = _damage(path)
        if damage is None:
            return path
        print(f"skipped checkpoint {path}: {damage}", file=sys.stderr)
    return None


def load_checkpoint(path: Path, verify: bool = True) -> Checkpoint:
    """Read a checkpoint to the CPU.

    Args:
        path: a folder step_NNNNNN.
        verify: compare checksums first; False right after latest_checkpoint, which did.

    Raises:
        InputError: it is absent or damaged.
    """
    import torch

    damage = _damage(path) if verify else None
    if damage is not None:
        raise InputError(f"cannot load checkpoint {path}: {damage}; name another one")
    body = read_json(path / META)
    weights = read_safetensors(path / WEIGHTS)
    # The checksums hold, so what fails here is a fault of the code, not of the file.
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(path, body["step"], weights, state, body["meta"])


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises InputError if absent or corrupt."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot read weights {path}: {_line(error)}; restore the file or name another"
        ) from error


def _unshared(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors wants them."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return out


def _check_plain(value: Any, where: str) -> None:
    from torch import Tensor

    if type(value) in (dict, OrderedDict):
        for k, v in value.items():
            _check_plain(k, f"a key of {where}")
            _check_plain(v, f"{where}[{k!r}]")
    elif type(value) in (list, tuple):
        for i, v in enumerate(value):
            _check_plain(v, f"{where}[{i}]")
    elif type(value) not in (str, int, float, bool, bytes, type(None)) and not isinstance(
        value, Tensor
    ):
        raise TypeError(f"{where} is a {type(value).__name__}; state holds plain values only")


def _steps(root: Path) -> list[tuple[int, Path]]:
    """Checkpoints under `root` by step, oldest first; temporary folders are none."""
    if not root.is_dir():
        return []
    found = ((_STEP.fullmatch(p.name), p) for p in root.iterdir())
    return sorted((int(m[1]), p) for m, p in found if m)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is."""
    try:
        body = json.loads((path / META).read_text(encoding="utf-8"))
        digest = body.pop("digest")
        if digest != _digest(body) or path.name != f"step_{body['step']:06d}":
            return f"{META} was altered"
        for name, expected in body["sha256"].items():
            if _sha256(path / name) != expected:
                return f"{name} was altered"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{META} cannot be read"
    return None


def _remove(path: Path) -> None:
    """Delete a checkpoint; first its name, so that what is half deleted is not taken for one."""
    if path.exists():
        trash = path.with_name(f".{path.name}.old")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """A run directory. Its facts are in manifest.json, and nowhere else."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json as it is now."""
        return read_json(self.path / "manifest.json")

    def update(self, **facts: Any) -> None:
        """Set fields of the manifest, e.g. schedule_hash="…", model_role="policy"."""
        write_json(self.path / "manifest.json", {**self.manifest, **facts})

    def finish(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """Set the final status (done | failed | interrupted); write summary.json if given one."""
        if summary is not None:
            write_json(self.path / "summary.json", summary)
        self.update(status=status, finished=_now())

    @staticmethod
    def create(cfg: DictConfig) -> Run:
        """Make cfg.run.dir, or take up the run in it, and write config.yaml and manifest.json.

        cfg.run.dir and cfg.run.id are set to what they became.

        Raises:
            InputError: the directory cannot be written, or holds a run that is not to be resumed.
        """
        path = Path(cfg.run.dir).resolve()
        old = _resumable(cfg, path)
        cfg.run.dir = str(path)
        if old is not None:
            cfg.run.id = old["id"]
        elif cfg.run.id is None:
            cfg.run.id = secrets.token_hex(4)
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        init = resolve_init(cfg.init_from) if cfg.init_from is not None else None
        manifest = {
            "id": cfg.run.id,
            "parents": [] if init is None else [init.parent()],
            "stage": cfg.stage.name,
            "model": OmegaConf.select(cfg, "model.name"),
            "model_role": None,
            "seed": cfg.seed,
            "versions": {
                "python": ".".join(map(str, sys.version_info[:3])),
                **{name: metadata.version(name) for name in PACKAGES},
            },
            "git_commit": _git_commit(),
            "schedule_hash": None,
            "started": _now(),
            **({} if old is None else old),
            "status": "running",
            "finished": None,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
            write_json(path / "manifest.json", manifest)
        except OSError as error:
            raise InputError(
                f"cannot write the run directory {path}: {error.strerror}; choose another run.dir"
            ) from error
        return Run(path)


def _resumable(cfg: DictConfig, path: Path) -> dict[str, Any] | None:
    """The manifest of the run in `path` if this run goes on with it; None to start afresh."""
    if not (path / "manifest.json").exists():
        if cfg.resume not in (None, "auto"):
            raise InputError(f"resume={cfg.resume} holds no run (no manifest.json); name a run")
        return None
    old = read_json(path / "manifest.json")
    if cfg.resume is not None:
        if old["stage"] != cfg.stage.name:
            raise InputError(
                f"{path} holds a run of stage={old['stage']}, not {cfg.stage.name}; "
                f"write stage={old['stage']} or choose another run.dir"
            )
        return old
    # A run that failed before its first checkpoint has nothing to lose: it may be run again.
    if old["status"] != "failed" or _steps(path / "checkpoints"):
        raise InputError(
            f"{path} already holds a run ({old['status']}); "
            "choose another run.dir, or add resume=auto to go on with it"
        )
    return None


def resolve_resume(cfg: DictConfig) -> Path | None:
    """The checkpoint to go on from, verified; None: start at step 0.

    `resume=<run directory>` demands one; `resume=auto` takes the one in run.dir if there is any.

    Raises:
        InputError: `resume=<run directory>` without an undamaged checkpoint in it.
    """
    if cfg.resume is None:
        return None
    run = Path(cfg.run.dir if cfg.resume == "auto" else cfg.resume)
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None and cfg.resume != "auto":
        raise InputError(
            f"resume={cfg.resume} has no undamaged checkpoint; start again in another run.dir"
        )
    return checkpoint


@dataclass(frozen=True)
class Init:
    """The weights of an earlier run.

    Attributes:
        run: its directory.
        manifest: its manifest.json.
        weights: a checkpoint folder, or the run's export/ (diffusers' layout).
        is_export: which of the two.
    """

    run: Path
    manifest: Mapping[str, Any]
    weights: Path
    is_export: bool

    def parent(self) -> dict[str, str]:
        """The entry of `parents` in a manifest: where, which run, and the hash of these weights."""
        if self.is_export:
            files = sorted(p for p in self.weights.rglob("*") if p.is_file())
            content = {str(p.relative_to(self.weights)): _sha256(p) for p in files}
        else:
            content = read_json(self.weights / META)["sha256"]
        return {"path": str(self.weights), "id": self.manifest["id"], "hash": _digest(content)}


def resolve_init(path: str | Path) -> Init:
    """The weights that `init_from=` names.

    path: a run (then its newest checkpoint, else its export/), or one of a run's checkpoints.

    Raises:
        InputError: there is no run, or it has no weights that are whole.
    """
    path = Path(path).resolve()
    if _STEP.fullmatch(path.name) and path.parent.name == "checkpoints":
        damage = _damage(path)
        if damage is not None:
            raise InputError(f"init_from={path} is damaged: {damage}; name another checkpoint")
        run, weights = path.parent.parent, path
    elif (path / "manifest.json").is_file():
        run, weights = path, latest_checkpoint(path / "checkpoints")
    else:
        raise InputError(
            f"init_from={path} is no run (no manifest.json there); name a run directory"
        )
    manifest = read_json(run / "manifest.json")
    if weights is not None:
        return Init(run, manifest, weights, is_export=False)
    if (run / "export").is_dir():
        return Init(run, manifest, run / "export", is_export=True)
    raise InputError(f"init_from={path} has neither an undamaged checkpoint nor an export/")


def _now() -> str:
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


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------- interrupts


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived. No Exception, so nothing that catches those swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupt:
    """Lets a loop end at a step's boundary.

        with Interrupt() as stop:
            for step in …:
                …
                if stop.signum:
                    save(step)
                    stop.abort()

    The first SIGINT or SIGTERM sets `signum`; a second one raises Interrupted at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum
        # print() may be in the middle of itself when a signal arrives; write() cannot be.
        os.write(2, b"\nstopping after this step, with a checkpoint; again to stop at once\n")

    def abort(self) -> NoReturn:
        """Raise Interrupted for the signal that arrived."""
        assert self.signum is not None
        raise Interrupted(self.signum)
