"""The client: a local scorer's values bit for bit; NaN, counted and in time, when servers fail."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import rewards.http.client as module
from flux2.errors import InputError
from flux2.types import Batch, Deferred
from rewards.apart import Configured
from rewards.http.client import RemoteReward
from rewards.http.exchange import retry_after
from rewards.http.lanes import Lane, Pool
from rewards.http.protocol import Limits, Request, decode, to_text
from rewards.ocr import OCRReward
from rewards.signs import SignReward
from tests.rewards.hosts import serving, wait_for
from tests.rewards.test_apart import edits, same
from tests.rewards.toys import Toy, make_batch, noise

ROOT = Path(__file__).parents[3]
ENGINE = "Fake 1()"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_PAUSE", 0.02)


# ---------------------------------------------------------------- the real service


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    ocr = {"_target_": "rewards.ocr.OCRReward", "workers": 2}
    signs = {"_target_": "rewards.signs.SignReward"}
    limits = Limits(items=5)
    with ExitStack() as stack:
        lanes = {
            name: stack.enter_context(closing(Lane(name, Configured(config), Pool(), limits)))
            for name, config in {"ocr": ocr, "signs": signs}.items()
        }
        lanes["toy"] = stack.enter_context(closing(Lane("toy", Toy, Pool(), limits)))
        for lane in lanes.values():
            lane.ready()
        yield stack.enter_context(serving(lanes, limits))


def agree(remote: Mapping[str, Tensor], local: Mapping[str, Tensor]) -> None:
    assert list(remote) == list(local)
    for name, values in local.items():
        assert same(remote[name], values), name


def test_signs_and_edits_are_scored_as_here_bit_for_bit(url: str):
    images, batch = edits(14)
    local = SignReward()(images, batch)
    assert any(v.isnan().any() for v in local.values())
    assert not local["preservation"].isnan().all()  # source and mask did arrive
    with RemoteReward(url, "signs", chunk=100) as reward:
        assert isinstance(reward, Deferred)
        agree(reward(images, batch), local)
        assert not reward.failures
        assert reward(noise(0, 64), make_batch(0))["reward"].shape == (0,)


def test_ocr_is_read_as_here_with_its_failures(url: str):
    pixels, batch = edits(3)
    texts = [{k: m[k] for k in ("text", "text_box")} for m in batch.meta]
    texts[1] = {"text": ("BUS",)}
    texts[2]["text"] = ()
    batch = dataclasses.replace(batch, meta=tuple(texts), prompts=("",) * 3)
    with OCRReward(workers=0) as here, RemoteReward(url, "ocr", chunk=2) as reward:
        local = here(pixels, batch)
        agree(reward(pixels, batch), local)
        assert reward.failures == here.failures == {"ValueError": 1, "no target": 1}
        assert reward.engine == here.engine
    assert local["reward"][0] > 0.5 and local["reward"][1:].isnan().all()


def test_it_is_what_the_server_says(url: str):
    with RemoteReward(url, "toy") as reward:
        reward.ready()
        assert reward.engine == "Toy 1(a=1)"
        card = reward.card
    assert (card.low, card.high, card.cost, card.licence, card.needs, card.differentiable) == (
        0.0, 1.0, "remote", "free", ("do",), False
    )  # fmt: skip


def test_batches_are_cut_and_submit_returns_at_once(url: str):
    batch = make_batch(7, {"do": "sleep", "seconds": 0.05})
    with RemoteReward(url, "toy", chunk=3) as reward:
        reward.ready()
        began = time.monotonic()
        pending = reward.submit(noise(7), batch)
        assert time.monotonic() - began < 0.2
        scores = reward.result(pending)
        assert scores["size"].tolist() == [3, 3, 3, 3, 3, 3, 1]
        expected = (noise(7).float().mean((1, 2, 3)) / 7 + batch.ids / 3).float()
        torch.testing.assert_close(scores["reward"], expected)
        assert same(scores["group"], batch.groups.float())
        # The server takes five items.
        reward.chunk = 100
        assert reward(noise(7), make_batch(7))["size"].tolist() == [5] * 5 + [2] * 2
        assert not reward.failures


def test_infinities_nan_and_failures_arrive(url: str):
    metas = ({"do": "infinite", "sign": -1}, {"do": "fail"}, {"do": "infinite", "sign": 1}, {})
    batch = dataclasses.replace(make_batch(4), meta=metas)
    with RemoteReward(url, "toy") as reward:
        scores = reward(noise(4), batch)["reward"]
        assert scores[0] == -float("inf") and scores[1].isnan() and scores[2] == float("inf")
        assert scores[3].isfinite() and reward.failures == {"no target": 1}


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({"box": np.zeros(4)}, "'box' is ndarray"),
        ({"a": {"b": [1, torch.zeros(1)]}}, r"'a\.b\[1\]' is Tensor"),
        ({"when": {1: 2}}, "'when' is dict"),
        ({"score": float("nan")}, "'score' is nan"),
        ({"mask": np.zeros((4, 4))}, "'mask' must be h w bool .*float64"),
        ({"source": np.zeros((4, 4, 4), np.uint8)}, "'source' must be h w 3 uint8"),
        ({"references": (np.zeros((4, 4), np.uint8),)}, "'references' must be images"),
    ],
)
def test_meta_that_json_cannot_say_is_refused_by_name(url: str, meta: Any, told: str):
    with RemoteReward(url, "toy") as reward, pytest.raises(InputError, match=told):
        reward.submit(noise(1), make_batch(1, meta))


def test_a_scorers_refusal_is_masked_and_told(url: str, caplog: pytest.LogCaptureFixture):
    with RemoteReward(url, "signs") as reward:
        scores = reward(noise(2, 16), make_batch(2, {"asked": ["count"], "count": 1}))
        assert scores["reward"].isnan().all() and reward.failures == {"refused (422)": 2}
    assert "signs are 64 64 3" in caplog.text


# ---------------------------------------------------------------- servers that fail


class Fake:
    """A server that answers as it is told: by a function of (number of the request, its JSON)."""

    def __init__(self, script: Callable[[int, Any], Any], port: int = 0) -> None:
        fake, self.count, self.script = self, 0, script
        self.listing: Any = {"rewards": [{"name": "fake", "engine": ENGINE}]}
        self.tokens: list[str | None] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None: ...

            def do_GET(self) -> None:
                fake.tokens.append(self.headers.get("Authorization"))
                self.reply(200, fake.listing)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.count += 1
                got = fake.script(fake.count, body)
                if callable(got):
                    got(self)
                elif isinstance(got, tuple):
                    self.reply(*got)
                else:
                    self.reply(200, got)

            def reply(self, status: int, body: Any, headers: Any = ()) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None: ...  # it left

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextmanager
def faked(script: Callable[[int, Any], Any], port: int = 0) -> Iterator[Fake]:
    with closing(Fake(script, port)) as fake:
        yield fake


def good(body: Any, **more: Any) -> dict[str, Any]:
    return {"values": {"reward": [float(i["id"] % 1000) for i in body["items"]]}, **more}


def numbered(n: int) -> Batch:
    return dataclasses.replace(make_batch(n), ids=torch.arange(n))


def hang(seconds: float) -> Callable[[Any], None]:
    return lambda handler: time.sleep(seconds)


def cut(handler: Any) -> None:
    """Promises more than it sends, and leaves."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"values"')


