"""Several ranks: started by launch.processes, or by a launcher that is there. Real processes.

The stage is the test's own. Commands that can run beside one another do: starting takes seconds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import run
from flux2 import launch
from flux2.errors import InputError
from flux2.ranks import first_host, settler, started_by_launcher, without_local_rank

ROOT = Path(run.__file__).parent
LIMIT = 180.0  # seconds for a command that takes eight where nothing else runs
STAGE = """
import json, os, pathlib, signal, sys, time
import torch
from flux2 import distributed
from flux2.errors import InputError
from flux2.runs import Interrupt

def main(cfg):
    rank = distributed.rank()
    print(f"rank {rank} of {distributed.size()}", flush=True)
    print(f"rank {rank} murmurs", file=sys.stderr, flush=True)
    if rank == 1:
        print("the last words of a rank", file=sys.stderr, flush=True)
    folder = pathlib.Path(cfg.run.dir)
    (folder / f"pid-{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    return globals()[cfg.do](cfg, rank, folder)

def meet():
    if distributed.size() == 1:
        return 1.0
    x = torch.ones(())
    torch.distributed.all_reduce(x)
    return x.item()

def fine(cfg, rank, folder):
    mine = [rank, cfg.run.dir, cfg.run.id, cfg.stamp, os.environ.get("OMP_NUM_THREADS"),
            distributed.local_rank()]
    return {"sum": meet(), "all": distributed.gather_objects(mine), "seed": cfg.seed}

def refuse(cfg, rank, folder):
    raise InputError("the data has no images; name a folder that has")

def crash(cfg, rank, folder):
    if rank == 1:
        raise RuntimeError("boom")
    meet()

def die(cfg, rank, folder):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    meet()

def abort(cfg, rank, folder):
    if rank == 1:
        os.abort()
    meet()

def stuck(cfg, rank, folder):  # as in a collective of a library that hears nothing
    if rank == 1:
        time.sleep(1)
        raise InputError("rank 1 has no such file; give it one")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(600)

def steps(cfg, rank, folder):
    with Interrupt() as stop:
        for step in range(10_000):
            time.sleep(0.05)
            if rank == 0:
                print("step", step, flush=True)
            if signum := distributed.largest(stop.signum or 0):
                time.sleep(3 if cfg.slow and rank == 0 else 0)  # writes the checkpoint
                (folder / f"checkpoint-{rank}").write_text(str(step))
                stop.signum = signum
                stop.abort()

def sleep(cfg, rank, folder):
    print("asleep", flush=True)
    time.sleep(600)

def deaf(cfg, rank, folder):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    sleep(cfg, rank, folder)
"""
ENTRY = "import run, sys, pathlib; run.CONF = pathlib.Path({conf!r}); sys.exit(run.main())"


@pytest.fixture
def folder(tmp_path: Path):
    """conf/'s shared part with a stage of the test's own, and an entry.py that composes from it."""
    conf = tmp_path / "conf"
    for part in ("logger", "launch"):
        shutil.copytree(ROOT / "conf" / part, conf / part)
    text = (ROOT / "conf" / "config.yaml").read_text().replace("stage: nft", "stage: meet")
    for name in ("stage", "engine", "experiment"):
        (conf / name).mkdir(parents=True)
    (conf / "config.yaml").write_text(text)
    (conf / "stage" / "meet.yaml").write_text(
        "# @package _global_\ndefaults: [{/engine: ddp}]\n"
        "stage: {name: meet, run: tests_launch_stage.main}\ndo: fine\nslow: false\n"
        "stamp: ${now:%H-%M-%S-%f}\nmodel: {name: tiny}\ndata: {batch_size: 4}\n"
    )
    (conf / "engine" / "ddp.yaml").write_text("name: ddp\nkind: ddp\ndevice: cpu\n")
    (conf / "engine" / "none.yaml").write_text("name: none\nkind: none\ndevice: cpu\n")
    (tmp_path / "tests_launch_stage.py").write_text(STAGE)
    (tmp_path / "entry.py").write_text(ENTRY.format(conf=str(conf)))
    return tmp_path


def begin(folder: Path, *arguments: str, by: tuple[str, ...] = (), **env: str):
    """Start entry.py in `folder` with these arguments, alone or `by` a launcher's command."""
    clean = {k: v for k, v in os.environ.items()
             if not k.startswith(("SLURM_", "OMP_", "TORCHELASTIC_", "PET_"))}  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.Popen(
        [sys.executable, *by, str(folder / "entry.py"), *arguments],
        env={**clean, "PYTHONPATH": path, "TMPDIR": str(folder), **env}, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr without rank 0's murmur)"""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    lines = [line for line in err.splitlines() if line and line != "rank 0 murmurs"]
    return process.returncode, out.splitlines(), lines


def until(process: subprocess.Popen[str], line: str) -> None:
    """Read stdout as far as `line`."""
    assert process.stdout is not None
    for said in process.stdout:
        if said.rstrip() == line:
            return
    raise AssertionError(f"ended without a word of {line!r}: {process.communicate()}")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # one that nobody has waited for yet


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


# ---------------------------------------------------------------- what needs no process


def config(**changes: Any):
    base = {
        "launch": OmegaConf.load(ROOT / "conf" / "launch" / "local.yaml"),
        "engine": {"kind": "ddp", "name": "ddp"},
        "data": {"batch_size": 4},
    }
    cfg = OmegaConf.create(base)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("changes", "started", "words"),
    [
        ({"launch__processes": 0}, None, ["launch.processes is 0", "from 1 up"]),
        ({"launch__processes": "two"}, None, ["launch.processes is two"]),
        ({"launch__processes": True}, None, ["launch.processes is True"]),
        ({"launch__threads": 0}, None, ["launch.threads is 0"]),
        ({"launch__processes": 3}, None, ["launch.processes=3 and data.batch_size=4", "3 divides"]),
        ({"launch__processes": 2, "engine__kind": "none", "engine__name": "none"}, None,
         ["engine=none", "choose engine=ddp, zero1"]),
        ({"launch__processes": 2, "engine": None}, None, ["engine=none"]),
        ({"launch__nodes": 2}, None, ["launch.host=None", "launch.port=None"]),
        ({"launch__nodes": 2, "launch__host": "n1", "launch__port": 70000}, None, ["port=70000"]),
        ({"launch__nodes": 2, "launch__node_rank": 2, "launch__host": "a", "launch__port": 1},
         None, ["launch.node_rank=2"]),
        ({"launch__nodes": 3, "launch__processes": 2, "launch__host": "a", "launch__port": 1},
         None, ["launch.processes=2 on launch.nodes=3", "6 divides"]),
        ({"launch__processes": 2}, 4, ["asks for 2 ranks", "has started 4", "launch.processes=1"]),
        ({}, 3, ["3 ranks and data.batch_size=4"]),
        ({"engine__kind": "none", "engine__name": "none"}, 2, ["2 ranks with engine=none"]),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused(changes, started, words):
    with pytest.raises(InputError) as caught:
        launch.check(config(**changes), started)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_can_be_shared_passes():
    assert launch.check(config()) == 1
    assert launch.check(config(engine=None, data=None)) == 1
    assert launch.check(config(launch__processes=2)) == 2
    assert launch.check(config(launch__processes=3, data=None)) == 3
    two = {"launch__nodes": 2, "launch__host": "a", "launch__port": 1}
    assert launch.check(config(launch__processes=2, **two)) == 4
    assert launch.check(config(), 2) == launch.check(config(launch__processes=2), 2) == 2


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n[003-005,7],m1", "n003"), ("gpu7", "gpu7"), ("a,b", "a"), ("r[1-2]n[4,6-9].x", "r1n4.x"),
     ("a-b-[10-12]", "a-b-10"), ("n[7]", "n7")],
)  # fmt: skip
def test_the_first_host_of_slurms_list(nodes, host):
    assert first_host(nodes) == host


SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "3", "SLURM_NODELIST": "x[1-9]", "SLURM_STEP_NODELIST": "n[003-005,7]",
}  # fmt: skip


