"""The ranks of one run: who they are, what they are told, and how they end together.

A launcher of another project (torchrun, accelerate, deepspeed, srun) starts every rank alike. Rank
0 composes the configuration and announces it, the others wait for it. However they were started,
the first rank to fail writes a verdict into the store that torch's rendezvous gives them. It alone
says why; the others find the verdict within a second and end with the same code, even from inside
a collective that would never return.

torch is imported inside the functions, so that a wrong command line is answered before that.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from flux2 import distributed
from flux2.checkpoint import on_main
from flux2.errors import InputError
from flux2.files import read_json
from flux2.runs import Run

PATIENCE = timedelta(minutes=10)
"""How long ranks wait for one to appear, to compose, or to finish after an interrupt."""
SHELLS = 0xFFFFFFF0  # SLURM's step numbers from here on are shells of a batch or interactive job
# Keys of the store.
CONFIG, VERDICT, ENDED, LEAVING, LEFT = "config", "verdict", "ended", "leaving", "left"


Ending = Callable[[BaseException], tuple[int, str]]  # an exception's exit code, and what to say
Say = Callable[[int, str], int]  # prints what to say, and returns the exit code


# ---------------------------------------------------------------- who they are


def started_by_launcher(env: MutableMapping[str, str] = os.environ) -> int | None:
    """The number of ranks that another launcher has started; None: this process is on its own.

    torchrun, accelerate and deepspeed say RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A
    step of srun says the same in SLURM's words, which are translated in `env`; in the shell of an
    sbatch script there is no step, and what runs there is on its own.

    Raises:
        InputError: WORLD_SIZE without the rest.
    """
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    if "WORLD_SIZE" not in env and "SLURM_PROCID" in env and step.isdecimal():
        tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        if tasks > 1 and int(step) < SHELLS:
            _translate(env, tasks, int(step))
    if (size := int(env.get("WORLD_SIZE", "1"))) < 2:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={size} is in the environment, but not {' and '.join(missing)}: "
            "start with torchrun or srun, or unset WORLD_SIZE"
        )
    env.setdefault("LOCAL_RANK", "0")
    return size


def _translate(env: MutableMapping[str, str], tasks: int, step: int) -> None:
    """SLURM's variables of a task in torch's words; an address given by the user stays."""
    hosts = next(
        (env[name] for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
         if env.get(name)), "localhost",
    )  # fmt: skip
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(tasks)
    # A task that was given one GPU of its own sees it as the first.
    bound = len(env.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1
    alone = bound and "SLURM_GPUS_PER_TASK" in env
    env["LOCAL_RANK"] = "0" if alone else env.get("SLURM_LOCALID", "0")
    env.setdefault("MASTER_ADDR", first_host(hosts))
    job = int(env.get("SLURM_JOB_ID", env.get("SLURM_JOBID", "0")))
    # Below the ports that systems hand out by themselves (32768 and up on Linux).
    env.setdefault("MASTER_PORT", str(10000 + (7 * job + step) % 20000))


def first_host(nodes: str) -> str:
    """The first machine of SLURM's list: n[003-005,7],m1 → n003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", first[0]) if first else nodes


def without_local_rank(arguments: list[str]) -> list[str]:
    """The command line without the --local_rank=… that deepspeed puts in."""
    return [a for a in arguments if not re.fullmatch(r"--local[_-]rank=\d+", a)]


def mute(errors: Path | None = None) -> None:
    """Send this process's stdout nowhere, and its stderr to `errors` if given."""
    sys.stdout.flush()
    sys.stderr.flush()
    targets = [(1, os.devnull)] + ([(2, str(errors))] if errors is not None else [])
    for handle, path in targets:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, handle)
        os.close(file)


# ---------------------------------------------------------------- how they end


def settler(cfg: DictConfig) -> Callable[[int], None]:
    """What sets the status of a run that ended with a code, should its rank 0 not have come to it.

    Made before the run begins: a manifest that did not change since belongs to a run that was not
    taken up.
    """
    run = Run(Path(cfg.run.dir).resolve())
    path = run.path / "manifest.json"

    def text() -> str | None:
        return path.read_text(encoding="utf-8") if path.is_file() else None

    before = text()

    def settle(code: int) -> None:
        status = "interrupted" if code > 128 else "failed"
        with contextlib.suppress(OSError, InputError):  # the run's own error matters, not this one
            if text() != before and read_json(path)["status"] not in ("done", status):
                run.finish(status)

    return settle


