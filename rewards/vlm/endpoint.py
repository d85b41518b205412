"""A model behind an OpenAI-compatible /v1/chat/completions (vLLM, SGLang), which judges or writes:
many questions at once, and patience with limits.

JSON only; images travel as PNG data URLs, without loss. An item that cannot be answered is an
`Answer` with its failure, and the others neither notice nor wait. Everything runs on one thread of
its own, where each wait can be cut short.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import httpx

from flux2.errors import InputError
from rewards.base import Unavailable
from rewards.http.exchange import retry_after
from rewards.vlm.completion import read_answer, read_text
from rewards.vlm.model import Answer, Picture, Question, Request, Written

log = logging.getLogger(__name__)

T = TypeVar("T")
_Job = tuple[Callable[[], bytes], Callable[[bytes], T]]
"""What makes a request's body, and what reads the answer's."""

LARGEST: Final = 2**24
"""Bytes of an answer. A few hundred tokens with twenty alternatives each are one megabyte."""
AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed."""


class _Failed(Exception):
    """An attempt that gave no answer."""

    def __init__(
        self, reason: str, detail: str, again: bool = False, gone: bool = False, wait: float = 0.0
    ) -> None:
        self.reason, self.detail = reason, detail
        self.again = again  # whether another attempt may succeed
        self.gone = gone  # whether the server looks as if it were not there
        self.wait = wait  # seconds that the server asked for


class _Circuit:
    """Opens after so many failed attempts in succession, by whatever items. While it is open no
    item is tried; `again` lets the next job try, and soon opens again if nothing has changed."""

    def __init__(self, limit: int, probes: int) -> None:
        self._limit, self._probes = limit, probes
        self._failed = 0
        self.open = asyncio.Event()

    def note(self, gone: bool) -> None:
        self._failed = self._failed + 1 if gone else 0
        if self._failed >= self._limit:
            self.open.set()

    def again(self) -> None:
        if self.open.is_set():
            self._failed = max(0, self._limit - self._probes)
            self.open.clear()