def test_srun_is_translated():
    env = dict(SLURM)
    assert started_by_launcher(env) == 8
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("5", "8", "1")
    assert env["MASTER_ADDR"] == "n003" and 10000 <= int(env["MASTER_PORT"]) < 30000
    same, other = dict(SLURM, SLURM_PROCID="0"), dict(SLURM, SLURM_STEP_ID="4")
    assert started_by_launcher(same) == started_by_launcher(other) == 8
    assert same["MASTER_PORT"] == env["MASTER_PORT"] != other["MASTER_PORT"]
    given = dict(SLURM, MASTER_ADDR="here", MASTER_PORT="1234")
    assert started_by_launcher(given) == 8
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("here", "1234")


def test_a_task_with_a_gpu_of_its_own_takes_the_first():
    env = dict(SLURM, SLURM_GPUS_PER_TASK="1", CUDA_VISIBLE_DEVICES="3")
    assert started_by_launcher(env) == 8 and env["LOCAL_RANK"] == "0"
    env = dict(SLURM, CUDA_VISIBLE_DEVICES="0,1")
    assert started_by_launcher(env) == 8 and env["LOCAL_RANK"] == "1"


def test_the_shell_of_a_batch_script_is_no_step():
    for change in ({"SLURM_STEP_ID": None}, {"SLURM_STEP_ID": "4294967290"},
                   {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "1"}):  # fmt: skip
        env = {k: v for k, v in (SLURM | change).items() if v is not None}
        assert started_by_launcher(env) is None
        assert "WORLD_SIZE" not in env
    assert started_by_launcher({}) is None
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a",
                "MASTER_PORT": "1"}  # fmt: skip
    assert started_by_launcher(SLURM | torchrun) == 2  # torchrun within a step
    assert started_by_launcher(torchrun | {"WORLD_SIZE": "1"}) is None


