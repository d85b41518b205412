"""`launch.processes=2`: the processes of a run, started through torchrun.

    the command      composes, writes the resolved configuration, waits; has no torch
      └ agent        torchrun, in a session of its own, where a terminal's Ctrl-C does not reach it
          └ workers  one a rank: read the configuration and do the job

torchrun returns 1 whatever its workers returned, kills them 30 s after a signal, and knows nothing
of which of several failures was the first. So signals go from the command straight to the workers,
and each worker leaves a note of how it ended. Each process dies with the one above it, also when
that is killed: a run that is resumed must not meet its own orphans. (On Linux; elsewhere a killed
command leaves the others running.)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flux2.errors import InputError
from flux2.ranks import Ending, Ranks, end, mute, parsed, resolved, settler

AGENT, WORKER = "--agent", "--worker"  # how the script is told which of the three it is
KILLED = 3  # signals after which the command waits no longer
AGAIN = 1.0  # seconds within which a signal is the same one: `timeout` sends to process and group
QUIET = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # a rank's stderr does not explain these


# ---------------------------------------------------------------- before anything is started


def check(cfg: DictConfig, started: int | None = None) -> int:
    """The number of ranks; refuses what cannot be shared among them.

    started: the ranks that another launcher has started; None: this command starts them.

    Raises:
        InputError: with the key that must change.
    """
    launch = cfg.launch
    for key, least in (("processes", 1), ("nodes", 1), ("node_rank", 0), ("threads", 1)):
        if key == "threads" and launch.threads is None:
            continue
        if type(launch[key]) is not int or launch[key] < least:
            raise InputError(f"launch.{key} is {launch[key]}: give a whole number from {least} up")
    size = launch.processes * launch.nodes
    said = f"launch.processes={launch.processes}"
    if launch.nodes > 1:
        said += f" on launch.nodes={launch.nodes}"
    if started is not None:
        if size not in (1, started):
            raise InputError(
                f"{said} asks for {size} ranks, and a launcher has started {started}: write "
                "launch.processes=1 launch.nodes=1 under torchrun, accelerate, deepspeed or srun"
            )
        size, said = started, f"{started} ranks"
    elif launch.nodes > 1:
        if launch.node_rank >= launch.nodes:
            raise InputError(f"launch.node_rank={launch.node_rank}: it goes from 0 to nodes - 1")
        if launch.host is None or type(launch.port) is not int or not 0 < launch.port < 65536:
            raise InputError(
                f"{said} meet at launch.host={launch.host}, launch.port={launch.port}: name the "
                "first machine and a free port of it"
            )
    if size == 1:
        return size
    if OmegaConf.select(cfg, "stage.name") == "pipeline":
        raise InputError(f"{said}: a pipeline is one process: give launch.processes to a link")
    if OmegaConf.select(cfg, "engine.kind") in (None, "none"):
        name = OmegaConf.select(cfg, "engine.name") or "none"
        raise InputError(
            f"{said} with engine={name}, which is one process: choose engine=ddp, zero1, zero2 or "
            "zero3, or one process"
        )
    batch = OmegaConf.select(cfg, "data.batch_size")
    if type(batch) is int and batch % size:
        raise InputError(
            f"{said} and data.batch_size={batch}: every rank takes as many rows, so "
            f"choose a batch_size that {size} divides"
        )
    return size


# ---------------------------------------------------------------- the command


def start(cfg: DictConfig, script: Path) -> tuple[int, str]:
    """Run cfg on launch.processes ranks of this machine; returns the exit code and why.

    The workers' stdout and stderr are this process's, from rank 0 alone.

    Args:
        cfg: composed and checked.
        script: it must call `agent` for AGENT … and `work` for WORKER ….
    """
    cfg = resolved(cfg)
    settle = settler(cfg)
    with tempfile.TemporaryDirectory(prefix="flux2-") as name, signals_received() as received:
        folder = Path(name)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
        command = [sys.executable, str(script), AGENT, str(folder), str(os.getpid())]
        process = subprocess.Popen(
            [*command, *_torchrun(cfg.launch, folder, script)],
            env=_environment(cfg.launch), stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            _pass_on(process, folder, received)
        finally:
            process.kill()  # and with it the workers; where it has ended, nothing
            process.wait()
        code, text = _read(folder, cfg.launch.processes, received)
        if code and cfg.launch.node_rank == 0:
            settle(code)
        return code, text


@contextmanager
def signals_received() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list instead of ending this process."""
    received: list[int] = []
    before: dict[int, float] = {signal.SIGINT: -AGAIN, signal.SIGTERM: -AGAIN}

    def note(signum: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if now - before[signum] >= AGAIN:
            received.append(signum)
            before[signum] = now

    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, note) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)


def _pass_on(process: subprocess.Popen[bytes], folder: Path, received: list[int]) -> None:
    """Wait for the agent; give every worker each signal once. The third one ends all."""
    sent: dict[int, int] = {}
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return
        if not received:
            continue
        notes = _notes(folder)
        if not notes or len(received) >= KILLED:
            return  # there is nothing yet, or no time, for a checkpoint
        for note in notes:
            for signum in received[sent.get(note["pid"], 0) :]:
                if "code" not in note:
                    with suppress(ProcessLookupError):
                        os.kill(note["pid"], signum)
            sent[note["pid"]] = len(received)


