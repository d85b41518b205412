"""Checkpoints are whole or absent, whoever writes them and whatever happens meanwhile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from flux2 import checkpoint
from flux2.checkpoint import find_best, latest_checkpoint, load_checkpoint, steps, write_checkpoint
from flux2.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def write(root: Path, step: int, keep: int | None = None, best=None) -> Path:
    tensors = {
        "a/weight": torch.full((2, 3), float(step)),
        "a/b": torch.arange(4).bfloat16(),
        "optimizer/a/weight/exp_avg": torch.ones(2, 3),
    }
    state = {"updates": {0: torch.ones(2)}, "step": step, "window": [1, (2.5, None)]}
    return write_checkpoint(root, step, tensors, state, {"loss": 0.5}, keep, best)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


# ---------------------------------------------------------------- one process


def test_round_trip(tmp_path):
    path = write(tmp_path, 12)
    assert path == tmp_path / "step_000012"
    assert set(names(path)) == {"weights.safetensors", "state.pt", "meta.json"}
    assert names(tmp_path) == ["step_000012"]  # nothing temporary remains
    got = load_checkpoint(path)
    assert got.step == 12 and got.meta == {"loss": 0.5}
    assert torch.equal(got.tensors["a/weight"], torch.full((2, 3), 12.0))
    half = got.tensors["a/b"]
    assert half.dtype == torch.bfloat16 and half.tolist() == [0, 1, 2, 3]
    assert set(got.tensors) - set(got.weights) == {"optimizer/a/weight/exp_avg"}
    assert torch.equal(got.state["updates"][0], torch.ones(2))
    assert got.state["window"] == [1, (2.5, None)]


def test_meta_holds_the_sha256_of_each_file_and_the_file_of_each_tensor(tmp_path):
    tensors = ((f"t{i}", torch.full((10,), float(i))) for i in range(5))
    path = write_checkpoint(tmp_path, 1, tensors, {}, {}, max_bytes=80)
    stored = json.loads((path / "meta.json").read_text())
    assert len(stored["sha256"]) == 4  # three parts, and state.pt
    assert set(names(path)) == {*stored["sha256"], "meta.json"}
    for name, expected in stored["sha256"].items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == expected
    got = load_checkpoint(path).tensors
    assert [float(got[f"t{i}"].mean()) for i in range(5)] == [0, 1, 2, 3, 4]


def test_the_newest_n_are_kept(tmp_path):
    for step in (1, 2, 3, 1000000):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_000003", "step_1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1000000"


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 4)])
def test_the_best_is_kept_besides(tmp_path, mode, best):
    scores = {1: 0.3, 2: 0.9, 3: 0.9, 4: 0.1, 5: 0.5, 6: float("nan"), 7: 0.4}
    for step, value in scores.items():
        write(tmp_path, step, keep=2, best=("ocr", value, mode))
    assert [s for s, _ in steps(tmp_path)] == [best, 6, 7]
    assert find_best(tmp_path) == tmp_path / f"step_{best:06d}"
    assert json.loads((tmp_path / "step_000006/meta.json").read_text())["score"] is None
    # Another score from now on: what had the best of the old one has no claim any more.
    write(tmp_path, 8, keep=2, best=("fid", 30.0, "min"))
    assert [s for s, _ in steps(tmp_path)] == [7, 8]
    assert find_best(tmp_path) == tmp_path / "step_000008"
    with pytest.raises(ValueError, match="max or min"):
        write(tmp_path, 9, best=("fid", 30.0, "lowest"))


def test_a_damaged_best_gives_way_to_the_next(tmp_path, capsys):
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7)):
        write(tmp_path, step, best=("ocr", value, "max"))
    (tmp_path / "step_000002" / "state.pt").write_bytes(b"torn")
    assert find_best(tmp_path) == tmp_path / "step_000003"
    assert "step_000002: state.pt was altered" in capsys.readouterr().err


def test_damaged_later_checkpoints_do_not_push_out_good_ones(tmp_path):
    write(tmp_path, 10)
    (write(tmp_path, 20) / "state.pt").write_bytes(b"torn")
    write(tmp_path, 12, keep=1)  # resumed from 10
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000012"
    write(tmp_path, 20, keep=1)  # and comes to 20 again
    assert names(tmp_path) == ["step_000020"]
    assert load_checkpoint(tmp_path / "step_000020").step == 20


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_damage_is_found_told_and_skipped(tmp_path, capsys, name, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / name
    content = bytearray(file.read_bytes())
    if damage == "byte":
        place = content.find(b'"step": 2') + 8 if name == "meta.json" else len(content) // 2
        content[place] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    assert latest_checkpoint(tmp_path) == good
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "skipped checkpoint" in err and name in err
    with pytest.raises(InputError, match=name) as caught:
        load_checkpoint(bad)
    assert "\n" not in str(caught.value)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    write(tmp_path, 1).rename(tmp_path / "step_000009")
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("crash", ["replace", "fsync"])
@pytest.mark.parametrize("after", range(7))
def test_an_error_leaves_the_old_checkpoint_and_nothing_half(tmp_path, monkeypatch, crash, after):
    write(tmp_path, 1)
    real, calls = getattr(os, crash), []

    def fail(*arguments):
        if len(calls) >= after:
            raise OSError(errno.EIO, "power cut")
        calls.append(arguments)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, crash, fail)
        try:
            write(tmp_path, 2)
            crashed = False
        except OSError as error:
            crashed = True
            assert "power cut" in str(error) and "\n" not in str(error)
    # renames: weights, meta.json, the folder; syncs: two files, meta.json, three folders
    assert crashed == (after < {"replace": 3, "fsync": 6}[crash])
    for step, path in steps(tmp_path):  # whatever is visible is whole
        assert load_checkpoint(path).step == step
    assert load_checkpoint(tmp_path / "step_000001").step == 1
    assert not [n for n in names(tmp_path) if n.startswith(".")]
    assert load_checkpoint(write(tmp_path, 2)).step == 2  # what was left is no hindrance


def test_what_a_killed_writer_left_is_no_checkpoint_and_is_cleared(tmp_path):
    for name in (".step_000005.tmp", ".step_000002.deleted"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    assert load_checkpoint(write(tmp_path, 5)).step == 5
    assert names(tmp_path) == ["step_000005"]


def test_one_that_was_to_be_replaced_is_still_found(tmp_path):
    """Killed between the two renames of a step that is written again."""
    path = write(tmp_path, 5)
    path.rename(tmp_path / ".step_000005.replaced")
    found = latest_checkpoint(tmp_path)
    assert found is not None and load_checkpoint(found).step == 5
    write(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["step_000005", "step_000006"]


def test_wrong_arguments_are_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"state\['method'\]\[1\] is a float32"):
        write_checkpoint(tmp_path, 1, {}, {"method": [1.0, np.float32(1)]}, {})
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="keep"):
        write(tmp_path, 1, keep=0)
    twice = [("a", torch.ones(1)), ("a", torch.ones(1))]
    with pytest.raises(ValueError, match="named a"):
        write_checkpoint(tmp_path, 1, twice, {}, {})
    assert names(tmp_path) == []


# ---------------------------------------------------------------- a full disk


@pytest.mark.parametrize("limit", [100, 3000, 60_000])
def test_a_disk_that_takes_no_more(tmp_path, limit):
    """With a limit on the size of files, which the system keeps as it keeps a full disk: in the
    first file, in the second, and in state.pt."""
    write(tmp_path, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"a": torch.zeros(500), "b": torch.zeros(10_000), "c": torch.zeros(10)}
    state = {"big": torch.zeros(100_000)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with pytest.raises(OSError) as caught:
            write_checkpoint(tmp_path, 2, tensors, state, {}, keep=1, max_bytes=2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.errno == errno.EFBIG
    assert "cannot write checkpoint" in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == ["step_000001"]
    assert load_checkpoint(tmp_path / "step_000001").step == 1
    write_checkpoint(tmp_path, 2, tensors, state, {}, keep=1, max_bytes=2000)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000002"


# ---------------------------------------------------------------- two ranks

RANK = """
    import json, resource, sys
    from pathlib import Path
    import torch
    from flux2 import distributed
    from flux2.checkpoint import latest_checkpoint, load_checkpoint, write_checkpoint

    out = Path(sys.argv[1])
    distributed.start(torch.device("cpu"))
    rank = distributed.rank()

    def write(root, step, keep=None):
        def share():
            for i in range(6):  # as a sharded engine gathers: all take part
                assert distributed.gather_objects(i) == [i, i]
                if i % 2 == rank:
                    yield f"m/t{i}", torch.full((100,), float(step * 10 + i))
        state = {"who": rank, "step": step}
        write_checkpoint(root, step, share(), state, {"who": rank}, keep, max_bytes=500)

    def full(root):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, old[1]))
        try:
            write(root, 4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    def torn(root):
        if rank == 0:
            (root / "step_000003" / "state.pt").write_bytes(b"torn")
        distributed.barrier()
        load_checkpoint(root / "step_000003")

    cases = {
        "good": lambda root: None,
        "full": full,
        "torn": torn,
        "same": lambda root: write_checkpoint(root, 4, {"x": torch.ones(1)}, {}, {}),
        "state": lambda root: write_checkpoint(root, 4, {}, {"bad": {1}} if rank == 0 else {}, {}),
    }
    said = {}
    for case, attempt in cases.items():
        root, told = out / case, None
        for step in (1, 2, 3):
            write(root, step, keep=2)
        try:
            attempt(root)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        found = latest_checkpoint(root)
        got = load_checkpoint(found, verify=False)
        means = [float(got.tensors[f"m/t{i}"].mean()) for i in range(6)]
        said[case] = [told, found.name, got.state["who"], got.meta["who"], means]
    (out / f"{rank}.json").write_text(json.dumps(said))
    distributed.stop()
"""


def ranks(out: Path) -> list[dict[str, list]]:
    """What two ranks said of each case."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
              "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANK), out],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=120)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], errors
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.dist
def test_two_ranks_write_one_checkpoint_agree_on_it_and_fail_together(tmp_path):
    one, two = ranks(tmp_path)
    for case in ("good", "full", "torn", "same", "state"):
        step, root = 2 if case == "torn" else 3, tmp_path / case
        expected = [f"step_00000{step}", 0, 0, [step * 10.0 + i for i in range(6)]]
        assert one[case][1:] == two[case][1:] == expected, case
        assert names(root) == ["step_000002", "step_000003"]
        files = sorted(p.name for p in (root / "step_000002").glob("*.safetensors"))
        assert files == [f"weights-0000{r}-0000{p}.safetensors" for r in (0, 1) for p in range(3)]
    told = {case: (one[case][0], two[case][0]) for case in one}
    assert told["good"] == (None, None)
    assert told["full"][0] == told["full"][1] and "(rank 1)" in told["full"][0]
    assert told["full"][0].startswith(f"OSError: [Errno {errno.EFBIG}] cannot write checkpoint")
    assert told["torn"][0] == told["torn"][1] and "state.pt was altered" in told["torn"][0]
    assert all("two ranks have a tensor named x" in t for t in told["same"])
    assert all("state['bad'] is a set" in t for t in told["state"])
    assert not any("\n" in t for pair in told.values() for t in pair if t)
    # One process reads what two wrote.
    latest = latest_checkpoint(tmp_path / "good")
    assert latest is not None and len(load_checkpoint(latest).tensors) == 6


def test_before_the_ranks_have_met_each_answers_for_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    write(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000001"
    assert checkpoint.on_main(lambda: 3) == 3
