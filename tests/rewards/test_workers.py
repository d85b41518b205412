"""The pool: order, failures, deaths, time-outs, and that nothing hangs or stays behind."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flux2.errors import InputError
from rewards.workers import Workers

# A module of its own, so that the children can import it however pytest imported this one.
JOBS = """
    import os, signal, sys, time
    from flux2.errors import InputError

    def build(marks=""):
        if marks:
            with open(marks, "a") as f:
                f.write(f"{os.getpid()}\\n")
        return serve

    def serve(item):
        kind, *rest = item
        if kind == "square":
            return rest[0] ** 2
        if kind == "sleep":
            time.sleep(rest[0])
            return rest[0]
        if kind == "raise":
            raise ValueError(rest[0])
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "die once" and not os.path.exists(rest[0]):
            open(rest[0], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "pid":
            return os.getpid()
        if kind == "length":
            return len(rest[0])
        if kind == "environment":
            return os.environ.get("OMP_NUM_THREADS"), "torch" in sys.modules
        return kind

    def refuse(marks):
        with open(marks, "a") as f:
            f.write("x")
        raise InputError("no such program: install it")

    def broken():
        raise OSError("no disk")

    def exits():
        os._exit(3)
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs_for_workers.py").write_text(textwrap.dedent(JOBS))
    sys.path.insert(0, str(folder))
    yield importlib.import_module("jobs_for_workers")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool(jobs: ModuleType) -> Iterator[Workers[Any, Any]]:
    with Workers(jobs.build, 2, timeout=5) as workers:
        yield workers


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def pids_of(workers: Workers[Any, Any], asked: int = 1) -> set[int]:
    pids = workers.map([("pid",)] * asked)
    return {int(pid) for pid in pids if pid is not None}


def alive(pid: int) -> bool:
    """A zombie is not alive."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_results_keep_their_order(jobs: ModuleType, processes: int) -> None:
    with Workers(jobs.build, processes) as workers:
        slow_first = [("sleep", 0.1), *(("square", i) for i in range(20))]
        assert workers.map(slow_first) == [0.1, *(i**2 for i in range(20))]
        assert workers.map([]) == []
        assert not workers.failures


@pytest.mark.parametrize("processes", [0, 1])
def test_an_item_that_raises_is_none_and_counted(
    jobs: ModuleType, processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Workers(jobs.build, processes) as workers:
        got = workers.map([("square", 2), ("raise", "bad"), ("raise", "worse"), ("square", 3)])
        assert got == [4, None, None, 9]
        assert workers.failures == {"ValueError": 2}
    assert [r.getMessage() for r in caplog.records] == ["an item failed (ValueError): bad"]


def test_submit_returns_at_once_and_both_processes_work(pool: Workers[Any, Any]) -> None:
    pool.ready()
    start = time.monotonic()
    job = pool.submit([("sleep", 0.5), ("sleep", 0.5)])
    assert time.monotonic() - start < 0.2
    assert pool.result(job) == [0.5, 0.5]
    assert 0.4 < time.monotonic() - start < 0.9


def test_two_jobs_under_way(pool: Workers[Any, Any]) -> None:
    first, second = pool.submit([("sleep", 0.1)] * 3), pool.submit([("square", 5)])
    assert pool.result(second) == [25]
    assert pool.result(first) == [0.1] * 3


def test_processes_live_on_between_items(pool: Workers[Any, Any]) -> None:
    pids = pids_of(pool, 12)
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids


def test_children_have_one_thread_and_no_torch(
    jobs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with Workers(jobs.build, 1) as workers:
        assert workers.map([("environment",)]) == [("1", False)]
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_process_that_dies_is_replaced_and_its_item_retried_once(
    jobs: ModuleType, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    with Workers(partial(jobs.build, str(marks)), 1) as workers:
        flag = str(tmp_path / "flag")
        assert workers.map([("die once", flag), ("square", 2)]) == ["die once", 4]
        assert not workers.failures
        assert workers.map([("die",), ("square", 3)]) == [None, 9]
        assert workers.failures == {"died": 1}
    # first, after "die once", after each of two deaths
    assert len(set(marks.read_text().split())) == 4


def test_a_process_killed_from_outside_while_idle_costs_nothing(jobs: ModuleType) -> None:
    with Workers(jobs.build, 1) as workers:
        (pid,) = pids_of(workers)
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: not alive(pid))
        assert workers.map([("square", 4)]) == [16]
        assert not workers.failures


def test_an_item_that_hangs_is_given_up_once(jobs: ModuleType) -> None:
    with Workers(jobs.build, 1, timeout=0.3) as workers:
        (pid,) = pids_of(workers)
        assert workers.map([("sleep", 60), ("square", 2)]) == [None, 4]
        assert workers.failures == {"timed out": 1}
        assert not alive(pid)


@pytest.mark.parametrize("size", [10, 4_000_000])  # within and beyond the pipe's buffer
def test_a_stopped_process_does_not_hang_the_parent(jobs: ModuleType, size: int) -> None:
    with Workers(jobs.build, 1, timeout=0.5) as workers:
        (pid,) = pids_of(workers)
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        assert workers.map([("length", b"x" * size)]) == [None]
        assert time.monotonic() - start < 3
        assert workers.failures == {"timed out": 1}
        assert workers.map([("length", b"x" * size)]) == [size]


def test_what_the_user_can_mend_arrives_as_input_error(jobs: ModuleType, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    with Workers(partial(jobs.refuse, str(marks)), 2) as workers:
        with pytest.raises(InputError, match="no such program: install it"):
            workers.ready()
        job = workers.submit([("square", 1)] * 10)
        with pytest.raises(InputError, match="no such program"):
            workers.result(job)
        assert all(isinstance(f.exception(), InputError) for f in job.futures)
    assert len(marks.read_text()) <= 2  # and not a process for each item


def test_input_error_without_processes(jobs: ModuleType, tmp_path: Path) -> None:
    workers = Workers(partial(jobs.refuse, str(tmp_path / "marks")), 0)
    for act in (workers.ready, lambda: workers.submit([("square", 1)])):
        with pytest.raises(InputError, match="no such program"):
            act()


def test_a_build_that_fails_or_dies_is_an_error_and_not_a_failed_item(jobs: ModuleType) -> None:
    for factory, words in ((jobs.broken, "OSError: no disk"), (jobs.exits, "died while starting")):
        with Workers(factory, 1) as workers, pytest.raises(RuntimeError, match=words):
            workers.map([("square", 1)])


def test_close_ends_everything_at_once(jobs: ModuleType) -> None:
    workers = Workers(jobs.build, 2)
    pids = pids_of(workers, 20)
    job = workers.submit([("sleep", 60)] * 6)
    time.sleep(0.2)
    start = time.monotonic()
    workers.close()
    assert time.monotonic() - start < 2
    assert not any(map(alive, pids))
    assert workers.result(job) == [None] * 6
    assert workers.failures == {"closed": 6}
    with pytest.raises(RuntimeError, match="closed"):
        workers.submit([("square", 1)])
    workers.close()


def test_close_while_starting(jobs: ModuleType) -> None:
    start = time.monotonic()
    Workers(jobs.build, 2).close()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("processes", "timeout"), [(-1, 1.0), (1, 0.0)])
def test_bad_arguments(jobs: ModuleType, processes: int, timeout: float) -> None:
    with pytest.raises(InputError, match="workers="):
        Workers(jobs.build, processes, timeout)


def test_a_factory_that_cannot_travel_is_refused_at_once() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        Workers(lambda: abs, 1)


def run_script(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(body))
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, str(folder), *sys.path])
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
    )


def test_no_process_outlives_a_parent_that_was_killed(jobs: ModuleType, tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import os, signal
        import jobs_for_workers as jobs
        from rewards.workers import Workers

        if __name__ == "__main__":
            workers = Workers(jobs.build, 1)
            print(workers.map([("pid",)])[0], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert done.returncode == -signal.SIGKILL
    assert wait_for(lambda: not alive(int(done.stdout)))


def test_a_program_that_forgets_to_close_ends_by_itself(jobs: ModuleType, tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import jobs_for_workers as jobs
        from rewards.workers import Workers

        if __name__ == "__main__":
            workers = Workers(jobs.build, 2)
            print(workers.map([("square", 3)])[0])
        """,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "9", "")