def test_a_world_without_an_address_is_refused():
    with pytest.raises(InputError, match=r"WORLD_SIZE=2 .* not RANK and MASTER_PORT"):
        started_by_launcher({"WORLD_SIZE": "2", "MASTER_ADDR": "a"})


def test_deepspeeds_argument_is_left_out():
    assert without_local_rank(["--local_rank=1", "seed=2", "--local-rank=0"]) == ["seed=2"]


@pytest.mark.parametrize(
    ("was", "now", "code", "then"),
    [
        (None, "running", 1, "failed"),
        (None, "running", 143, "interrupted"),
        ("interrupted", "running", 2, "failed"),
        (None, "interrupted", 1, "failed"),  # rank 0 was ended because another had failed
        (None, "done", 1, "done"),
        ("interrupted", "interrupted", 2, "interrupted"),  # refused before it was taken up
        (None, None, 1, None),
    ],
)
def test_a_run_whose_rank_0_came_not_to_it_gets_its_status(tmp_path, was, now, code, then):
    path = tmp_path / "manifest.json"

    def write(status: str | None, time: int) -> None:
        if status is not None:
            path.write_text(json.dumps({"id": "1", "status": status, "time": time}))

    write(was, 0)
    settle = settler(OmegaConf.create({"run": {"dir": str(tmp_path)}}))
    if now != was:
        write(now, 1)
    settle(code)
    assert (read(path)["status"] if path.exists() else None) == then


def test_a_mistake_is_told_before_torch_is_loaded(folder):
    program = ENTRY.format(conf=str(folder / "conf")).replace("sys.exit(run.main())", (
        "code = run.main(); print('torch' in sys.modules, code)"))  # fmt: skip
    (folder / "entry.py").write_text(program)
    for arguments, words in [
        (["launch.processes=3"], "launch.processes=3 and data.batch_size=4"),
        (["launch.processes=2", "engine=none"], "engine=none"),
        (["launch.procesess=2"], "did you mean 'launch.processes'"),
    ]:
        code, out, err = ended(begin(folder, *arguments))
        assert (code, out) == (0, ["False 2"])
        assert len(err) == 1 and words in err[0]
    assert not list(folder.rglob("manifest.json"))