def _torchrun(launch: DictConfig, folder: Path, script: Path) -> list[str]:
    """torchrun's arguments. Several machines meet by number, so that rank 0 is on the first."""
    meeting = ["--standalone", "--local-addr", "localhost"]
    if launch.nodes > 1:
        meeting = [
            "--nnodes", str(launch.nodes), "--node-rank", str(launch.node_rank),
            "--master-addr", str(launch.host), "--master-port", str(launch.port),
        ]  # fmt: skip
    return [
        "--nproc-per-node", str(launch.processes), "--max-restarts", "0",
        "--signals-to-handle", "SIGUSR2", "--log-dir", str(folder / "logs"), *meeting,
        str(script), WORKER, str(folder),
    ]  # fmt: skip


def _environment(launch: DictConfig) -> dict[str, str]:
    """The workers' environment: without another launcher's words, with their share of the cores."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith(("PET_", "TORCHELASTIC_"))
    }
    if launch.threads is not None:
        env["OMP_NUM_THREADS"] = str(launch.threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    env.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // launch.processes)))
    return env


def _read(folder: Path, processes: int, received: list[int]) -> tuple[int, str]:
    """(exit code, what to say) from the notes that the workers and the agent left.

    A worker that was killed had no time for a note, and the others' are consequences of it.
    """
    notes = _notes(folder)
    agent = note_at(folder / "agent.json") or {}
    for rank, status in agent.get("exits", {}).items():
        if any(str(note["rank"]) == rank and "code" in note for note in notes):
            continue
        if status < 0 and -status not in (signal.SIGTERM, signal.SIGINT):
            name = signal.Signals(-status).name
            memory = " (out of memory?)" if -status == signal.SIGKILL else ""
            said = "" if -status in QUIET else _last_words(folder, rank)
            return 1, f"{said}error: rank {rank} was killed by {name}{memory}"
        if status > 0:
            said = _last_words(folder, rank)
            return 1, f"{said}error: rank {rank} ended with exit code {status} and said no more"
    failed = [note for note in notes if note.get("code")]
    for note in sorted(failed, key=lambda note: (not note["first"], note["time"])):
        elsewhere = "error: a rank of another node has failed, and says why"
        return note["code"], note["text"] if note["first"] else elsewhere
    if len([note for note in notes if "code" in note]) == processes:
        return 0, ""
    if received:
        return 128 + received[0], "ended without a checkpoint"
    return agent.get("code", 1), agent.get("text", "error: the ranks ended and said no more")


def _last_words(folder: Path, rank: str) -> str:
    """The end of a rank's stderr. Rank 0's has been seen, and has no file."""
    path = folder / f"{rank}.stderr"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return "".join(f"rank {rank}: {line}\n" for line in text.splitlines()[-20:])


# ---------------------------------------------------------------- the agent and the workers


def agent(arguments: list[str]) -> int:
    """torchrun, which leaves a note of the workers' exit codes. Arguments: folder, parent, …"""
    folder, parent, *rest = arguments
    die_with(int(parent))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the workers' own affair; exec gives them back
    import logging

    logging.disable(logging.CRITICAL)  # the command says what is to be said
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # not for the workers
    else:
        os.environ["TORCH_CPP_LOG_LEVEL"] = level
    note: dict[str, Any] = {}
    try:
        torchrun.run(torchrun.parse_args([*rest, str(os.getpid())]))
    except ChildFailedError as error:
        note["exits"] = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except Exception as error:  # the rendezvous: a name, a port, a machine that did not come
        reason = " ".join(str(error).split()) or type(error).__name__
        note = {"code": 2, "text": f"error: cannot start the ranks: {reason[:300]}; see launch.*"}
    write_note(Path(folder, "agent.json"), note)
    return 1 if note else 0


def work(arguments: list[str], job: Callable[[DictConfig], object], ending: Ending) -> int:
    """One rank. Arguments: folder, agent. SIGINT and SIGTERM must raise Interrupted by now."""
    folder, parent = Path(arguments[0]), int(arguments[1])
    die_with(parent)
    rank, ranks = int(os.environ["RANK"]), None
    if rank:
        mute(folder / f"{rank}.stderr")
    path, note = folder / f"{rank}.json", {"rank": rank, "pid": os.getpid()}

    def ended(code: int, text: str = "", first: bool = False) -> None:
        write_note(path, {**note, "code": code, "text": text, "first": first, "time": time.time()})

    code, text = 0, ""
    try:
        write_note(path, note)  # from here on signals are sent
        cfg = parsed((folder / "config.yaml").read_text(encoding="utf-8"))
        ranks = Ranks()
        ranks.watch(ended)
        job(cfg)
    except BaseException as error:
        _deaf()
        code, text = ending(error)
    _deaf()
    first = bool(code)
    if ranks is not None:
        code, first = ranks.verdict(code)
    ended(code, text, first)
    if ranks is not None:
        ranks.leave(code)
    if code:
        end(code)
    return code


def _deaf() -> None:
    """A worker that is writing its note hears no signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def write_note(path: Path, value: object) -> None:
    """Whole or not at all, for a reader that looks at any moment."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def note_at(path: Path) -> dict[str, Any] | None:
    """What `write_note` wrote there; None where there is nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _notes(folder: Path) -> list[dict[str, Any]]:
    """The workers' notes, by rank: with a code once they have ended."""
    found = [note_at(p) for p in folder.glob("*.json") if p.stem.isdecimal()]
    return sorted((note for note in found if note), key=lambda note: note["rank"])