def trickle(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize(
    "fault",
    [
        (500, {"error": "x"}),
        (502, b"<html>"),
        (503, {"error": "full"}, {"Retry-After": "0"}),
        (429, {}, {"Retry-After": "soon"}),
        (200, b"<html>not JSON</html>"),
        (200, b'{"values": {"reward": [NaN]}}'),
        {"values": {"reward": [1.0]}},
        {"values": {"reward": ["one", "two"]}},
        {"values": {}},
        [1, 2],
        cut,
    ],
)
def test_what_passes_is_tried_again_and_nothing_is_lost(fault: Any):
    with faked(lambda k, body: fault if k <= 2 else good(body)) as fake:
        with RemoteReward(fake.url, "fake", chunk=2, concurrency=1) as reward:
            scores = reward(noise(4), numbered(4))
            assert scores["reward"].tolist() == [0, 1, 2, 3]
            assert not reward.failures
        assert fake.count == 4


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        ((500, {"error": "x"}), "server error", 3),
        ((503, {}, {"Retry-After": "0.01"}), "busy", 3),
        ((504, {"error": "slow"}), "timed out", 1),
        ((404, {"error": "gone"}), "refused (404)", 1),
        ((301, b"", {"Location": "http://127.0.0.1:1/"}), "refused (301)", 1),
        ((200, b"\xff"), "bad answer", 3),
        ({"values": {"reward": [1.0, 2.0, 3.0]}}, "bad answer", 3),
        (cut, "unreachable", 3),
        ({"values": {"reward": [1.0, 2.0]}, "engine": "Other 2()"}, "another engine", 3),
    ],
)
def test_what_stays_is_masked_and_counted(
    fault: Any, reason: str, tries: int, caplog: pytest.LogCaptureFixture
):
    def script(_: int, body: Any) -> Any:
        return fault if body["items"][0]["id"] == 2 else good(body, failures={"blind": 1})

    with faked(script) as fake:
        with RemoteReward(fake.url, "fake", chunk=2, retries=2) as reward:
            for k in (1, 2):
                scores = reward(noise(6), numbered(6))["reward"]
                assert scores.isnan().tolist() == [False, False, True, True, False, False]
                assert reward.failures == {reason: 2 * k, "blind": 2 * k}
        assert fake.count == 2 * (2 + tries)
    [told] = [r.getMessage() for r in caplog.records if r.name == "rewards.http.client"]
    assert told.startswith(f"2 samples were not scored ({reason}): http://127.0.0.1:")


