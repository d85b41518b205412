"""The reward service, `python run.py stage=serve_reward`: scorers over HTTP, for other processes,
machines and environments (rewards/http/protocol.py has the protocol, docs/serving.md the manual).

Each reward has processes of its own, a queue that has an end, and a time-out, so that one that is
slow or hangs stops neither the others nor /health. This process parses, waits and answers; images
are decoded where they are scored. fastapi and uvicorn are imported when the stage runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from flux2 import distributed
from flux2.errors import InputError
from flux2.files import write_json
from rewards.apart import Configured
from rewards.http.lanes import Lane, Pool
from rewards.http.protocol import Answer, Limits, Listing, Refused, Request, token_of, told

if TYPE_CHECKING:
    import fastapi

READING: Final = 32
"""Requests whose bodies are being received at the same time."""
PATIENCE: Final = 60.0
"""Seconds for a body to arrive."""


# ---------------------------------------------------------------- HTTP


@dataclass
class Service:
    """What answers HTTP.

    Attributes:
        lanes: the rewards by name, ready.
        token: that clients must bear; None: nobody is asked.
    """

    lanes: Mapping[str, Lane]
    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    _reading: int = 0

    def app(self) -> fastapi.FastAPI:
        """The ASGI application."""
        from fastapi import FastAPI
        from fastapi.responses import JSONResponse
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        async def refused(_: Any, error: Any) -> JSONResponse:
            headers = {} if error.wait is None else {"Retry-After": str(error.wait)}
            if error.status == 401:
                headers["WWW-Authenticate"] = "Bearer"
            return JSONResponse({"error": error.error}, error.status, headers)

        async def other(_: Any, error: Any) -> JSONResponse:  # no such path, no such method
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)

        async def crashed(_: Any, error: Any) -> JSONResponse:  # uvicorn logs the traceback
            return JSONResponse({"error": f"the server failed: {type(error).__name__}"}, 500)

        # Pages of documentation would tell anybody what is here, and load scripts from elsewhere.
        return FastAPI(
            routes=[
                Route("/health", self._health),
                Route("/v1/rewards", self._rewards),
                Route("/v1/score", self._score, methods=["POST"]),
            ],
            exception_handlers={Refused: refused, HTTPException: other, Exception: crashed},
            docs_url=None, redoc_url=None, openapi_url=None,
        )  # fmt: skip

    async def _health(self, _: fastapi.Request) -> fastapi.Response:
        return _json('{"status": "ok"}')

    async def _rewards(self, request: fastapi.Request) -> fastapi.Response:
        await self._admit(request)
        offers = tuple(lane.offer for lane in self.lanes.values())
        return _json(Listing(rewards=offers, limits=self.limits).model_dump_json())

    async def _score(self, request: fastapi.Request) -> fastapi.Response:
        await self._admit(request)
        asked = await self._read(request)
        if asked.reward not in self.lanes:
            known = ", ".join(self.lanes)
            raise Refused(404, f"no reward {asked.reward!r}: this server has {known}")
        if len(asked.items) > self.limits.items:
            raise Refused(413, f"{len(asked.items)} items: the most is {self.limits.items}")
        lane = self.lanes[asked.reward]
        scored = await lane.score(asked.items, request.is_disconnected)
        answer = Answer(
            values={name: told(values.tolist()) for name, values in scored.values.items()},
            failures=dict(scored.failures),
            seconds=round(scored.seconds, 4),
            engine=lane.about.engine,
        )
        return _json(answer.model_dump_json())

    async def _admit(self, request: fastapi.Request) -> None:
        if self.token is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            await _drain(request)
            raise Refused(401, "this server wants its token: Authorization: Bearer <token>")

    async def _read(self, request: fastapi.Request) -> Request:
        if self._reading >= READING:
            raise Refused(503, "too many requests at once: ask again later", 1)
        self._reading += 1
        try:
            async with asyncio.timeout(PATIENCE):
                body = await _body(request, self.limits.body)
            return await asyncio.to_thread(_parsed, body)
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {PATIENCE:g} s") from None
        except Refused as refused:
            if refused.status == 413:
                await _drain(request)
            raise
        finally:
            self._reading -= 1


def _json(text: str) -> fastapi.Response:
    from fastapi import Response

    return Response(text, media_type="application/json")


async def _body(request: fastapi.Request, most: int) -> bytes:
    """What the client sends, of which no more than `most` bytes are ever kept."""
    from starlette.requests import ClientDisconnect

    too_long = Refused(413, f"the request is longer than {most} bytes: send fewer items")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_long
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise too_long
    except ClientDisconnect:
        raise Refused(400, "the client has left") from None
    return bytes(body)


async def _drain(request: fastapi.Request, seconds: float = 2.0) -> None:
    """Hears a refused client out, for a while: it would take a closed connection for a fault of the
    network and not see the answer."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(seconds):
            async for _ in request.stream():
                pass


