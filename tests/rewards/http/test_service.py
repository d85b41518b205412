"""The service over real sockets: what it answers, refuses, survives, and how it ends."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import rewards.http.service as module
from flux2.errors import InputError
from rewards.apart import Scoring
from rewards.http.lanes import Lane, Pool, Serving
from rewards.http.protocol import Item, Limits, decode
from rewards.http.service import planned, serve
from tests.rewards.hosts import lines, serving, wait_for
from tests.rewards.toys import Breaking, Seen, Toy

ROOT = Path(__file__).parents[3]
LIMITS = Limits(body=100_000, items=4, pixels=1024, all_pixels=4000)


def png(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def item(size: int = 16, meta: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    return {"prompt": "p", "image": png(pixels), "meta": meta or {}, **more}


def asked(*items: dict[str, Any], reward: str = "toy") -> dict[str, Any]:
    return {"reward": reward, "items": list(items)}


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks") / "seen"


@pytest.fixture(scope="module")
def lanes(marks: Path) -> Iterator[dict[str, Lane]]:
    """Two rewards: one that stays quick, and one that is made to sleep, hang and fail."""
    lanes = {
        "toy": Lane("toy", Toy, Pool(1, 4, 10.0), LIMITS),
        "bad": Lane("bad", partial(Toy, "Bad 1", str(marks)), Pool(1, 2, 2.0), LIMITS),
    }
    with contextlib.ExitStack() as stack:
        for lane in lanes.values():
            stack.callback(lane.close)
        for lane in lanes.values():
            lane.ready()
        yield lanes


@pytest.fixture(scope="module")
def url(lanes: dict[str, Lane]) -> Iterator[str]:
    with serving(lanes, LIMITS) as url:
        yield url


def post(url: str, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", json=body, timeout=30, trust_env=False, **more)


def later(function: Any) -> Any:
    """Runs it in a thread; `.join()` waits, `.value` is what came of it."""
    out = SimpleNamespace()
    thread = threading.Thread(target=lambda: out.__setattr__("value", function()))
    out.join = thread.join
    thread.start()
    return out


# ---------------------------------------------------------------- answers


def test_what_it_says_of_itself(url: str):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    listing = httpx.get(f"{url}/v1/rewards").json()
    card = {"low": 0.0, "high": 1.0, "cost": "heavy", "licence": "free", "needs": ["do"]}
    assert listing["rewards"] == [
        {"name": "toy", "engine": "Toy 1(a=1)", "card": card},
        {"name": "bad", "engine": "Bad 1(a=1)", "card": card},
    ]
    assert listing["limits"] == LIMITS.model_dump()
    for page in ("docs", "redoc", "openapi.json"):
        assert httpx.get(f"{url}/{page}").status_code == 404


def test_scores_in_order_with_null_for_nan(url: str):
    items = [item(meta={"do": do, "sign": s}, id=k, group=k // 2) for k, (do, s) in enumerate(
        [("", 1), ("fail", 1), ("infinite", 1), ("infinite", -1)])]  # fmt: skip
    answer = post(url, asked(*items)).json()
    value = answer["values"]["reward"][0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(items[0]["image"]))), np.float32)
    assert value == pytest.approx(pixels.mean() / 7) and np.float32(value) == value
    assert answer["values"]["reward"] == [value, None, "Infinity", "-Infinity"]
    assert answer["values"]["group"] == [0, 0, 1, 1]
    assert answer["failures"] == {"no target": 1}
    assert answer["engine"] == "Toy 1(a=1)" and 0 <= answer["seconds"] < 5
    # Failures are those of the request.
    assert post(url, asked(items[0])).json()["failures"] == {}


# ---------------------------------------------------------------- refusals


def huge(width: int, height: int) -> str:
    """A PNG of a few bytes that says it is huge."""
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(
        ">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0
    )
    return base64.b64encode(start + bytes(4)).decode()


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (asked(item(), item(image="§")), 400, "item 1 holds an image that is not base64"),
        (asked(item(image=base64.b64encode(b"GIF89a").decode())), 400, "item 0 .* not a PNG"),
        (asked(item(image=huge(16, 16))), 400, "item 0 holds a broken image"),
        (asked(item(), item(references=["eA=="])), 400, "item 1 .* not a PNG"),
        (asked(item(), item(8)), 400, "item 1 is 8×8 and item 0 is 16×16"),
        (asked(item(), reward="tow"), 404, "no reward 'tow': this server has toy, bad"),
        (asked(*[item()] * 5), 413, "5 items: the most is 4"),
        (asked(item(image=huge(2**31, 2**31))), 413, "item 0 .* the most is 1024 pixels"),
        (asked(*[item(source=item(32)["image"])] * 4), 413, "more than 4000 pixels"),
        ({"reward": "toy", "items": [{"prompt": "p"}]}, 422, r"items\.0\.image: Field required"),
        (asked(item(imgae="x")), 422, r"items\.0\.imgae: Extra inputs"),
        (asked(item(id=1.5)), 422, r"items\.0\.id"),
        (asked(), 422, "items"),
        ([], 422, "the request"),
        (asked(item(meta={"do": "refuse"})), 422, "toy: signs are 64 64 3"),
        (asked(item(meta={"do": "raise"})), 500, "toy failed: KeyError"),
    ],
)
def test_refusals_say_why_in_json(url: str, body: Any, status: int, told: str):
    response = post(url, body)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert "\n" not in response.json()["error"]
    assert re.search(told, response.json()["error"]), response.json()


def test_paths_methods_and_junk(url: str):
    for response, status in (
        (httpx.get(f"{url}/v1/score"), 405),
        (httpx.get(f"{url}/nothing"), 404),
        (httpx.post(f"{url}/v1/score", content=b"{'no': json"), 400),
        (httpx.post(f"{url}/v1/score", content=b"\xff\xfe"), 400),
    ):
        assert response.status_code == status and "error" in response.json()


def test_a_body_that_is_too_long_is_cut_off_while_it_comes(url: str):
    sent = 0

    def body() -> Iterator[bytes]:  # without Content-Length
        nonlocal sent
        for _ in range(1000):
            sent += 100_000
            yield bytes(100_000)

    said = post(url, asked(item(pad="x" * 200_000)))
    assert said.status_code == 413 and "longer than 100000 bytes" in said.json()["error"]
    with contextlib.suppress(httpx.HTTPError):
        assert httpx.post(f"{url}/v1/score", content=body()).status_code == 413
    assert httpx.get(f"{url}/health").status_code == 200


def test_pictures_of_meta_arrive_as_arrays():
    mask = np.zeros((16, 16), bool)
    mask[3:5, 2:9] = True
    source = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    more = {"source": png(source), "mask": png(mask), "references": [png(source), png(source)]}
    sample = Item.model_validate(item(meta={"a": [1]}, **more))
    _, meta = decode([sample], Limits())[0]
    assert meta["a"] == [1] and meta["mask"].dtype == bool and len(meta["references"]) == 2
    np.testing.assert_array_equal(meta["mask"], mask)
    np.testing.assert_array_equal(meta["source"], source)
    np.testing.assert_array_equal(meta["references"][1], source)
    with pytest.raises(InputError, match=r"'meta', 'prompts'\] torch.uint8 True"):
        Serving(Scoring(Seen()), Limits())((sample,))


def test_the_token_is_asked_for(url: str):
    with serving({}, token="sécret") as guarded:
        assert httpx.get(f"{guarded}/health").status_code == 200
        for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sécret".encode()}):
            response = httpx.get(f"{guarded}/v1/rewards", headers=given)
            assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
            assert "wants its token" in response.json()["error"]
        # Long bodies are heard out, so that the refusal is read and not a broken connection.
        response = httpx.post(f"{guarded}/v1/score", content=bytes(8_000_000))
        assert response.status_code == 401
        good = {"Authorization": "Bearer sécret".encode()}
        assert httpx.get(f"{guarded}/v1/rewards", headers=good).json()["rewards"] == []


# ---------------------------------------------------------------- slow, hung, dead, full


def test_one_that_hangs_stalls_no_other_and_is_replaced(url: str):
    before = post(url, asked(item(), reward="bad")).json()["values"]["pid"]
    began = time.monotonic()
    hung = later(lambda: post(url, asked(item(meta={"do": "hang"}), reward="bad")))
    slowest = 0.0
    while not hasattr(hung, "value"):
        for ask in (lambda: httpx.get(f"{url}/health"), lambda: post(url, asked(item()))):
            start = time.monotonic()
            assert ask().status_code == 200
            slowest = max(slowest, time.monotonic() - start)
    assert slowest < 1.0  # some 10 ms on a core that is free
    assert hung.value.status_code == 504
    assert "bad took longer than 2 s" in hung.value.json()["error"]
    assert 1.9 < time.monotonic() - began < 10
    after = post(url, asked(item(), reward="bad"))
    assert after.status_code == 200 and after.json()["values"]["pid"] != before  # a new process


def test_a_full_queue_says_when_to_come_back(url: str, lanes: dict[str, Lane]):
    sleeping = asked(item(meta={"do": "sleep", "seconds": 0.5}), reward="bad")
    running = [later(lambda: post(url, sleeping)) for _ in range(3)]
    wait_for(lambda: lanes["bad"]._pending == 3)
    response = post(url, sleeping)
    assert response.status_code == 503 and 1 <= int(response.headers["Retry-After"]) <= 60
    assert "bad has 3 requests to do" in response.json()["error"]
    assert post(url, asked(item())).status_code == 200
    for thread in running:
        thread.join()
    assert [t.value.status_code for t in running] == [200] * 3
    assert post(url, asked(item(), reward="bad")).status_code == 200


def test_a_client_that_left_is_not_worked_for(url: str, lanes: dict[str, Lane], marks: Path):
    sleeping = asked(item(meta={"do": "sleep", "seconds": 1.8}), reward="bad")
    running = later(lambda: post(url, sleeping))
    wait_for(lambda: lanes["bad"]._pending == 1)
    unwanted = {**asked({**item(), "prompt": "unwanted"}, reward="bad")}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/score", json=unwanted, timeout=0.3)
    wanted = {**asked({**item(), "prompt": "wanted"}, reward="bad")}
    assert post(url, wanted).status_code == 200
    running.join()
    assert "wanted" in lines(marks) and "unwanted" not in lines(marks)


@pytest.mark.slow
def test_a_process_that_dies_is_replaced(url: str):
    assert "bad failed: died" in post(url, asked(item(meta={"do": "die"}), reward="bad")).text
    assert post(url, asked(item(), reward="bad")).status_code == 200


@pytest.mark.slow
def test_a_reward_that_cannot_be_restarted_says_so_and_comes_back(tmp_path: Path):
    lane = Lane("toy", partial(Breaking, str(tmp_path / "broken")), Pool(1, 4, 1.0), Limits())
    with contextlib.closing(lane):
        lane.ready()
        with serving({"toy": lane}) as url:
            (tmp_path / "broken").touch()
            assert post(url, asked(item(meta={"do": "hang"}))).status_code == 504
            response = post(url, asked(item()))
            assert response.status_code == 503 and response.headers["Retry-After"] == "10"
            assert "toy cannot be started: no weights at folder" in response.json()["error"]
            (tmp_path / "broken").unlink()
            wait_for(lambda: post(url, asked(item())).status_code == 200)


# ---------------------------------------------------------------- configuration

OCR = {"_target_": "rewards.ocr.OCRReward", "workers": 2}
DEFAULTS = {"workers": 1, "queue": 16, "timeout": 60, "start_timeout": 600}


def test_pools_are_planned():
    toy = {"_target_": "tests.rewards.toys.Toy"}
    pools = {"ocr": {"timeout": 5}, "b": None, "c": {"workers": 3}}
    plan = planned({"a": toy, "ocr": OCR, "b": OCR, "c": OCR}, pools, DEFAULTS)
    assert plan["a"] == Pool(1, 16, 60, 600)
    assert plan["ocr"] == Pool(2, 16, 5, 600)
    assert plan["b"].workers == 2 and plan["c"].workers == 3


@pytest.mark.parametrize(
    ("configs", "pools", "told"),
    [
        ({}, {}, "no rewards to serve"),
        ({"ocr": OCR}, {"orc": {}}, r"pools\.orc is of no reward: this server has ocr"),
        ({"ocr": 5}, {}, r"rewards\.ocr names no class"),
        ({"ocr": {"workers": 2}}, {}, r"rewards\.ocr names no class"),
        ({"ocr": OCR}, {"ocr": {"wokers": 2}}, r"pools\.ocr: .*wokers"),
        ({"ocr": OCR}, {"ocr": {"workers": 0}}, "workers ≥ 1"),
        ({"ocr": OCR}, {"ocr": {"timeout": 0}}, "time-outs > 0"),
    ],
)
def test_wrong_pools(configs: Any, pools: Any, told: str):
    with pytest.raises(InputError, match=told):
        planned(configs, pools, DEFAULTS)


def configuration(folder: Path, **serve: Any) -> Any:
    cfg = OmegaConf.load(ROOT / "conf/stage/serve_reward.yaml")
    cfg = OmegaConf.merge(cfg, {"rewards": {"toy": {"_target_": "tests.rewards.toys.Toy"}}})
    return OmegaConf.merge(cfg, {"serve": {"port": 0, **serve}, "run": {"dir": str(folder)}})


def test_wrong_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port}: Address already in use"):
            serve(configuration(tmp_path, port=port))
    for keys, told in (
        ({"port": 70000}, "serve.port=70000 is no port"),
        ({"host": "no.such.host.invalid"}, "cannot serve at no.such"),
        ({"token": "NO_SUCH_VARIABLE"}, "token=NO_SUCH_VARIABLE: set that variable"),
        ({"limits": {"items": 0}}, "serve.limits"),
        ({"workers": 0}, "workers ≥ 1"),
    ):
        with pytest.raises(InputError, match=told):
            serve(configuration(tmp_path, **keys))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"uvicorn is not installed: pip install -e '\.\[serve\]'"):
        serve(configuration(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        serve(configuration(tmp_path))


def test_open_networks_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert module.is_loopback("localhost") and module.is_loopback("::1")
    assert not module.is_loopback("0.0.0.0") and not module.is_loopback("example.org")
    for host, token, warned in (("0.0.0.0", None, True), ("0.0.0.0", "t", False)):
        with module.bound(host, 0) as sock:
            module._announce(sock, {}, host, token, tmp_path / "address.json")
            port = sock.getsockname()[1]
        out = capsys.readouterr().out
        assert ("warning: whoever reaches" in out) == warned
        facts = json.loads((tmp_path / "address.json").read_text())
        assert facts == {"url": f"http://{host}:{port}", "host": host, "port": port,
                         "rewards": [], "token": token is not None}  # fmt: skip


# ---------------------------------------------------------------- the command


def start(*arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def address(folder: Path, process: subprocess.Popen[str]) -> str:
    path = folder / "address.json"
    wait_for(lambda: path.exists() or process.poll() is not None, 60)
    assert path.exists(), process.communicate()
    return json.loads(path.read_text())["url"]


def serving_command(folder: Path) -> tuple[str, ...]:
    toy = f"{{_target_: tests.rewards.toys.Toy, name: Mine 1, marks: {folder}.marks}}"
    places = "serve.port=0", f"run.dir={folder}"
    return ("stage=serve_reward", "~reward@rewards.ocr", f"+rewards.toy={toy}", *places)


def test_it_finishes_what_runs(tmp_path: Path):
    folder = tmp_path / "run"
    process = start(*serving_command(folder))
    url = address(folder, process)
    sleeping = later(lambda: post(url, asked(item(meta={"do": "sleep", "seconds": 2}))))
    wait_for(lambda: lines(Path(f"{folder}.marks")))
    process.send_signal(signal.SIGTERM)

    def refuses() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code != 200
        except httpx.HTTPError:
            return True

    wait_for(refuses)
    assert process.poll() is None and not hasattr(sleeping, "value")
    out, err = process.communicate(timeout=30)
    sleeping.join()
    assert sleeping.value.status_code == 200
    assert (process.returncode, out.splitlines()) == (
        143, ["toy: Mine 1(a=1), 1 process", f"rewards at {url}, without a token"]
    )  # fmt: skip
    assert err == f"interrupted; to go on: python run.py resume={folder}\n"
    assert not (folder / "address.json").exists()


@pytest.mark.slow
def test_it_can_be_resumed(tmp_path: Path):
    folder = tmp_path / "run"
    for arguments in (serving_command(folder), (f"resume={folder}", "serve.queue=3")):
        process = start(*arguments)
        url = address(folder, process)
        assert httpx.get(f"{url}/v1/rewards").json()["rewards"][0]["engine"] == "Mine 1(a=1)"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["~reward@rewards.ocr"], "error: no rewards to serve: add "),
        (["+reward@rewards.a=nosuch"], "error: no .*'nosuch'"),
        pytest.param(
            ["rewards.ocr.reader._target_=tests.rewards.toys.No"],
            "error: reward ocr: cannot build",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_commands_end_in_a_line(tmp_path: Path, arguments: list[str], told: str):
    process = start("stage=serve_reward", "serve.port=0", f"run.dir={tmp_path / 'r'}", *arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.match(told, err) and err.count("\n") == 1, err
