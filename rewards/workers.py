"""Processes that each build one function and apply it to items, asynchronously.

An item can fail, hang, or kill its process: it then yields None and is counted, and the others
neither notice nor wait. The children are spawned, so that the parent's threads and CUDA are not
inherited, and import nothing but what the factory needs.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

from flux2.errors import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Factory = Callable[[], Callable[[T], R]]

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Job(Generic[R]):
    """Items under way; hand it to `Workers.result`."""

    futures: tuple[Future[_Outcome], ...]


class _Died(Exception):
    """The child is gone."""


class _TimedOut(Exception):
    """The child did not answer in time."""


def _attempt(function: Callable[[Any], Any], item: Any) -> _Outcome:
    try:
        return _Outcome(function(item))
    except Exception as error:
        return _Outcome(reason=type(error).__name__, detail=str(error))


def _serve(pipe: connection.Connection, factory: bytes) -> None:
    """The child: build once, then answer until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent may have ignored it for a moment
    # The factory comes pickled, because unpickling it imports the libraries that read these.
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        function = pickle.loads(factory)()
    except InputError as error:
        pipe.send(_Outcome(reason="InputError", detail=str(error)))
        return
    except Exception as error:
        pipe.send(_Outcome(reason="build", detail=f"{type(error).__name__}: {error}"))
        return
    pipe.send(_Outcome())
    while True:
        try:
            pipe.send(_attempt(function, pipe.recv()))
        except (EOFError, OSError):  # the parent is gone
            return