def _parsed(body: bytes) -> Request:
    try:
        return Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, f"this is not JSON: {first['msg']}") from None
        where = ".".join(map(str, first["loc"])) or "the request"
        raise Refused(422, f"{where}: {first['msg']}") from None


# ---------------------------------------------------------------- the stage


def serve(cfg: Any) -> dict[str, Any]:
    """stage=serve_reward: answers until a signal comes, and then finishes what runs.

    Raises:
        InputError: no rewards, one that cannot be built, a port that is taken, a token that is not
            in the environment, or fastapi and uvicorn are not installed.
    """
    from omegaconf import OmegaConf

    if distributed.launched():
        raise InputError("stage=serve_reward is one process: start it without a launcher")
    uvicorn = _uvicorn()
    settings: Any = OmegaConf.to_container(cfg.serve, resolve=True)
    configs: Any = OmegaConf.to_container(cfg.rewards, resolve=True) if cfg.get("rewards") else {}
    pools: Any = OmegaConf.to_container(cfg.pools, resolve=True)
    plan = planned(configs, pools, {k: settings[k] for k in ("workers", *_POOL)})
    limits, token = _limits(settings["limits"]), token_of(settings["token"])
    sock = bound(settings["host"], settings["port"])
    address = Path(cfg.run.dir) / "address.json"
    address.unlink(missing_ok=True)  # of a service that was killed
    lanes: dict[str, Lane] = {}
    try:
        for name, pool in plan.items():
            lanes[name] = Lane(name, Configured(configs[name]), pool, limits)
        for lane in lanes.values():
            lane.ready()
        app = Service(lanes, limits, token).app()
        _announce(sock, lanes, settings["host"], token, address)
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, log_level="warning", access_log=False, lifespan="off",
                ws="none", http="h11", loop="asyncio", server_header=False,
                timeout_graceful_shutdown=math.ceil(settings["grace"]),
            )
        )  # fmt: skip
        server.run(sockets=[sock])  # a signal is raised again after it, once all is answered
        return {"stage": "serve_reward", "rewards": list(lanes)}
    finally:
        sock.close()
        address.unlink(missing_ok=True)
        for lane in lanes.values():
            lane.close()


_POOL: Final = ("queue", "timeout", "start_timeout")


def planned(
    configs: Mapping[str, Any], pools: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Pool]:
    """Each reward's pool: what `pools` says of it, else its own `workers`, else the defaults.

    Raises:
        InputError: no rewards, one that names no class, or a pool of no reward.
    """
    if not configs:
        raise InputError("no rewards to serve: add +reward@rewards.ocr=ocr (or another of reward)")
    if unknown := set(pools) - set(configs):
        raise InputError(
            f"pools.{min(unknown)} is of no reward: this server has {', '.join(configs)}"
        )
    out = {}
    for name, config in configs.items():
        if not isinstance(config, Mapping) or not config.get("_target_"):
            raise InputError(f"rewards.{name} names no class: give it a _target_")
        own = {"workers": config["workers"]} if config.get("workers") else {}
        try:
            out[name] = Pool(**{**defaults, **own, **(pools.get(name) or {})})
        except TypeError as error:
            raise InputError(f"pools.{name}: {error}: use workers, {', '.join(_POOL)}") from None
    return out


def _uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed: pip install -e '.[serve]' to serve rewards"
        ) from None
    return uvicorn


def _limits(given: Mapping[str, Any]) -> Limits:
    try:
        return Limits(**given)
    except ValidationError as error:
        raise InputError(f"serve.limits: {error.errors()[0]['msg']}: give numbers from 1") from None


def bound(host: str, port: int) -> socket.socket:
    """A socket at that place, which does not listen yet: the rewards may take minutes to load."""
    if not 0 <= port < 2**16:
        raise InputError(f"serve.port={port} is no port: give 0 to 65535")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(place)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise port_taken(host, port, error) from None
    return sock


def port_taken(host: str, port: int, error: OSError) -> InputError:
    """What to say where a port cannot be had."""
    return InputError(
        f"cannot serve at {host}, port {port}: {error.strerror}: choose another serve.host or "
        "serve.port (0 takes a free one)"
    )


def _announce(
    sock: socket.socket, lanes: Mapping[str, Lane], host: str, token: str | None, address: Path
) -> None:
    """Listens, writes the address and prints what is served where."""
    port = sock.getsockname()[1]
    try:
        sock.listen(128)
    except OSError as error:  # somebody else began to, since
        raise port_taken(host, port, error) from None
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    facts = {"url": url, "host": host, "port": port, "rewards": list(lanes), "token": bool(token)}
    write_json(address, facts)
    for name, lane in lanes.items():
        count = lane.pool.workers
        print(f"{name}: {lane.about.engine}, {count} process{'es' * (count > 1)}")
    print(f"rewards at {url}, {'with' if token else 'without'} a token", flush=True)
    if token is None and not is_loopback(host):
        print(
            f"warning: whoever reaches {host}:{port} can use this service: set serve.token to a "
            "variable of the environment that holds a token",
            flush=True,
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
