"""The endpoint against a real server on loopback, in good health and in bad."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
import torch

from flux2.errors import InputError
from flux2.types import Batch, Deferred
from rewards.base import Unavailable
from rewards.judge import Judge
from rewards.vlm.completion import read_answer
from rewards.vlm.endpoint import Endpoint
from rewards.vlm.model import Answer, Picture, Question
from tests.rewards.judge_server import Asked, JudgeServer, Reply, completion, said

SCALE = tuple("12345")
VALUES = (0.0, 0.25, 0.5, 0.75, 1.0)
FIVE = dict(zip(SCALE, (0.1, 0.1, 0.2, 0.2, 0.4), strict=True))


def grey(value: int) -> Picture:
    return Picture(np.full((8, 8, 3), value, np.uint8))


def questions(count: int, reason: bool = False) -> list[Question]:
    """One about each of `count` images, told apart by their brightness."""
    return [Question("grade", ("Image:", grey(i), "?"), SCALE, reason) for i in range(count)]


def graded(asked: Asked, number: int) -> Reply:
    """Each image's grade is its brightness, in percent."""
    return Reply(said(int(asked.images[0][0, 0, 0]) / 100))


def endpoint(url: str, **more: Any) -> Endpoint:
    settings = {"pause": 0.02, "longest_pause": 0.1, "connect": 2.0, "read": 2.0, "deadline": 10.0}
    return Endpoint(url, "judge", **(settings | more))


def ask(server: JudgeServer, count: int, reason: bool = False, **more: Any) -> list[Answer]:
    model = endpoint(server.url, **more)
    try:
        return model.result(model.submit(questions(count, reason)))
    finally:
        model.close()


def grades(answers: list[Answer]) -> list[float]:
    return [a.share(VALUES) for a in answers]


def right(answers: list[Answer], rows: range) -> None:
    assert grades(answers)[rows.start : rows.stop] == pytest.approx([i / 100 for i in rows])


# ---------------------------------------------------------------- in good health


def test_images_arrive_bit_for_bit_and_the_request_is_the_protocols() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (48, 32, 3), dtype=np.uint8) for _ in range(2))
    asked = Question("be strict", ("One:", Picture(first), "two:", Picture(second), "?"), SCALE)
    with JudgeServer(lambda *_: Reply(completion([("4", FIVE)]))) as server:
        model = endpoint(server.url, extra={"chat_template_kwargs": {"enable_thinking": False}})
        [answer] = model.result(model.submit([asked]))
        model.close()
        [got] = server.asked
    assert all((a == b).all() for a, b in zip(got.images, (first, second), strict=True))
    assert answer.probabilities == pytest.approx(tuple(FIVE.values()))
    assert answer.mass == pytest.approx(1)
    assert answer.share(VALUES) == pytest.approx(0.1 * 0.25 + 0.2 * 0.5 + 0.2 * 0.75 + 0.4)
    request = got.request
    assert request["model"] == "judge" and request["temperature"] == 0
    assert request["logprobs"] is True and request["top_logprobs"] == 20
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    system, user = request["messages"]
    assert system == {"role": "system", "content": "be strict"}
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert "Authorization" not in got.headers


def test_answers_out_of_order_come_back_in_order() -> None:
    def slowest_first(asked: Asked, number: int) -> Reply:
        return Reply(graded(asked, number).body, delay=0.3 - 0.01 * int(asked.images[0][0, 0, 0]))

    with JudgeServer(slowest_first) as server:
        right(ask(server, 24, concurrency=24), range(24))
        assert server.most > 4


def test_no_more_than_concurrency_at_a_time() -> None:
    with JudgeServer(lambda a, n: Reply(graded(a, n).body, delay=0.03)) as server:
        right(ask(server, 20, concurrency=3), range(20))
        assert server.most == 3 and len(server.asked) == 20


