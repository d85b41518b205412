"""Run directories, who holds them, going on with them, and interrupts.

    config.yaml  manifest.json  metrics.jsonl  summary.json  samples/  evaluation/  checkpoints/
    export/      .lock, held by the process that runs

Rank 0 alone writes. Nothing here imports torch, so that wrong input is answered at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from flux2 import distributed
from flux2.checkpoint import latest_checkpoint, steps
from flux2.errors import InputError
from flux2.files import read_json, sync_folder, write_json, write_text
from flux2.lineage import MANIFEST, Init, find_init, now, provenance, same_init

LOCK = ".lock"
_held: dict[Path, int] = {}


# ---------------------------------------------------------------- one process at a time


def hold(path: Path) -> None:
    """Take the run directory `path` for this process, until `release` or the process's end, however
    it ends. Holding it already is no error.

    Raises:
        InputError: another process holds it.
        OSError: the directory cannot be written, or its file system knows no locks.
    """
    path = path.resolve()
    while path not in _held:
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise InputError(
                f"{path} is in use by process {holder}; wait for it, stop it, or choose another "
                "run.dir"
            ) from None
        except OSError:
            os.close(handle)
            raise
        if not _is_at(handle, path / LOCK):
            os.close(handle)  # its holder has just let go, and taken the file away: try again
            continue
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held[path] = handle


def release(path: Path) -> None:
    """Give back what `hold` took; nothing if it is not held."""
    handle = _held.pop(path.resolve(), None)
    if handle is not None:
        (path / LOCK).unlink(missing_ok=True)  # before others can take it
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


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
        return read_json(self.path / MANIFEST)

    def update(self, **facts: Any) -> None:
        """Set fields of the manifest, e.g. schedule_hash="…", result_role="distilled". On ranks
        other than 0 nothing happens."""
        if distributed.is_main():
            write_json(self.path / MANIFEST, {**self.manifest, **facts})

    def finish(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """Set the final status (done | failed | interrupted), write summary.json if given one, and
        let go of the directory. On ranks other than 0 nothing happens."""
        if not distributed.is_main():
            return
        try:
            if summary is not None:
                write_json(self.path / "summary.json", summary)
            self.update(status=status, finished=now())
        except OSError as error:
            if status == "done":
                raise
            # On a full disk this fails as well, and must not hide what the run failed of.
            print(f"{self.path / MANIFEST} does not say {status}: {error}", file=sys.stderr)
        finally:
            release(self.path)

    @staticmethod
    def create(cfg: DictConfig) -> Run:
        """Make cfg.run.dir, or take up the run in it, and write config.yaml and manifest.json.

        cfg.run.dir and cfg.run.id are set to what they became, and cfg.init_from to the very
        weights, so that a resume starts from the same though their run may have gone on. The
        process holds the directory from then on. On ranks other than 0 only run.dir is set.

        Raises:
            InputError: the directory cannot be written, is in use, or holds a run that is not to
                be resumed; or the weights to start from are not there, or are not those of before.
        """
        path = Path(cfg.run.dir).resolve()
        if not distributed.is_main():
            cfg.run.dir = str(path)
            return Run(path)
        fresh = not (path / MANIFEST).exists()
        if fresh and cfg.resume not in (None, "auto"):
            raise InputError(f"resume={cfg.resume} holds no run (no {MANIFEST}); name a run")
        if fresh and cfg.init_from is not None:
            find_init(cfg.init_from)  # refused before anything is made
        made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)
            hold(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            return _take(cfg, path)
        except OSError as error:
            release(path)
            raise _unwritable(path, error) from error
        except BaseException:
            release(path)
            if made:
                with contextlib.suppress(OSError):  # it holds something already
                    path.rmdir()
            raise


def _take(cfg: DictConfig, path: Path) -> Run:
    """Run.create, once the directory is held."""
    old = _resumable(cfg, path)
    if old is not None:
        init = same_init(cfg, path, old["parents"])
    else:
        init = find_init(cfg.init_from) if cfg.init_from is not None else None
    cfg.run.dir = str(path)
    if old is not None:
        cfg.run.id = old["id"]
    elif cfg.run.id is None:
        cfg.run.id = secrets.token_hex(4)
    if init is not None:
        cfg.init_from = str(init.weights)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if old is None:  # what a run measured that failed at once, perhaps of another model
        shutil.rmtree(path / "evaluation", ignore_errors=True)
    for torn in path.glob(".*.tmp"):  # what a killed writer left
        if torn.is_file():
            torn.unlink()
    write_text(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    write_json(path / MANIFEST, _manifest(cfg, init, old))
    return Run(path)


def _manifest(cfg: DictConfig, init: Init | None, old: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "id": cfg.run.id,
        "stage": cfg.stage.name,
        "model": OmegaConf.select(cfg, "model.name"),
        "model_role": OmegaConf.select(cfg, "model.role"),
        "result_role": None,
        "seed": cfg.seed,
        **provenance(),
        "schedule_hash": None,
        "started": now(),
        **({} if old is None else old),
        "parents": [] if init is None else [init.parent()],
        "status": "running",
        "finished": None,
    }


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write the run directory {path}: {error.strerror}; choose another run.dir"
    )


def _resumable(cfg: DictConfig, path: Path) -> dict[str, Any] | None:
    """The manifest of the run in `path` if this run goes on with it; None to start afresh."""
    if not (path / MANIFEST).exists():
        return None
    old = read_json(path / MANIFEST)
    # A run that failed before its first checkpoint has nothing to lose: another may take its place.
    vacant = old["status"] == "failed" and not steps(path / "checkpoints")
    if cfg.resume is not None and old["stage"] == cfg.stage.name:
        return old
    if vacant and cfg.resume in (None, "auto"):
        return None
    if cfg.resume is not None:
        raise InputError(
            f"{path} holds a run of stage={old['stage']}, not {cfg.stage.name}; "
            f"write stage={old['stage']} or choose another run.dir"
        )
    # Its process would hold the directory: it was killed.
    status = "killed" if old["status"] == "running" else old["status"]
    raise InputError(
        f"{path} already holds a run ({status}); "
        "choose another run.dir, or add resume=auto to go on with it"
    )


ASIDE = ("run", "launch", "resume", "logger", "init_from")
"""Keys that may differ between a run and the same run asked for again."""


def finished(cfg: DictConfig) -> dict[str, Any] | None:
    """The summary of the run in cfg.run.dir, if resume=auto finds it done with this very
    configuration and from the same weights: a sweep that is asked for again does only what is
    missing. None where there is something to do."""
    path = Path(cfg.run.dir)
    if cfg.resume != "auto" or not (path / MANIFEST).exists():
        return None
    manifest = read_json(path / MANIFEST)
    if manifest["status"] != "done" or not (path / "summary.json").exists():
        return None
    stored = OmegaConf.load(path / "config.yaml")
    assert isinstance(stored, DictConfig)
    was, asked = (
        {k: v for k, v in OmegaConf.to_container(c, resolve=True).items() if k not in ASIDE}  # type: ignore[union-attr]
        for c in (stored, cfg)
    )
    if was != asked or (stored.init_from is None) != (cfg.init_from is None):
        return None
    if cfg.init_from is not None:  # the run, or the very weights in it; nothing is read from them
        weights = Path(stored.init_from)
        if Path(cfg.init_from).resolve() not in (weights, *weights.parents):
            return None
    return read_json(path / "summary.json")


def resolve_resume(cfg: DictConfig) -> Path | None:
    """The checkpoint to go on from, verified by rank 0; None: start at step 0. Every rank must
    call.

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
        self._since = 0.0
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
            again = signum == self.signum
            if again and time.monotonic() - self._since < 1.0:  # `timeout` tells it twice
                return
            raise Interrupted(signum)
        self.signum, self._since = signum, time.monotonic()
        # print() may be in the middle of itself when a signal arrives; write() cannot be.
        os.write(2, b"\nstopping after this step, with a checkpoint; again to stop at once\n")

    def abort(self) -> NoReturn:
        """Raise Interrupted for the signal that arrived."""
        assert self.signum is not None
        raise Interrupted(self.signum)
