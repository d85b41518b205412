"""Writers: a server on loopback, and tiny models with random weights in this process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from flux2.errors import InputError
from rewards.vlm.completion import read_text
from rewards.vlm.endpoint import Endpoint
from rewards.vlm.local import LocalVLM, _Draw
from rewards.vlm.model import Picture, Question, Request, Written
from tests.rewards.judge_server import Asked, JudgeServer, Reply
from tests.rewards.vlm.test_local import save, tokenizer


def wrote(text: object, ended: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": ended}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode()


def grey(value: int) -> Picture:
    return Picture(np.full((16, 16, 3), value, np.uint8))


# ---------------------------------------------------------------- a server


@pytest.mark.parametrize(
    ("body", "want"),
    [(wrote("a cat"), Written("a cat")), (wrote("a ca", "length"), Written("", "too long")),
     (wrote("  \n"), Written("", "no words")), (wrote(None), Written("", "no words")),
     (wrote([1]), Written("", "junk")), (b"<html>", Written("", "junk")),
     (b'{"choices": []}', Written("", "junk")), (b'{"choices": [[]]}', Written("", "junk"))],
)  # fmt: skip
def test_what_a_completion_wrote(body: bytes, want: Written):
    assert read_text(body) == want


def test_a_server_writes_with_the_requests_settings_and_judges_beside():
    def answer(asked: Asked, number: int) -> Reply:
        words = asked.request["messages"][1]["content"][-1]["text"]
        seen = f", {int(asked.images[0][0, 0, 0])}" if asked.images else ""
        return Reply(b"", 400) if words == "no" else Reply(wrote(f"{words}!{seen}"))

    requests = [Request("Write.", ("one",), 50, 0.7, 11),
                Request("Write.", (grey(9), "two"), 60, 0.0, 12),
                Request("Write.", ("no",), 60)]  # fmt: skip
    with JudgeServer(answer) as server:
        model = Endpoint(server.url, "judge", pause=0.01, longest_pause=0.02)
        model.ready()
        pending = model.write(requests)
        answers = model.written(pending)
        assert model.result(model.submit([Question("s", ("no",), ("1",))]))[0].failure == "HTTP 400"
        model.close()
    assert answers == [Written("one!"), Written("two!, 9"), Written("", "HTTP 400")]
    by = {a.request["messages"][1]["content"][-1]["text"]: a.request for a in server.asked[:3]}
    assert (by["one"]["temperature"], by["one"]["seed"], by["one"]["max_tokens"]) == (0.7, 11, 50)
    assert "logprobs" not in by["one"] and by["two"]["temperature"] == 0
    assert by["one"]["messages"][0] == {"role": "system", "content": "Write."}


# ---------------------------------------------------------------- in this process


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalVLM]:
    folder = save("qwen3_vl", tmp_path_factory.mktemp("vlm"))
    model = LocalVLM(str(folder), device="cpu", batch=3)
    yield model
    model.close()


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of the tests' bytes."""
    folder, words = tmp_path_factory.mktemp("lm"), tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write(model: LocalVLM, requests: list[Request]) -> list[Written]:
    return model.written(model.write(requests))


def ended(model: LocalVLM) -> None:
    """A tiny random model hardly ever ends by itself: many letters end its text here."""
    model.ready()
    end = model.tokenizer.convert_tokens_to_ids(["Ċ", *"abcdefghijklmnop"])
    model._model.generation_config.eos_token_id = end


def test_texts_do_not_depend_on_what_is_written_beside_them(seeing: LocalVLM):
    ended(seeing)
    requests = [
        Request("Write.", (*([grey(40 * i)] if i % 2 else []), "Tell me of it. " * (1 + i)), 40,
                0.0 if i == 4 else 1.0, seed=i)
        for i in range(5)
    ]  # fmt: skip
    together = write(seeing, requests)
    assert any(w.text for w in together)
    alone = [write(seeing, [r])[0] for r in requests]
    assert together == alone and write(seeing, requests[::-1]) == alone[::-1]
    other = [Request(r.system, r.parts, r.tokens, r.temperature, r.seed + 9) for r in requests]
    changed = write(seeing, other)
    assert changed[4] == alone[4]  # at temperature 0 the seed has no part
    assert sum(a != b for a, b in zip(changed, alone, strict=True)) >= 2


def test_a_text_without_an_end_is_too_long(seeing: LocalVLM):
    seeing.ready()
    seeing._model.generation_config.eos_token_id = seeing.tokenizer.eos_token_id
    assert write(seeing, [Request("s", ("x",), 2, 1.0, 1)]) == [Written("", "too long")]


def test_draws_follow_the_models_distribution():
    """6,000 draws at temperature 2 from (0.1, 0.2, 0.7): p^½ / Σ p^½."""
    p = torch.tensor([0.1, 0.2, 0.7])
    want = p.sqrt() / p.sqrt().sum()
    count = 6000
    scores = p.log().expand(count, 3)
    rows = tuple((2.0, seed) for seed in range(count))
    out = _Draw(rows, begin=4)(torch.zeros(count, 6), scores)
    assert (out == 0).sum(1).eq(1).all() and out.isinf().sum(1).eq(2).all()
    found = Counter(out.argmax(1).tolist())
    share = torch.tensor([found[k] / count for k in range(3)])
    torch.testing.assert_close(share, want, atol=0.02, rtol=0)
    cold = _Draw(((0.0, 3),), 4)(torch.zeros(1, 6), scores[:1])
    assert cold.argmax() == 2


def test_a_language_model_writes_but_sees_nothing(blind: Path):
    with pytest.raises(InputError, match="sees=false"):
        LocalVLM(str(blind), device="cpu")
    model = LocalVLM(str(blind), device="cpu", sees=False)
    try:
        ended(model)
        requests = [Request("Write.", ("a", "b" * k), 40, 1.0, k) for k in range(4)]
        together = write(model, requests)
        assert any(w.text for w in together)
        assert together == [write(model, [r])[0] for r in requests]
        with pytest.raises(InputError, match="sees no images"):
            write(model, [Request("Write.", (grey(1), "a"), 4)])
    finally:
        model.close()


def test_a_vision_language_model_is_no_language_model(seeing: LocalVLM):
    with pytest.raises(InputError, match="sees=true"):
        LocalVLM(str(seeing.folder), device="cpu", sees=False)