def test_submit_returns_at_once() -> None:
    with JudgeServer(lambda a, n: Reply(graded(a, n).body, delay=0.6)) as server:
        model = endpoint(server.url)
        model.ready()
        start = time.monotonic()
        jobs = [model.submit(questions(3)), model.submit(questions(5))]
        assert time.monotonic() - start < 0.4
        right(model.result(jobs[1]), range(5))
        right(model.result(jobs[0]), range(3))
        assert model.result(model.submit([])) == []
        model.close()


# ---------------------------------------------------------------- reading


def read(words: list[tuple[str, dict[str, float]]], reason: bool = False) -> Answer:
    return read_answer(completion(words), Question("", (), SCALE, reason))


def test_digits_count_in_all_their_spellings() -> None:
    spelled = {"4": 0.3, " 4": 0.2, "\uff14": 0.1, "\n5": 0.2, "5.": 0.1, "45": 0.05, "four": 0.05}
    answer = read([(" 4", spelled)])
    assert answer.probabilities == pytest.approx((0, 0, 0, 0.6, 0.2))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([("\n", {"\n": 0.9}), ("4", FIVE), ("<|im_end|>", {})], False),
        ([("**", {}), ("4", FIVE), ("**", {})], False),
        ([("Score", {}), (":", {}), (" ", {}), ("4", FIVE)], False),
        ([("Fine", {}), (". Sc", {}), ("ore", {}), (":", {}), (" ", {}), ("4", FIVE)], True),
        ([("The sign says Score: 5.", {}), ("\n**Score:**", {}), (" ", {}), ("4", FIVE)], True),
        ([("Score\uff1a", {}), ("", {}), ("4", FIVE), ("/5", {})], True),
    ],
)
def test_the_place_of_the_answer(words: list[tuple[str, dict[str, float]]], reason: bool) -> None:
    assert read(words, reason).probabilities == pytest.approx(tuple(FIVE.values()))


@pytest.mark.parametrize(
    ("words", "reason", "failure"),
    [
        ([], False, "no score"),
        ([("  ", {"  ": 1.0})], False, "no score"),
        ([("4", FIVE)], True, "no score"),  # it never came to "Score:"
        ([("Score", {}), (":", {})], True, "no score"),
        ([("1", FIVE), ("0", {})], False, "no score"),  # ten is no grade from 1 to 5
        ([("4", FIVE), (".5", {})], False, "no score"),
        ([("Sorry", {"Sorry": 0.9, "4": 0.1})], False, "low mass"),
        ([("\ufffd", {"\ufffd": 1.0}), ("\ufffd", {})], False, "low mass"),  # a character's halves
        ([("4", {"4": 0.8, "5": 0.8})], False, "junk"),
    ],
)
def test_answers_that_are_none(
    words: list[tuple[str, dict[str, float]]], reason: bool, failure: str
) -> None:
    answer = read(words, reason).checked(0.5)
    assert answer.failure == failure and answer.probabilities is None
    assert math.isnan(answer.share(VALUES))


def _with(change: Callable[[Any], object]) -> bytes:
    body = json.loads(completion([("4", FIVE)]))
    change(body)
    return json.dumps(body).encode()


def _token(body: Any) -> Any:
    return body["choices"][0]["logprobs"]["content"][0]


JUNK = {
    "nothing": b"",
    "html": b"<html><body>It works!</body></html>",
    "bytes": b"\xff\xfe\x00\x80",
    "half": completion([("4", FIVE)])[:-20],
    "list": b"[1, 2]",
    "null": b"null",
    "nested": b"[" * 100_000,
    "no choices": b"{}",
    "empty choices": _with(lambda b: b["choices"].clear()),
    "no logprobs": _with(lambda b: b["choices"][0].pop("logprobs")),
    "null logprobs": _with(lambda b: b["choices"][0].update(logprobs=None)),
    "no alternatives": _with(lambda b: _token(b).pop("top_logprobs")),
    "not a list": _with(lambda b: _token(b).update(top_logprobs=7)),
    "NaN": _with(lambda b: _token(b)["top_logprobs"][0].update(logprob=math.nan)),
    "string": _with(lambda b: _token(b)["top_logprobs"][0].update(logprob="-1")),
    "positive": _with(lambda b: _token(b)["top_logprobs"][0].update(logprob=3.0)),
    "infinite": _with(lambda b: _token(b)["top_logprobs"][0].update(logprob=math.inf)),
    "huge": _with(lambda b: _token(b)["top_logprobs"][0].update(logprob=-(10**400))),
}