@pytest.mark.parametrize("fault", [hang(30), trickle])
def test_a_server_that_hangs_is_waited_for_until_the_deadline(fault: Any):
    with faked(lambda k, body: fault) as fake:
        settings = {"timeout": 0.3, "deadline": 1.0, "chunk": 2, "concurrency": 2}
        with RemoteReward(fake.url, "fake", **settings) as reward:
            reward.ready()
            began = time.monotonic()
            scores = reward(noise(6), numbered(6))
            assert 0.8 < time.monotonic() - began < 3
            assert scores["reward"].isnan().all() and reward.failures == {"timed out": 6}


def test_retry_after_is_kept_to():
    times = []

    def script(k: int, body: Any) -> Any:
        times.append(time.monotonic())
        return (503, {}, {"Retry-After": "1"}) if k == 1 else good(body)

    with faked(script) as fake, RemoteReward(fake.url, "fake", deadline=10) as reward:
        assert reward(noise(1), numbered(1))["reward"].tolist() == [0]
        assert 0.95 < times[1] - times[0] < 3
        times.clear()
        fake.script = lambda k, body: (503, {}, {"Retry-After": "3600"})
        began = time.monotonic()
        assert reward(noise(1), numbered(1))["reward"].isnan().all()  # beyond the deadline
        assert time.monotonic() - began < 2 and reward.failures == {"busy": 1}
    assert retry_after("1.5") == 1.5 and retry_after("-1") == retry_after("soon") == 0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))
    assert 3500 < retry_after(date) <= 3600