# ---------------------------------------------------------------- launch.processes=2


@pytest.mark.dist
def test_two_processes_do_a_job_and_one_process_does_it_again(folder):
    first = begin(folder, "launch.processes=2", "run.dir=here", "seed=3")
    code, out, err = ended(first)
    assert (code, out, err) == (0, ["rank 0 of 2"], [])  # nothing of rank 1
    summary = read(folder / "here" / "summary.json")
    assert summary["sum"] == 2.0 and summary["seed"] == 3
    zero, one = summary["all"]
    assert (zero[0], one[0]) == (zero[5], one[5]) == (0, 1)
    assert zero[1:5] == one[1:5]  # one directory, one id, composed once
    assert zero[1] == str(folder / "here") and len(zero[2]) == 8
    assert int(zero[4]) == max(1, len(os.sched_getaffinity(0)) // 2)
    manifest = read(folder / "here" / "manifest.json")
    assert (manifest["status"], manifest["id"]) == ("done", zero[2])
    assert not list(folder.glob("flux2-*"))  # the temporary folder has gone

    # The stored configuration, its launch changed; also one from before a key existed.
    stored = OmegaConf.load(folder / "here" / "config.yaml")
    assert stored.launch.pop("node_rank") == 0
    OmegaConf.save(stored, folder / "here" / "config.yaml")
    code, out, err = ended(begin(folder, "resume=here", "launch.processes=1"))
    assert (code, out, err) == (0, ["rank 0 of 1"], [])
    assert read(folder / "here" / "summary.json")["all"][0][3] == zero[3]  # not composed again


@pytest.mark.dist
def test_how_ranks_fail(folder):
    jobs = ("refuse", "crash", "die")
    begun = [begin(folder, "launch.processes=2", f"do={do}", f"run.dir={do}") for do in jobs]
    (refused, _, line), (crashed, _, trace), (died, _, last) = map(ended, begun)
    assert refused == 2
    assert line == ["error: the data has no images; name a folder that has"]
    assert crashed == 1
    assert trace[0].startswith("Traceback") and trace[-1] == "RuntimeError: boom"
    assert sum(x.startswith("Traceback") for x in trace) == 1
    assert died == 1
    assert last == ["error: rank 1 was killed by SIGKILL (out of memory?)"]
    assert [read(folder / do / "manifest.json")["status"] for do in jobs] == ["failed"] * 3


@pytest.mark.dist
def test_a_signal_reaches_the_ranks_and_leaves_them_time(folder):
    process = begin(folder, "launch.processes=2", "do=steps", "slow=true", "run.dir=here")
    until(process, "step 2")
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 143
    assert err[0] == "stopping after this step, with a checkpoint; again to stop at once"
    assert err[1:] == [f"interrupted; to go on: python run.py resume={folder / 'here'}"]
    written = {p.read_text() for p in (folder / "here").glob("checkpoint-*")}
    assert len(list((folder / "here").glob("checkpoint-*"))) == 2 and len(written) == 1
    assert read(folder / "here" / "manifest.json")["status"] == "interrupted"


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system has no such signal")
def test_the_ranks_die_with_a_killed_command(folder):
    process = begin(folder, "launch.processes=2", "do=sleep", "run.dir=here")
    until(process, "asleep")
    while len(list((folder / "here").glob("pid-*"))) < 2:
        time.sleep(0.05)
    pids = {int(n) for p in (folder / "here").glob("pid-*") for n in p.read_text().split()}
    assert len(pids) == 3 and all(map(alive, pids))  # two ranks, one torchrun
    process.kill()
    process.communicate()
    limit = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(alive, pids))