@pytest.mark.parametrize("name", JUNK)
def test_junk(name: str) -> None:
    assert read_answer(JUNK[name], questions(1)[0]) == Answer(None, "junk")


def test_an_impossible_token_is_no_junk() -> None:
    body = _with(lambda b: _token(b)["top_logprobs"].append({"token": "9", "logprob": -math.inf}))
    assert read_answer(body, questions(1)[0]).probabilities == pytest.approx(tuple(FIVE.values()))


def test_a_server_that_leaves_the_chosen_token_out_of_its_alternatives() -> None:
    body = _with(lambda b: _token(b).update(top_logprobs=_token(b)["top_logprobs"][:3]))
    wanted = [FIVE[d] if d in "1234" else 0 for d in SCALE]
    assert read_answer(body, questions(1)[0]).probabilities == pytest.approx(wanted)


def test_junk_among_good_answers_is_masked_alone() -> None:
    kinds = list(JUNK.values())

    def every_other(asked: Asked, number: int) -> Reply:
        i = int(asked.images[0][0, 0, 0])
        return Reply(kinds[i // 2]) if i % 2 else graded(asked, number)

    count = 2 * len(kinds)
    with JudgeServer(every_other) as server:
        answers = ask(server, count)
        assert len(server.asked) == count  # the same question again would get the same junk
    assert [a.failure for a in answers] == [None, "junk"] * len(kinds)
    assert grades(answers)[::2] == pytest.approx([i / 100 for i in range(0, count, 2)])


# ---------------------------------------------------------------- in bad health


def failing(times: int, how: Callable[[Asked, int], Reply]) -> Callable[[Asked, int], Reply]:
    """Each image's first `times` requests fail so, the next are answered."""
    seen: dict[int, int] = {}
    lock = threading.Lock()

    def answer(asked: Asked, number: int) -> Reply:
        with lock:
            key = int(asked.images[0][0, 0, 0])
            seen[key] = seen.get(key, 0) + 1
        return how(asked, number) if seen[key] <= times else graded(asked, number)

    return answer


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"overloaded", 500),
        Reply(b"<html>bad gateway</html>", 502),
        Reply(b"", 503),
        Reply(b"{}", 429),
        Reply(completion([("4", FIVE)]), cut=40),
        Reply(completion([("4", FIVE)]), cut=0),
    ],
    ids=["500", "502", "503", "429", "cut", "closed"],
)
def test_trouble_that_passes_costs_nothing_but_time(reply: Reply) -> None:
    with JudgeServer(failing(2, lambda *_: reply)) as server:
        right(ask(server, 6, attempts=3), range(6))
        assert len(server.asked) == 18


@pytest.mark.parametrize(
    ("reply", "reason", "attempts"),
    [
        (Reply(b"overloaded", 500), "HTTP 500", 3),
        (Reply(b"slow down", 429), "HTTP 429", 3),
        (Reply(completion([("4", FIVE)]), cut=40), "no connection", 3),
        (Reply(b'{"error": "no such field"}', 400), "HTTP 400", 1),
        (Reply(b"who are you?", 401), "HTTP 401", 1),
        (Reply(b"no such model", 404), "HTTP 404", 1),
        (Reply(b"", 302, {"Location": "http://127.0.0.1:1/"}), "HTTP 302", 1),
    ],
)
def test_trouble_that_stays_masks_its_items(reply: Reply, reason: str, attempts: int) -> None:
    with JudgeServer(lambda a, n: reply if a.images[0][0, 0, 0] == 1 else graded(a, n)) as server:
        answers = ask(server, 4, attempts=3)
        assert len(server.asked) == 3 + attempts
    assert [a.failure for a in answers] == [None, reason, None, None]
    assert grades(answers)[2:] == pytest.approx([0.02, 0.03])


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_obeyed(date: bool) -> None:
    def late(*_: Any) -> Reply:
        # A date has whole seconds: two of them are one at the least.
        value = formatdate(time.time() + 2, usegmt=True) if date else "0.5"
        return Reply(b"", 429, {"Retry-After": value})

    with JudgeServer(failing(1, late)) as server:
        right(ask(server, 1), range(1))
        first, second = server.asked
    assert second.time - first.time >= (0.8 if date else 0.5)