class Endpoint:
    """A server that speaks OpenAI's protocol, with log-probabilities.

    Args:
        url: up to and including /v1, as http://127.0.0.1:8000/v1.
        model: the name under which the server knows the model.
        key: name of the environment variable that holds the API key; None: no key is sent.
        concurrency: questions under way at a time.
        connect, read: seconds to wait for a connection, and for the server to say anything more.
        deadline: seconds for all questions of one `submit`, retries included.
        attempts: at each question, after connection errors, time-outs and the statuses AGAIN.
        pause: seconds before the second attempt; doubled each time, up to `longest_pause`, and
            shortened by chance to no less than half, so that retries do not come all at once. A
            server's Retry-After is obeyed.
        give_up_after: failed attempts in succession after which the rest of the job fails at once;
            the next job tries again.
        reason_tokens: of an answer with reasoning.
        alternatives: tokens whose probabilities are asked for; vLLM and OpenAI give at most 20.
        extra: more keys of the request, as {chat_template_kwargs: {enable_thinking: false}}.

    Raises:
        InputError: for bad arguments, a missing key.
        Unavailable: from `ready`, where the server does not answer or does not know the model.
    """

    cost = "remote"
    licence = "the model's own licence, and its provider's terms"
    sees = True

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        concurrency: int = 16,
        connect: float = 5.0,
        read: float = 60.0,
        deadline: float = 300.0,
        attempts: int = 4,
        pause: float = 0.5,
        longest_pause: float = 20.0,
        give_up_after: int = 32,
        reason_tokens: int = 384,
        alternatives: int = 20,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.url, self.model, self.concurrency = _checked_url(url), model, concurrency
        numbers = {"concurrency": concurrency, "attempts": attempts, "connect": connect,
                   "read": read, "deadline": deadline, "give_up_after": give_up_after,
                   "reason_tokens": reason_tokens, "alternatives": alternatives}  # fmt: skip
        for name, value in numbers.items():
            if not value > 0:
                raise InputError(f"endpoint: {name} is {value}: use a number > 0")
        if pause < 0 or longest_pause < pause:
            raise InputError(
                f"endpoint: pause={pause}, longest_pause={longest_pause}: use 0 ≤ pause ≤ "
                "longest_pause"
            )
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        self._key = None
        if key is not None:
            self._key = os.environ.get(key)
            if not self._key:
                raise InputError(f"endpoint: the environment variable {key} is not set")
            self._headers["Authorization"] = f"Bearer {self._key}"
        self.connect, self.read, self.deadline, self.attempts = connect, read, deadline, attempts
        self._pause, self._longest_pause = pause, longest_pause
        self._give_up_after, self._reason_tokens = give_up_after, reason_tokens
        self._alternatives, self._extra = alternatives, dict(extra or {})
        self._told: set[str] = set()
        self._chance = random.Random()  # of pauses only: no score depends on it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def engine(self) -> str:
        """The model's name. What the server has loaded under it cannot be seen from here."""
        return f"vlm:{self.model}".translate(str.maketrans("()", "[]"))

    # ------------------------------------------------------------ the model's protocol

    def ready(self) -> None:
        """Asks the server for its models; raises Unavailable unless ours is among them."""
        why = self._run(self._probe()).result()
        if why is not None:
            raise Unavailable(why)

    def submit(self, questions: Sequence[Question]) -> Future[list[Answer]]:
        """Starts on the questions and returns at once."""
        jobs = [(partial(self._asking, q), partial(read_answer, question=q)) for q in questions]
        return self._run(self._all(jobs, lambda why: Answer(None, why)))

    def result(self, pending: Future[list[Answer]]) -> list[Answer]:
        """Waits for what submit started; answers in order."""
        return pending.result()

    # ------------------------------------------------------------ the writer's protocol

    def write(self, requests: Sequence[Request]) -> Future[list[Written]]:
        """Starts on the requests and returns at once."""
        jobs = [(partial(self._writing, r), read_text) for r in requests]
        return self._run(self._all(jobs, lambda why: Written("", why)))

    def written(self, pending: Future[list[Written]]) -> list[Written]:
        """Waits for what write started; answers in order."""
        return pending.result()

    def close(self) -> None:
        """Cancels what is under way (it fails as "closed") and ends the thread."""
        self._closed = True
        if self._loop is None:
            return
        asyncio.run_coroutine_threadsafe(self._shutdown(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = None

    # ------------------------------------------------------------ its thread

    def _run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise RuntimeError("this endpoint is closed")
        if self._loop is None:
            loop = self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=loop.run_forever, name="endpoint", daemon=True)
            self._thread.start()
            asyncio.run_coroutine_threadsafe(self._start(), loop).result()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _start(self) -> None:
        limits = httpx.Limits(max_connections=self.concurrency)
        timeout = httpx.Timeout(self.read, connect=self.connect)
        self._client = httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout)
        self._free = asyncio.Semaphore(self.concurrency)
        self._circuit = _Circuit(self._give_up_after, self.concurrency)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._jobs: set[asyncio.Task[Any] | None] = set()

    async def _shutdown(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(job for job in self._jobs if job is not None))
        await self._client.aclose()
        await asyncio.get_running_loop().shutdown_default_executor()

    async def _all(self, jobs: Sequence[_Job[T]], failed: Callable[[str], T]) -> list[T]:
        """failed: what stands for a job that has no answer, and why."""
        self._circuit.again()
        until = asyncio.get_running_loop().time() + self.deadline
        tasks = [asyncio.create_task(self._one(*job, failed, until)) for job in jobs]
        self._tasks.update(tasks)
        self._jobs.add(job := asyncio.current_task())
        done = await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.difference_update(tasks)
        self._jobs.discard(job)
        out: list[T] = []
        for answer in done:
            if isinstance(answer, asyncio.CancelledError):
                answer = failed("closed")
            if isinstance(answer, BaseException):
                raise answer
            out.append(answer)
        return out

    # ------------------------------------------------------------ one question

    async def _one(
        self,
        ask: Callable[[], bytes],
        read: Callable[[bytes], T],
        failed: Callable[[str], T],
        until: float,
    ) -> T:
        try:
            async with asyncio.timeout_at(until), self._free:
                if self._circuit.open.is_set():
                    return failed("server gone")
                # Encoding a large image takes a tenth of a second: not on the thread that waits.
                body = await asyncio.to_thread(ask)
                return read(await self._persist(body, until))
        except TimeoutError:
            self._tell("timed out", f"no answer within deadline={self.deadline:g} s")
            return failed("timed out")
        except _Failed as error:
            self._tell(error.reason, error.detail)
            return failed(error.reason)

    async def _persist(self, body: bytes, until: float) -> bytes:
        """The response's body. Raises _Failed."""
        for attempt in range(1, self.attempts + 1):
            try:
                data = await self._post(body)
                self._circuit.note(gone=False)
                return data
            except _Failed as failed:
                self._circuit.note(failed.gone)
                last = failed.detail
                left = until - asyncio.get_running_loop().time()
                chance = self._chance.uniform(0.5, 1)
                pause = min(self._longest_pause, self._pause * 2 ** (attempt - 1)) * chance
                pause = max(pause, failed.wait)
                if not failed.again or attempt == self.attempts or pause > left:
                    raise
            if await self._opens_within(pause):
                raise _Failed("server gone", f"{self._give_up_after} attempts failed: {last}")
        raise AssertionError("unreachable")

    async def _opens_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._circuit.open.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _post(self, body: bytes) -> bytes:
        url = f"{self.url}/chat/completions"
        try:
            async with self._client.stream("POST", url, content=body) as response:
                data = bytearray()
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > LARGEST:
                        raise _Failed("junk", f"an answer of more than {LARGEST} bytes")
        except httpx.TimeoutException as error:
            why = f"{type(error).__name__} after {self.read:g} s"
            raise _Failed("timed out", why, again=True, gone=True) from None
        except httpx.TransportError as error:
            raise _Failed("no connection", self._line(error), again=True, gone=True) from None
        except httpx.HTTPError as error:
            raise _Failed("junk", self._line(error)) from None
        if response.status_code == 200:
            return bytes(data)
        status, said = response.status_code, self._line(data.decode(errors="replace"))
        raise _Failed(
            f"HTTP {status}",
            f"the server says {said}" if said else "without a word",
            again=status in AGAIN,
            gone=status >= 500,
            wait=retry_after(response.headers.get("retry-after")),
        )

    def _asking(self, question: Question) -> bytes:
        # Without reasoning some room still: a space before the digit, what follows after it.
        how = {"temperature": 0, "seed": 0, "logprobs": True, "top_logprobs": self._alternatives,
               "max_tokens": self._reason_tokens if question.reason else 4}  # fmt: skip
        return self._body(question.system, question.parts, how)

    def _writing(self, request: Request) -> bytes:
        how = {"temperature": request.temperature, "seed": request.seed,
               "max_tokens": request.tokens}  # fmt: skip
        return self._body(request.system, request.parts, how)

    def _body(self, system: str, parts: Sequence[str | Picture], how: Mapping[str, Any]) -> bytes:
        content = [
            {"type": "image_url", "image_url": {"url": part.url}}
            if isinstance(part, Picture)
            else {"type": "text", "text": part}
            for part in parts
        ]
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": content},
        ]
        request = {"model": self.model, "messages": messages, **how}
        return json.dumps(request | self._extra).encode()

    # ------------------------------------------------------------ words

    async def _probe(self) -> str | None:
        """Why the server cannot be asked; None: it can."""
        try:
            async with asyncio.timeout(self.connect + self.read):
                response = await self._client.get(f"{self.url}/models")
        except (httpx.HTTPError, TimeoutError) as error:
            return (
                f"no model answers at {self.url} ({self._line(error)}): start it, as with "
                f"`vllm serve {self.model}`, or correct url"
            )
        if response.status_code in (401, 403):
            return (
                f"the model at {self.url} refuses the API key (HTTP {response.status_code}): name "
                "the environment variable that holds it with key="
            )
        try:
            names = [str(entry["id"]) for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return (
                f"{self.url}/models is no list of models (HTTP {response.status_code}): url should "
                "name an OpenAI-compatible server and end in /v1"
            )
        if self.model not in names:
            return f"{self.url} has no model {self.model}: choose from {', '.join(names) or 'none'}"
        return None

    def _tell(self, reason: str, detail: str) -> None:
        if reason not in self._told:  # once each: a thousand items fail alike
            self._told.add(reason)
            log.warning("the model at %s gave no answer (%s): %s", self.url, reason, detail)

    def _line(self, said: object) -> str:
        """One short line without the key, whatever a server echoes."""
        text = str(said) or type(said).__name__
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:200]


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise InputError(
            f"endpoint: url={re.sub(r'//.*@', '//***@', url)!r}: write it as "
            "http://127.0.0.1:8000/v1, and give a key by the name of its environment variable"
        )
    return url.rstrip("/")