@pytest.mark.dist
@pytest.mark.slow
def test_signals_again_and_early(folder):
    """Outside a loop the first ends the ranks; to deaf ones the third is the last; and before there
    are ranks one is enough."""
    asleep = begin(folder, "launch.processes=2", "do=sleep", "run.dir=asleep")
    until(asleep, "asleep")
    asleep.send_signal(signal.SIGINT)
    code, _, err = ended(asleep)
    assert (code, len(err)) == (130, 1) and "resume=" in err[0]
    deaf = begin(folder, "launch.processes=2", "do=deaf", "run.dir=deaf")
    until(deaf, "asleep")
    for count in range(3):
        assert deaf.poll() is None, count
        deaf.send_signal(signal.SIGTERM)
        deaf.send_signal(signal.SIGTERM)  # at once: the same one, told twice
        time.sleep(1.2)
    code, _, err = ended(deaf)
    assert (code, err) == (143, ["ended without a checkpoint"])
    early = begin(folder, "launch.processes=2", "run.dir=early")
    time.sleep(2)
    early.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, _, err = ended(early)
    assert code == 143 and len(err) == 1 and time.monotonic() - began < 5
    statuses = [read(folder / name / "manifest.json")["status"] for name in ("asleep", "deaf")]
    assert statuses == ["interrupted"] * 2
    assert not (folder / "early" / "manifest.json").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_cannot_hear_ends_with_the_first_to_fail(folder):
    began = time.monotonic()
    stuck = begin(folder, "launch.processes=2", "do=stuck", "run.dir=stuck")
    abort = begin(folder, "launch.processes=2", "do=abort", "run.dir=abort")
    assert ended(stuck)[::2] == (2, ["error: rank 1 has no such file; give it one"])
    code, _, err = ended(abort)
    assert code == 1 and err[-1] == "error: rank 1 was killed by SIGABRT"
    assert "rank 1: the last words of a rank" in err
    assert time.monotonic() - began < 60
    assert read(folder / "stuck" / "manifest.json")["status"] == "failed"


@pytest.mark.dist
@pytest.mark.slow
def test_a_sweep_launches_each_job(folder):
    code, out, err = ended(begin(folder, "-m", "launch.processes=2", "do=fine,refuse", "seed=1,2",
                                 "run.dir=sweep"))  # fmt: skip
    assert code == 2
    assert [line for line in out if line.startswith("rank")] == ["rank 0 of 2"] * 4
    statuses = [read(folder / "sweep" / str(i) / "manifest.json")["status"] for i in range(4)]
    assert statuses == ["done", "done", "failed", "failed"]
    assert sum("has no images" in line for line in err) == 2 and "2 of 4 jobs failed" in err[-1]


@pytest.mark.dist
@pytest.mark.slow
def test_two_nodes(folder):
    """Two commands on this machine; rank 0 is the first one's, and the other is told apart."""
    nodes = ("launch.nodes=2", "launch.host=localhost", f"launch.port={free_port()}")
    zero = begin(folder, *nodes, "run.dir=here", "stamp=1")
    one = begin(folder, *nodes, "launch.node_rank=1", "run.dir=here", "stamp=1")
    assert ended(one) == (0, [], [])
    assert ended(zero) == (0, ["rank 0 of 2"], [])
    assert read(folder / "here" / "summary.json")["sum"] == 2.0
    nodes = (*nodes[:2], f"launch.port={free_port()}", "run.dir=there", "stamp=1")
    zero = begin(folder, *nodes)
    one = begin(folder, *nodes, "launch.node_rank=1", "seed=7")
    assert ended(one)[::2] == (2, [
        "error: rank 1 and rank 0 were given different configurations: write the same command on "
        "every node"])  # fmt: skip
    assert ended(zero)[::2] == (2, ["error: a rank of another node has failed, and says why"])


# ---------------------------------------------------------------- a launcher that is there


def torchrun() -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=localhost",
            f"--master-port={free_port()}")  # fmt: skip


def quiet(err: list[str]) -> list[str]:
    """The errors on stderr, without the launchers' own reports."""
    return [line for line in err if line.startswith("error: ")]