class _Child:
    """One process; started when first asked, and again after it was stopped."""

    def __init__(self, factory: bytes, timeout: float, start_timeout: float) -> None:
        self._factory, self._timeout, self._start_timeout = factory, timeout, start_timeout
        self._process: BaseProcess | None = None
        self._pipe: connection.Connection | None = None
        self._ended = False

    def start(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # A child that is stopped reads nothing: without a limit a large item would block for ever.
        with socket.socket(fileno=os.dup(self._pipe.fileno())) as s:
            limit = struct.pack("ll", max(1, int(self._timeout)), 0)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        process = context.Process(target=_serve, args=(theirs, self._factory), daemon=True)
        process.start()
        # At the parent's exit multiprocessing sends SIGTERM and waits: for ever, where the child
        # was started while the parent ignored that signal.
        Finalize(None, process.kill, exitpriority=10)
        theirs.close()
        self._process = process
        if self._ended:  # `end` came too early to see the process
            process.kill()
        try:
            built = self._receive(self._start_timeout)
        except (_Died, _TimedOut) as error:
            self.stop()
            why = "died while starting" if isinstance(error, _Died) else "did not start in time"
            raise RuntimeError(
                f"a worker process {why}: guard the main script with __name__ == '__main__', "
                "look for lack of memory, or set workers=0"
            ) from None
        if built.reason is not None:
            self.stop()
            if built.reason == "InputError":
                raise InputError(built.detail)
            raise RuntimeError(f"a worker process could not build its function: {built.detail}")

    def ask(self, item: Any) -> _Outcome:
        self.start()
        assert self._pipe is not None
        try:
            self._pipe.send(item)
            return self._receive(self._timeout)
        except BlockingIOError:
            self.stop()
            raise _TimedOut from None
        except OSError:
            self.stop()
            raise _Died from None
        except (_Died, _TimedOut):
            self.stop()
            raise

    def _receive(self, timeout: float) -> _Outcome:
        assert self._pipe is not None and self._process is not None
        # The sentinel too: a process forked meanwhile may hold the pipe's other end open.
        ready = connection.wait([self._pipe, self._process.sentinel], timeout)
        if not ready:
            raise _TimedOut
        try:
            if self._pipe.poll():
                return self._pipe.recv()
        except (EOFError, OSError):
            pass
        raise _Died

    def stop(self) -> None:
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is not None:
            process.kill()
            process.join()
        if pipe is not None:
            pipe.close()

    def end(self) -> None:
        """Kills the process for good, from another thread: whoever waits for it sees it die."""
        self._ended = True
        if (process := self._process) is not None:
            process.kill()


class Workers(Generic[T, R]):
    """A pool. `Workers(factory, 2).map(items)` → results in order, None where an item failed.

    Args:
        factory: picklable; called once in each process, returns the function to apply.
        processes: how many; 0 builds and runs in this process, in `submit`, without time-outs.
        timeout: seconds for one item. A process that exceeds it is killed; the item is not retried.
            A process that dies is replaced and its item tried once more.
        start_timeout: seconds for a process to import and build.

    Attributes:
        failures: reason → items; the exception's name, "timed out", "died", or "closed".

    Raises:
        InputError: from `ready` or `result`, where the factory raised it; for a bad argument.
        RuntimeError: from `ready` or `result`, where the function cannot be built.
    """

    def __init__(
        self,
        factory: Factory[T, R],
        processes: int,
        timeout: float = 30.0,
        start_timeout: float = 120.0,
    ) -> None:
        if processes < 0 or timeout <= 0:
            raise InputError(
                f"workers={processes}, timeout={timeout}: use workers ≥ 0 and a timeout > 0 s"
            )
        self.failures: Counter[str] = Counter()
        self._factory = factory
        self._function: Callable[[T], R] | None = None
        self._error: Exception | None = None
        self._closed = False
        self._children: tuple[_Child, ...] = ()
        self._threads: ThreadPoolExecutor | None = None
        if processes:
            payload = pickle.dumps(factory)
            self._children = tuple(
                _Child(payload, timeout, start_timeout) for _ in range(processes)
            )
            self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
            for child in self._children:
                self._idle.put(child)
            # One thread waits for one child; none of them computes.
            self._threads = ThreadPoolExecutor(processes, thread_name_prefix="workers")
            self._started = [
                self._threads.submit(self._with_child, _Child.start) for _ in range(processes)
            ]

    def ready(self) -> None:
        """Waits until every process has built its function; raises where one could not."""
        if self._threads is None:
            self._inline()
        else:
            for future in self._started:
                future.result()

    def submit(self, items: Sequence[T]) -> Job[R]:
        """Starts on the items and returns at once."""
        if self._closed:
            raise RuntimeError("these workers are closed")
        if self._threads is not None:
            return Job(tuple(self._threads.submit(self._run, item) for item in items))
        function = self._inline()
        futures = []
        for item in items:
            done: Future[_Outcome] = Future()
            done.set_result(_attempt(function, item))
            futures.append(done)
        return Job(tuple(futures))

    def result(self, job: Job[R]) -> list[R | None]:
        """Waits for a job: its results in order, None for failures, which are counted here."""
        values: list[R | None] = []
        for future in job.futures:
            cancelled = future.cancelled()
            outcome = _Outcome(reason="closed") if cancelled else future.result()
            if outcome.reason is not None:
                if not self.failures[outcome.reason]:
                    log.warning("an item failed (%s): %s", outcome.reason, outcome.detail)
                self.failures[outcome.reason] += 1
            values.append(outcome.value)
        return values

    def map(self, items: Sequence[T]) -> list[R | None]:
        """`result(submit(items))`."""
        return self.result(self.submit(items))

    def close(self) -> None:
        """Ends the processes. Items not finished fail ("closed")."""
        self._closed = True
        if self._threads is None:
            return
        for child in self._children:
            child.end()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.stop()

    def __enter__(self) -> Workers[T, R]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _inline(self) -> Callable[[T], R]:
        if self._function is None:
            self._function = self._factory()
        return self._function

    def _with_child(self, use: Callable[[_Child], Any]) -> Any:
        child = self._idle.get()
        try:
            return use(child)
        except (InputError, RuntimeError) as error:
            self._error = error  # it cannot be built: every later item would wait for nothing
            raise
        finally:
            self._idle.put(child)

    def _run(self, item: T) -> _Outcome:
        return self._with_child(lambda child: self._ask(child, item))

    def _ask(self, child: _Child, item: T) -> _Outcome:
        for _ in range(2):
            if self._closed:
                return _Outcome(reason="closed")
            if self._error is not None:
                raise self._error
            try:
                return child.ask(item)
            except _TimedOut:
                return _Outcome(reason="timed out", detail="its process was killed")
            except _Died:
                continue
        return _Outcome(reason="died", detail="it ended its process twice")