def test_a_server_that_restarts_between_chunks_is_found_again():
    with faked(lambda k, body: good(body)) as fake:
        port = fake.port
        with RemoteReward(fake.url, "fake", chunk=2, retries=9) as reward:
            assert reward(noise(4), numbered(4))["reward"].tolist() == [0, 1, 2, 3]
            fake.close()
            pending = reward.submit(noise(4), numbered(4))
            time.sleep(0.2)
            with faked(lambda k, body: good(body), port):
                assert reward.result(pending)["reward"].tolist() == [0, 1, 2, 3]
                assert not reward.failures


def test_servers_take_turns_and_stand_in_for_each_other():
    with (
        faked(lambda k, body: good(body)) as a,
        faked(lambda k, body: good(body)) as b,
        RemoteReward([a.url, b.url + "/"], "fake", chunk=1) as reward,
    ):
        reward(noise(8), numbered(8))
        assert a.count + b.count == 8 and min(a.count, b.count) >= 2
        b.script = lambda k, body: cut
        assert reward(noise(8), numbered(8))["reward"].tolist() == list(range(8))
        assert not reward.failures


def test_a_closed_reward_ends_at_once():
    with faked(lambda k, body: hang(30)) as fake:
        reward = RemoteReward(fake.url, "fake", chunk=1, concurrency=2)
        pending = reward.submit(noise(4), numbered(4))
        wait_for(lambda: fake.count == 2)
        began = time.monotonic()
        reward.close()
        assert reward.result(pending)["reward"].isnan().all()
        assert time.monotonic() - began < 1
        assert set(reward.failures) <= {"closed", "unreachable"}


def test_references_are_encoded_once_for_a_group(monkeypatch: pytest.MonkeyPatch):
    count, seen = [], []
    real = module.to_text
    monkeypatch.setattr(module, "to_text", lambda array: (count.append(1), real(array))[1])
    picture = np.full((8, 8, 3), 7, np.uint8)
    meta = {"references": (picture,), "source": picture}

    def script(_: int, body: Any) -> Any:
        seen.append(body)
        return good(body)

    with faked(script) as fake, RemoteReward(fake.url, "fake") as reward:
        reward(noise(4), make_batch(4, meta))
    assert len(count) == 5  # four images and one picture
    assert seen[0]["items"][3]["source"] == seen[0]["items"][0]["references"][0]


def test_long_requests_go_in_halves():
    sizes = []

    def script(_: int, body: Any) -> Any:
        sizes.append(len(body["items"]))
        return good(body, failures={"blind": 1})

    with faked(script) as fake:
        fake.listing["limits"] = {"body": 8000}
        with RemoteReward(fake.url, "fake") as reward:  # some 1.6 kB an image
            assert reward(noise(8, 20), numbered(8))["reward"].tolist() == list(range(8))
            assert sizes == [4, 4] and reward.failures == {"blind": 2}


# ---------------------------------------------------------------- before anything is scored


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_servers_that_cannot_serve_are_told_in_a_line(url: str, monkeypatch: pytest.MonkeyPatch):
    nowhere = f"http://127.0.0.1:{free_port()}"
    with faked(lambda k, body: good(body)) as fake, serving({}, token="secret") as guarded:
        fake.listing = {"rewards": [{"name": "toy", "engine": "Other 1()"}]}
        for urls, told in (
            (nowhere, f"no reward service at {nowhere}: .*refused.*stage=serve_reward"),
            (url + "/v1", "no reward service at .*404"),
            (guarded, "wants another token: set reward.token"),
            ([url, fake.url], r"with Toy 1\(a=1\) and .* with Other 1\(\): give servers of one"),
        ):
            with (
                RemoteReward(urls, "toy") as reward,
                pytest.raises(InputError, match=told) as caught,
            ):
                reward.ready()
            assert "\n" not in str(caught.value)
        with RemoteReward(url, "tow") as reward:
            for ask in (reward.ready, lambda: reward.engine, lambda: reward.card):
                with pytest.raises(
                    InputError, match="no reward 'tow': choose from ocr, signs, toy"
                ):
                    ask()
        fake.listing = {"hello": "world"}
        monkeypatch.setenv("MY_TOKEN", "secret")
        for one, told in (
            (RemoteReward(fake.url, "toy"), "is no reward service"),
            (RemoteReward(guarded, "toy", token="MY_TOKEN"), "no reward 'toy': choose from none"),
        ):
            with one, pytest.raises(InputError, match=told):
                one.ready()


