"""One HTTP exchange with a reward service, and what its failures mean."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

import httpx

from flux2.errors import InputError

LONGEST: Final = 64 * 2**20
"""Bytes of an answer; what is longer is no answer."""


@dataclass(frozen=True)
class Lost:
    """No answer. final: asking again would not help. wait: seconds that the server asked for."""

    reason: str
    detail: str
    final: bool = False
    wait: float = 0.0


def exchange(
    http: httpx.Client, method: str, url: str, body: bytes | None, timeout: float
) -> bytes | Lost:
    """An answer's body (of status 200), or why there is none."""
    ends = time.monotonic() + timeout
    headers = {"Accept-Encoding": "identity"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    limits = httpx.Timeout(timeout, connect=min(10.0, timeout))
    out = bytearray()
    try:
        with http.stream(method, url, content=body, headers=headers, timeout=limits) as response:
            for piece in response.iter_bytes():
                out += piece
                if len(out) > LONGEST:
                    return Lost("bad answer", f"{url}: it is longer than {LONGEST} bytes")
                if time.monotonic() > ends:  # each piece came in time, but not the whole
                    return Lost("timed out", f"{url}: no whole answer in {timeout:.0f} s")
    except httpx.TimeoutException:
        return Lost("timed out", f"{url}: no answer in {timeout:.0f} s")
    except httpx.HTTPError as error:
        return Lost("unreachable", f"{url}: {str(error) or type(error).__name__}")
    except RuntimeError:
        if not http.is_closed:
            raise
        return Lost("closed", "the reward was closed", final=True)
    return bytes(out) if response.status_code == 200 else _refusal(response, bytes(out), url)


def _refusal(response: httpx.Response, body: bytes, url: str) -> Lost:
    """What a status other than 200 means."""
    status = response.status_code
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        text = response.reason_phrase
    detail = f"{url}: {status} {' '.join(text.split())[:300]}"
    if status in (429, 503):
        return Lost("busy", detail, wait=retry_after(response.headers.get("Retry-After")))
    if status == 504:
        return Lost("timed out", detail, final=True)
    if status >= 500:
        return Lost("server error", detail)
    return Lost(f"refused ({status})", detail, final=True)


def retry_after(said: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 without one."""
    if said is None:
        return 0.0
    try:
        return max(0.0, float(said)) if math.isfinite(float(said)) else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return 0.0


def check_url(url: str) -> None:
    """Refuses what is no URL. Raises InputError."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise InputError(f"reward.url={url!r} is no URL: write http://host:port") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"reward.url={url!r} is no URL: write http://host:port")