@pytest.mark.dist
def test_under_torchrun_rank_0_composes(folder):
    good = begin(folder, "run.dir=good", by=torchrun())
    wrong = begin(folder, "run.dir=wrong", "sede=1", by=torchrun())
    code, out, err = ended(good)
    assert (code, out, quiet(err)) == (0, ["rank 0 of 2"], [])
    zero, one = read(folder / "good" / "summary.json")["all"]
    assert zero[1:4] == one[1:4] and (zero[0], one[0]) == (0, 1)
    code, out, err = ended(wrong)
    assert (code, out) == (1, [])  # torchrun's own
    assert quiet(err) == ["error: no key 'sede'; did you mean 'seed'?"]
    assert sum("exitcode  : 2" in line for line in err) == 2


def srun(folder: Path, *arguments: str):
    env = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0",
           "SLURM_NODELIST": "localhost", "MASTER_PORT": str(free_port())}  # fmt: skip
    return [begin(folder, *arguments, **env, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
            for i in range(2)]  # fmt: skip


@pytest.mark.dist
def test_under_srun_all_end_with_the_first_to_fail(folder):
    good, wrong = srun(folder, "run.dir=good"), srun(folder, "do=crash", "run.dir=crash")
    (code, out, err), other = map(ended, good)
    assert (code, out, err) == (0, ["rank 0 of 2"], []) and other[:2] == (0, [])
    assert read(folder / "good" / "summary.json")["sum"] == 2.0
    zero, one = map(ended, wrong)
    assert (zero[0], one[0]) == (1, 1)
    assert zero[2] == [] and one[2][-1] == "RuntimeError: boom"
    assert sum(line.startswith("Traceback") for line in one[2]) == 1
    assert read(folder / "crash" / "manifest.json")["status"] == "failed"


@pytest.mark.dist
@pytest.mark.slow
def test_under_srun_without_torchrun_to_help(folder):
    """What an agent would see to otherwise: a stuck rank, an interrupt, a rank 0 that is killed."""
    stuck = [ended(p) for p in srun(folder, "do=stuck", "run.dir=stuck")]
    assert [s[0] for s in stuck] == [2, 2]
    assert quiet(stuck[0][2] + stuck[1][2]) == ["error: rank 1 has no such file; give it one"]
    zero, one = srun(folder, "do=steps", "slow=true", "run.dir=steps")
    until(zero, "step 2")
    one.send_signal(signal.SIGTERM)  # to one alone
    (first, _, said), (second, _, more) = ended(zero), ended(one)
    assert (first, second) == (143, 143)
    assert sum("to go on" in line for line in said + more) == 1
    assert len(list((folder / "steps").glob("checkpoint-*"))) == 2
    assert read(folder / "steps" / "manifest.json")["status"] == "interrupted"
    zero, one = srun(folder, "do=sleep", "run.dir=killed")
    until(zero, "asleep")
    zero.kill()
    zero.communicate()
    assert ended(one)[0] == 1
    shown, swept = srun(folder, "--cfg", "job"), srun(folder, "-m", "seed=1,2")
    zero, one = map(ended, swept)
    assert (zero[0], one[0]) == (2, 2) and quiet(one[2]) == []
    assert len(zero[2]) == 1 and zero[2][0].startswith("error: -m runs several jobs")
    (code, out, err), other = map(ended, shown)
    assert (code, err) == (0, []) and "seed: 0" in out and other == (0, [], [])


@pytest.mark.dist
@pytest.mark.slow
def test_under_accelerate_and_deepspeed(folder):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    accelerate = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
                  "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
                  f"--main_process_port={free_port()}")  # fmt: skip
    deepspeed = ("-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_addr=localhost",
                 f"--master_port={free_port()}")  # fmt: skip
    for name, by in (("accelerate", accelerate), ("deepspeed", deepspeed)):
        process = begin(folder, f"run.dir={name}", by=by, DS_ACCELERATOR="cpu")
        code, out, err = ended(process)
        assert code == 0, "\n".join(err)
        assert out.count("rank 0 of 2") == 1 and "rank 1 of 2" not in out
        assert read(folder / name / "summary.json")["sum"] == 2.0