def test_a_pause_longer_than_the_deadline_is_not_waited_for() -> None:
    with JudgeServer(lambda *_: Reply(b"", 429, {"Retry-After": "3600"})) as server:
        start = time.monotonic()
        answers = ask(server, 8)
    assert time.monotonic() - start < 3
    assert {a.failure for a in answers} == {"HTTP 429"}


def test_items_that_hang_do_not_hold_up_the_others() -> None:
    with JudgeServer(graded) as server:
        server.answer = lambda a, n: (server.hang if a.images[0][0, 0, 0] < 3 else graded)(a, n)
        start = time.monotonic()
        answers = ask(server, 30, read=0.3, attempts=2, concurrency=8)
        assert time.monotonic() - start < 4
    assert [a.failure for a in answers[:3]] == ["timed out"] * 3
    right(answers, range(3, 30))


def test_a_question_that_hung_once_is_asked_again() -> None:
    with JudgeServer(graded) as server:
        server.answer = failing(1, server.hang)
        right(ask(server, 4, read=0.3, attempts=2), range(4))
        assert len(server.asked) == 8


def test_a_server_that_hangs_for_all_costs_one_time_out_a_chunk() -> None:
    with JudgeServer(graded) as server:
        server.answer = server.hang
        model = endpoint(server.url, read=0.4, attempts=3, concurrency=8, give_up_after=8)
        for _ in range(2):
            start = time.monotonic()
            answers = model.result(model.submit(questions(80)))
            assert time.monotonic() - start < 3  # of 80 / 8 · 3 · 0.4 = 12 s
            assert {a.failure for a in answers} <= {"timed out", "server gone"}
        server.answer = graded
        right(model.result(model.submit(questions(80))), range(80))
        model.close()


def test_a_server_that_drips_meets_the_deadline() -> None:
    body = completion([("4", FIVE)])
    with JudgeServer(lambda *_: Reply(body, drip=0.05)) as server:
        start = time.monotonic()
        answers = ask(server, 4, read=1.0, deadline=0.8)
        assert time.monotonic() - start < 3
    assert [a.failure for a in answers] == ["timed out"] * 4


def test_a_server_that_goes_away_half_way_and_comes_back() -> None:
    with JudgeServer(graded) as server:
        gone = threading.Thread(target=server.stop)

        def leave(asked: Asked, number: int) -> Reply:
            if number == 20:
                gone.start()
            return Reply(graded(asked, number).body, delay=0.01)

        server.answer = leave
        model = endpoint(server.url, concurrency=4, give_up_after=8, connect=0.5, read=1.0)
        start = time.monotonic()
        answers = model.result(model.submit(questions(100)))
        assert time.monotonic() - start < 5
        gone.join()
    done = [i for i, a in enumerate(answers) if a.failure is None]
    assert 10 <= len(done) < 40 and len(answers) == 100
    for i in done:
        assert answers[i].share(VALUES) == pytest.approx(i / 100)
    assert {a.failure for a in answers} <= {None, "no connection", "server gone", "timed out"}
    assert sum(a.failure == "server gone" for a in answers) > 50
    with JudgeServer(graded, port=server.port):
        right(model.result(model.submit(questions(100))), range(100))
    model.close()


def test_no_server_at_all(caplog: pytest.LogCaptureFixture) -> None:
    with JudgeServer(graded) as server:
        url = server.url
    model = endpoint(url, concurrency=4, give_up_after=8)
    start = time.monotonic()
    answers = model.result(model.submit(questions(200)))
    assert time.monotonic() - start < 3
    assert "server gone" in {a.failure for a in answers} <= {"no connection", "server gone"}
    assert "8 attempts failed: All connection attempts failed" in caplog.text
    with pytest.raises(Unavailable, match=r"no model answers at .*vllm serve judge"):
        model.ready()
    model.close()