def test_one_of_several_may_come_later(caplog: pytest.LogCaptureFixture):
    port = free_port()
    with (
        faked(lambda k, body: good(body)) as fake,
        RemoteReward([fake.url, f"http://127.0.0.1:{port}"], "fake", chunk=1) as reward,
    ):
        assert reward(noise(4), numbered(4))["reward"].tolist() == [0, 1, 2, 3]
    assert "is not there yet" in caplog.text


def test_a_server_that_is_still_starting_is_waited_for():
    port = free_port()
    with RemoteReward(f"http://127.0.0.1:{port}", "fake", wait=20) as reward:
        thread = threading.Thread(target=reward.ready)
        thread.start()
        time.sleep(0.2)
        with faked(lambda k, body: good(body), port):
            thread.join(10)
            assert reward.engine == ENGINE


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"url": "folder"}, "'folder' is no URL"),
        ({"url": ["http://a", "ftp://b"]}, "'ftp://b' is no URL"),
        ({"url": []}, "needs a URL"),
        ({"chunk": 0}, "chunk"),
        ({"deadline": 0}, "deadline > 0"),
        ({"token": "NO_SUCH_VARIABLE"}, "set that variable"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told):
        RemoteReward(**{"url": "http://a", "reward": "b", **arguments})


# ---------------------------------------------------------------- the manual's server


def test_the_manuals_request_is_one():
    manual = (ROOT / "docs" / "serving.md").read_text()
    [body] = re.findall(r"<<END\n(.*?)\nEND\n", manual, re.DOTALL)
    request = Request.model_validate_json(
        body.replace("$image", to_text(np.zeros((8, 8, 3), "u1")))
    )
    assert request.reward == "ocr" and decode(request.items, Limits())[0][0].shape == (8, 8, 3)


def test_the_manuals_tables_are_the_files():
    manual = (ROOT / "docs" / "serving.md").read_text()
    for file, prefix in (("reward/remote", "reward"), ("stage/serve_reward", "serve")):
        cfg: Any = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/{file}.yaml"))
        rows = re.findall(rf"^\| `{prefix}\.(\w+)` \| (\S*)", manual, re.MULTILINE)
        values = cfg["serve"] if prefix == "serve" else cfg
        values.pop("_target_", None)
        assert {k for k, _ in rows} == set(values)
        for key, told in rows:
            if key != "limits":
                assert told == {None: "null"}.get(values[key], str(values[key])), key


def test_the_manuals_server_works_is_killed_and_comes_back(tmp_path: Path):
    manual = (ROOT / "docs" / "serving.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", manual, re.DOTALL)
    (tmp_path / "server.py").write_text(code)
    port = free_port()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(tmp_path / "server.py"), str(port)])

    first = start()
    images = noise(6)
    expected = [float(np.asarray(i.permute(1, 2, 0)).mean() / 255) for i in images]
    second = None
    try:
        url = f"http://127.0.0.1:{port}"
        with RemoteReward(url, "brightness", chunk=1, concurrency=1, wait=30, retries=12) as reward:
            reward.ready()
            assert reward.engine == "brightness-1.0()" and reward.card.licence == "Apache-2.0"
            agree(reward(images, make_batch(6)), {"reward": torch.tensor(expected)})
            first.send_signal(signal.SIGSTOP)  # so that it dies with a request in its hands
            pending = reward.submit(images, make_batch(6))
            time.sleep(0.2)
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            second = start()
            agree(reward.result(pending), {"reward": torch.tensor(expected)})
            assert not reward.failures
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()