def end(code: int) -> NoReturn:
    """End at once. The interpreter's own end would wait for threads of a broken process group."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Ranks:
    """The meeting point of a run's ranks. Made by every rank; waits until rank 0's store is there.

    Attributes:
        rank: this one, from 0.
        size: how many there are.

    Raises:
        InputError: rank 0 is not to be found.
    """

    def __init__(self) -> None:
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            store, self.rank, self.size = next(rendezvous("env://", timeout=PATIENCE))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"rank {os.environ['RANK']} finds no rank 0 at {place} (MASTER_ADDR, MASTER_PORT): "
                f"{reason}; start all {os.environ['WORLD_SIZE']} ranks, at a free port"
            ) from error
        # A launcher that restarts its ranks keeps the store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Any = PrefixStore(f"flux2/{attempt}", store)
        self._concluding = threading.Event()
        self._watcher: threading.Thread | None = None
        self._announced = False

    # ------------------------------------------------ the configuration

    def announce(self, cfg: DictConfig | None) -> None:
        """Rank 0: give the others the configuration; None: there is nothing to run."""
        if not self._announced:
            self._announced = True
            text = "" if cfg is None else OmegaConf.to_yaml(resolved(cfg))
            self._store.set(CONFIG, text)

    def receive(self) -> DictConfig | None:
        """The others: what rank 0 announces. Raises InputError where it stays silent."""
        until = time.monotonic() + PATIENCE.total_seconds()
        while not self._store.check([CONFIG]):  # not get(), in which no signal would be heard
            if time.monotonic() > until:
                raise InputError(f"rank 0 has announced nothing for {PATIENCE}: look at its output")
            time.sleep(0.05)
        text = self._store.get(CONFIG).decode()
        return parsed(text) if text else None

    # ------------------------------------------------ the end

    def watch(self, last: Callable[[int], None] | None = None) -> None:
        """End this process when another rank has failed, wherever it is; `last` is told the code
        before that."""
        self._watcher = threading.Thread(target=self._watch, args=(last,), daemon=True)
        self._watcher.start()

    def _watch(self, last: Callable[[int], None] | None) -> None:
        since = None
        while not self._concluding.wait(0.5):
            try:
                code = self.theirs()
            except RuntimeError:  # who keeps the store was killed
                code = 1
                if self.rank == 1:
                    print("error: rank 0 or its launcher is gone", file=sys.stderr)
            else:
                if code == 0:
                    continue
                since = since or time.monotonic()
                waited = time.monotonic() - since
                # Of an interrupt this rank knows as well, and may be writing the checkpoint.
                if code > 128 and waited < PATIENCE.total_seconds():
                    continue
            if self._concluding.wait(1):  # it fails for the same reason, and has come to it
                return
            if last is not None:
                last(code)
            self._leave(code)
            end(code)

    def verdict(self, code: int) -> tuple[int, bool]:
        """(the code with which all end, whether this rank is the first and says why)"""
        if self._watcher is not None:
            self._concluding.set()
            self._watcher.join()
        if code == 0:
            return 0, False
        mine = f"{self.rank} {code}"
        try:
            first = self._store.compare_set(VERDICT, "", mine).decode()
        except RuntimeError:  # then who kept the store has said why
            return code, False
        return int(first.split()[1]), first == mine

    def theirs(self) -> int:
        """The code with which the others end; 0 where none has failed."""
        return int(self._store.get(VERDICT).split()[1]) if self._store.check([VERDICT]) else 0

    def leave(self, code: int) -> None:
        """After the verdict: wait for those that need this rank. Then it may end."""
        if self._watcher is not None:
            self._concluding.set()
            self._watcher.join()
        with contextlib.suppress(RuntimeError):
            if self.rank == 0:
                self.announce(None)
                self._store.set(ENDED, "")
            elif code > 128:  # rank 0 may be writing still, and launchers kill all after the first
                self._until(lambda: self._store.check([ENDED]), PATIENCE.total_seconds())
            self._leave(code)

    def _leave(self, code: int) -> None:
        """Check out. After a rank that failed, launchers end the others: so it sees them out first.
        Rank 0, whose process may keep the store, is the last."""
        seconds = 5.0 if code else 60.0
        with contextlib.suppress(RuntimeError):
            self._store.add(LEAVING, 1)
            if self.rank == 0:
                self._until(lambda: self._store.add(LEFT, 0) >= self.size - 1, seconds)
                return
            if code:
                self._until(lambda: self._store.add(LEAVING, 0) >= self.size, seconds)
            self._store.add(LEFT, 1)

    @staticmethod
    def _until(true: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not true() and time.monotonic() < until:
            time.sleep(0.05)


# ---------------------------------------------------------------- among ranks that are there


def attend(
    command: Callable[[Callable[[DictConfig], int], Say], int],
    job: Callable[[DictConfig], object],
    ending: Ending,
    say: Say,
) -> int:
    """Be one of the ranks that a launcher has started; returns the exit code, or ends with it.

    Args:
        command: rank 0's: compose, call the first argument with the configuration, and the second
            with what went wrong; returns the exit code.
        job: what all do with the configuration.
        ending: an exception's exit code, and what to say.
        say: prints it.
    """
    if os.environ["RANK"] != "0":
        mute()
    ranks: Ranks | None = None
    settle: Callable[[int], None] | None = None

    def perform(cfg: DictConfig) -> int:
        nonlocal settle
        assert ranks is not None
        if ranks.rank == 0:
            settle = settler(cfg)
            ranks.announce(cfg)
        ranks.watch(settle)
        job(cfg)
        return 0

    def speak(code: int, text: str) -> int:
        """The first rank to fail speaks, and all end as it does."""
        with undisturbed():
            code, first = ranks.verdict(code) if ranks is not None else (code, True)
            if settle is not None:
                settle(code)
            return say(code, text if first else "")

    try:
        ranks = Ranks()
        if ranks.rank == 0:
            code = command(perform, speak)
        elif (cfg := ranks.receive()) is not None:
            code = perform(cfg)
        else:  # rank 0 has refused, or had but to show its help
            code = ranks.theirs()
    except BaseException as error:
        code = speak(*ending(error))
    with undisturbed():
        if ranks is not None:
            ranks.leave(code)
        if code:
            end(code)
    return code


def create(cfg: DictConfig) -> Run:
    """Make cfg's run (Run.create), among several ranks on rank 0; all get what it became.

    Raises:
        InputError: what rank 0 refuses, on all ranks; or this rank's configuration differs.
    """
    if not distributed.launched():
        return Run.create(cfg)
    mine = _shared(cfg)

    def made() -> tuple[dict[str, Any], list[str]]:
        run = Run.create(cfg)
        return mine, [str(run.path), cfg.run.id, cfg.init_from]

    theirs, (cfg.run.dir, cfg.run.id, cfg.init_from) = on_main(made)
    if mine != theirs:
        raise InputError(
            f"rank {distributed.rank()} and rank 0 were given different configurations: "
            "write the same command on every node"
        )
    return Run(Path(cfg.run.dir))


def _shared(cfg: DictConfig) -> dict[str, Any]:
    """What must be alike on all nodes: not the time in a run's name, nor the nodes' places."""
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    return {str(k): v for k, v in content.items() if k not in ("run", "launch", "resume")}


def resolved(cfg: DictConfig) -> DictConfig:
    """`cfg` with interpolations replaced by their values. Raises MissingMandatoryValue."""
    out = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    assert isinstance(out, DictConfig)
    return out


def parsed(text: str) -> DictConfig:
    """A configuration from its YAML; unknown keys are errors, as in a composed one."""
    cfg = OmegaConf.create(text)
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    return cfg


@contextlib.contextmanager
def undisturbed():
    """SIGINT and SIGTERM are not heard meanwhile: a few lines that must come to their end."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