def test_closing_ends_what_is_under_way() -> None:
    before = threading.active_count()
    model = endpoint("http://127.0.0.1:9/v1")
    model.close()
    with JudgeServer(graded) as server:
        server.answer = server.hang
        model = endpoint(server.url)
        job = model.submit(questions(20))
        while not server.asked:
            time.sleep(0.01)
        model.close()
        assert [a.failure for a in model.result(job)] == ["closed"] * 20
        with pytest.raises(RuntimeError, match="closed"):
            model.submit(questions(1))
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before


# ---------------------------------------------------------------- before it starts


def test_ready_finds_the_model() -> None:
    with JudgeServer(graded, models=("other", "judge")) as server:
        model = endpoint(server.url + "/")
        model.ready()
        model.close()
    assert model.engine == "vlm:judge"


@pytest.mark.parametrize(
    ("models", "what"),
    [
        (("other", "third"), "has no model judge: choose from other, third"),
        ((), "choose from none"),
        (Reply(b"no", 401), "refuses the API key"),
        (Reply(b"<html></html>"), "no list of models"),
        (Reply(b'{"data": null}'), "no list of models"),
        (Reply(b"", 404), "end in /v1"),
    ],
)
def test_ready_says_what_is_wrong(models: Any, what: str) -> None:
    with JudgeServer(graded, models=models) as server:
        model = endpoint(server.url)
        with pytest.raises(Unavailable, match=what) as caught:
            model.ready()
        assert "\n" not in str(caught.value)
        model.close()


def test_the_key_is_sent_and_never_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match="JUDGE_KEY is not set"):
        endpoint("http://127.0.0.1:9/v1", key="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    caplog.set_level(logging.DEBUG)

    def echo(asked: Asked, number: int) -> Reply:
        return Reply(f"bad\nkey {asked.headers['Authorization']}".encode(), 401)

    with JudgeServer(echo) as server:
        answers = ask(server, 5, key="JUDGE_KEY")
        assert all(a.headers["Authorization"] == "Bearer s3cret" for a in server.asked)
    assert {a.failure for a in answers} == {"HTTP 401"}
    assert "s3cret" not in caplog.text
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1 and "(HTTP 401)" in told[0] and "\n" not in told[0]


@pytest.mark.parametrize(
    "bad",
    [
        {"url": "127.0.0.1:8000"},
        {"url": "ftp://host/v1"},
        {"url": "http://me:s3cret@host/v1"},
        {"concurrency": 0},
        {"read": -1.0},
        {"deadline": math.nan},
        {"pause": 2.0, "longest_pause": 1.0},
    ],
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        endpoint(**({"url": "http://host/v1"} | bad))
    assert "s3cret" not in str(caught.value)


# ---------------------------------------------------------------- as a reward


def test_a_judge_over_http_masks_and_counts() -> None:
    def some(asked: Asked, number: int) -> Reply:
        i = int(asked.images[0][0, 0, 0])
        return {2: Reply(b"<html>"), 5: Reply(b"no", 400)}.get(i, graded(asked, number))

    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 8, 8)
    ids = torch.arange(8)
    batch = Batch(ids, ("a sign",) * 8, None, ids, ({},) * 8, (4, 4))
    with JudgeServer(some) as server, Judge(endpoint(server.url), {"alignment": 1.0}) as judge:
        assert isinstance(judge, Deferred)
        judge.ready()
        scores = judge(images, batch)
        assert all(a.images[0].shape == (8, 8, 3) for a in server.asked)
    nan = math.nan
    wanted = torch.tensor([0.0, 0.01, nan, 0.03, 0.04, nan, 0.06, 0.07])
    for name in ("reward", "judge_alignment"):
        torch.testing.assert_close(scores[name], wanted, equal_nan=True)
    assert judge.failures == {"junk": 1, "HTTP 400": 1}
    assert judge.card.cost == "remote"