def test_a_program_that_starts_them_while_it_ignores_sigterm_ends_by_itself(
    jobs: ModuleType, tmp_path: Path
) -> None:
    """multiprocessing would send its children a SIGTERM that they ignore, and wait for them."""
    done = run_script(
        tmp_path,
        """
        import signal, time
        import jobs_for_workers as jobs
        from rewards.workers import Workers

        if __name__ == "__main__":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            workers = Workers(jobs.build, 1)
            workers.submit([("square", 3)])
            time.sleep(0.3)  # the child begins, and has not come to its own handlers
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            raise SystemExit(2)
        """,
    )
    assert done.returncode == 2


def test_an_unguarded_script_is_told_so_and_does_not_fork_for_ever(
    jobs: ModuleType, tmp_path: Path
) -> None:
    done = run_script(
        tmp_path,
        """
        import jobs_for_workers as jobs
        from rewards.workers import Workers

        Workers(jobs.build, 1).ready()
        """,
    )
    assert done.returncode == 1
    assert "guard the main script" in done.stderr.splitlines()[-1]


def test_under_hydra(jobs: ModuleType, tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import hydra
        import jobs_for_workers as jobs
        from rewards.workers import Workers

        @hydra.main(version_base=None)
        def main(cfg):
            with Workers(jobs.build, 2) as workers:
                print(workers.map([("square", 3), ("die",), ("raise", "no"), ("square", 4)]))

        if __name__ == "__main__":
            main()
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[9, None, None, 16]"
