"""The local judge on tiny Qwen3-VL and Qwen2.5-VL models with random weights."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rewards.vlm.local as local_vlm
from flux2.errors import InputError
from flux2.types import Batch
from rewards.base import Unavailable
from rewards.judge import Judge
from rewards.pairwise import Pairwise
from rewards.vlm.local import LocalVLM
from rewards.vlm.model import MARKER, Picture, Question

SCALE = tuple("12345")
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SEEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one for " 4"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"Ġ4": len(alphabet)}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "4")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = [AddedToken(s, special=True) for s in (START, *SEEN)]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, eos_token=END, additional_special_tokens=special
    )
    fast.chat_template = TEMPLATE
    return fast


def config(kind: str, words: PreTrainedTokenizerFast, width: int = 32) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, words.convert_tokens_to_ids(list(SEEN)), strict=True))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    text = {"vocab_size": len(words), "hidden_size": width, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": rope}  # fmt: skip
    eye = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
           "out_hidden_size": width}  # fmt: skip
    if kind == "qwen3_vl":
        text["head_dim"], rope["mrope_interleaved"] = width // 2, True
        eye |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        return Qwen3VLConfig(text_config=text, vision_config=eye, **ids)
    eye |= {"window_size": 32, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=eye, **ids)


def save(kind: str, path: Path, width: int = 32) -> Path:
    words = tokenizer()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config(kind, words, width))
    for parameter in model.parameters():  # at the usual scale, logits hardly depend on the input
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(path)
    words.save_pretrained(path)
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    Qwen2VLImageProcessorPil(patch_size=8, size=size).save_pretrained(path)
    # What a published folder asks for, and a judge must not do.
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.5}
    (path / "generation_config.json").write_text(json.dumps(sampling))
    return path


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Iterator[LocalVLM]:
    model = LocalVLM(str(folder), device="cpu", batch=4, reason_tokens=12)
    yield model
    model.close()


def images(count: int, size: int = 32, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def questions(count: int, reason: bool = False) -> list[Question]:
    """Of different lengths, and with different numbers and sizes of images."""
    out = []
    for i in range(count):
        seen = [Picture(x) for x in images(1 + i % 2, (16, 32, 48)[i % 3], seed=i)]
        words = f"{'Is this good? ' * (1 + i)}Answer with one digit."
        out.append(Question("You grade.", ("Image:\n", *seen, words), SCALE, reason))
    return out


def ask(vlm: LocalVLM, asked: list[Question]) -> torch.Tensor:
    answers = vlm.result(vlm.submit(asked))
    assert all(a.failure is None for a in answers)
    return torch.tensor([a.probabilities for a in answers])


def by_hand(vlm: LocalVLM, folder: Path, question: Question, after: str = "") -> torch.Tensor:
    """The options' probabilities by the model's own classes, with the prompt spelled out."""
    processor = local_vlm.processor_of(folder)
    parts = (
        "<|vision_start|><|image_pad|><|vision_end|>" if isinstance(p, Picture) else p
        for p in question.parts
    )
    text = (
        f"{START}system\n{question.system}{END}\n{START}user\n{''.join(parts)}{END}\n"
        f"{START}assistant\n{after}"
    )
    seen = [vlm_image for p in question.parts if isinstance(p, Picture) for vlm_image in [p.array]]
    inputs = processor(text=[text], images=[seen], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        chances = model(**inputs).logits[0, -1].double().softmax(-1)
    words = processor.tokenizer
    vocabulary = words.get_vocab()
    out = [chances[vocabulary[d]] for d in question.options]
    out[3] += chances[vocabulary["Ġ4"]]
    return torch.stack(out).float()


# ---------------------------------------------------------------- answers


def test_probabilities_are_those_of_the_models_logits(vlm: LocalVLM, folder: Path) -> None:
    asked = questions(3)
    got = ask(vlm, asked)
    wanted = torch.stack([by_hand(vlm, folder, q) for q in asked])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    assert (got[0] - got[1]).abs().max() > 1e-4  # they do depend on the question


def test_a_batch_of_different_questions_equals_one_by_one(vlm: LocalVLM) -> None:
    asked = questions(7)
    together = ask(vlm, asked)
    apart = torch.cat([ask(vlm, [q]) for q in asked])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-7)
    backwards = ask(vlm, asked[::-1]).flip(0)
    torch.testing.assert_close(backwards, apart, rtol=1e-4, atol=1e-7)
    assert torch.equal(together, ask(vlm, asked))  # deterministic


def test_the_image_matters(vlm: LocalVLM) -> None:
    one, other = (
        Question("You grade.", (Picture(x), "How good?"), SCALE) for x in images(2, seed=5)
    )
    first, second = ask(vlm, [one, other])
    assert (first - second).abs().max() > 1e-5


def test_reasoning_comes_before_a_forced_score(vlm: LocalVLM, folder: Path) -> None:
    asked = questions(3, reason=True)
    got = ask(vlm, asked)
    processor, model = local_vlm.processor_of(folder), vlm._model
    for row, question in zip(got, asked, strict=True):
        inputs = vlm._inputs([vlm._text(question)], [[local_vlm._pil(p) for p in question.parts
                                                      if isinstance(p, Picture)]])  # fmt: skip
        start = inputs["input_ids"].shape[1]
        ids, written = dict(inputs), []
        for _ in range(12):  # greedy, by hand, without a cache
            word = model(**ids).logits[0, -1].argmax()
            if word == processor.tokenizer.eos_token_id:
                break
            written.append(int(word))
            more = {"input_ids": word, "attention_mask": torch.tensor(1),
                    "mm_token_type_ids": torch.tensor(0)}  # fmt: skip
            ids |= {k: torch.cat([ids[k], v.reshape(1, 1).to(ids[k])], 1) for k, v in more.items()}
        assert ids["input_ids"].shape[1] == start + len(written)
        thought = processor.tokenizer.decode(written, skip_special_tokens=True)
        thought = thought.replace("<|", "< |").replace("|>", "| >").rstrip()
        wanted = by_hand(vlm, folder, question, after=f"{thought}\n{MARKER} ")
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-7)


def test_an_image_that_the_processor_refuses_fails_alone(vlm: LocalVLM) -> None:
    asked = questions(4)
    thread = np.zeros((8, 2000, 3), np.uint8)  # 1 : 250
    asked[2] = Question("You grade.", (Picture(thread), "How good?"), SCALE)
    answers = vlm.result(vlm.submit(asked))
    assert [a.failure for a in answers] == [None, None, "refused", None]
    torch.testing.assert_close(
        torch.tensor(answers[3].probabilities), ask(vlm, questions(4))[3], rtol=1e-4, atol=1e-7
    )


def test_no_gradients_and_no_draws(vlm: LocalVLM) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ask(vlm, questions(1))
    ask(vlm, questions(1, reason=True))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert not any(p.requires_grad for p in vlm._model.parameters())
    assert not vlm._model.training
    modes: list[bool] = []
    hook = vlm._model.register_forward_hook(
        lambda *_: modes.append(torch.is_inference_mode_enabled())
    )
    ask(vlm, questions(2))
    hook.remove()
    assert modes == [True]


def test_options_count_in_all_their_spellings(vlm: LocalVLM, folder: Path) -> None:
    vocabulary = local_vlm.processor_of(folder).tokenizer.get_vocab()
    vlm.ready()
    assert vlm._ids("4").tolist() == sorted([vocabulary["4"], vocabulary["Ġ4"]])
    assert vlm._ids("3").tolist() == [vocabulary["3"]]
    with pytest.raises(InputError, match="no token for '四' alone"):
        vlm._ids("四")


@pytest.mark.parametrize("quantise", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_lower_precision_is_close(tmp_path: Path, quantise: str | None) -> None:
    if quantise is not None:
        pytest.importorskip("bitsandbytes")
    # bitsandbytes wants widths of 64 at the least.
    folder = save("qwen3_vl", tmp_path, width=64)
    full = LocalVLM(str(folder), device="cpu")
    low = LocalVLM(str(folder), device="cpu", dtype="bf16", quantise=quantise)
    asked = questions(3)
    exact, near = (ask(model, asked).log() for model in (full, low))
    assert 0 < (exact - near).abs().max() < (0.1 if quantise is None else 2.0)
    kinds = {
        n: type(m).__name__ for n, m in low._model.named_modules() if "Linear" in type(m).__name__
    }
    small = {n for n, kind in kinds.items() if kind == "Linear4bit"}
    language = {n for n in kinds if "visual" not in n and n != "lm_head"}
    assert small == (language if quantise else set())
    full.close()
    low.close()


# ---------------------------------------------------------------- as rewards


def batch_of(count: int) -> tuple[torch.Tensor, Batch]:
    pixels = torch.from_numpy(np.stack(images(count))).permute(0, 3, 1, 2)
    ids = torch.arange(count)
    prompts = tuple(f"a sign {'very ' * i}red" for i in range(count))
    return pixels, Batch(ids, prompts, None, ids, ({},) * count, (4, 4))


def test_a_judge_with_a_local_model(vlm: LocalVLM) -> None:
    pixels, batch = batch_of(5)
    judge = Judge(vlm, {"alignment": 1, "aesthetics": 1}, scale="0-9", least_mass=0.0)
    judge.ready()
    together = judge(pixels, batch)
    assert ((together["reward"] > 0) & (together["reward"] < 1)).all()
    rows = [torch.tensor([i]) for i in range(5)]
    apart = torch.cat([judge(pixels[i], batch.select(i))["reward"] for i in rows])
    torch.testing.assert_close(together["reward"], apart, rtol=1e-4, atol=1e-6)
    pending = judge.submit(pixels, batch)
    torch.testing.assert_close(judge.result(pending)["reward"], together["reward"], rtol=0, atol=0)
    # Random weights put next to nothing on digits, and the default does not take that for a grade.
    strict = Judge(vlm, {"alignment": 1})
    assert strict(pixels, batch)["reward"].isnan().all()
    assert strict.failures == {"low mass": 5}
    assert judge.card.cost == "heavy" and "licence" in judge.card.licence


def test_pairs_with_a_local_model_are_antisymmetric(vlm: LocalVLM) -> None:
    pixels, batch = batch_of(6)
    first, second, prompts = pixels[:3], pixels[3:], batch.prompts[:3]
    pairwise = Pairwise(vlm, least_mass=0.0)
    forward = pairwise.compare(first, second, prompts)
    backward = pairwise.compare(second, first, prompts)
    torch.testing.assert_close(forward + backward, torch.ones(3), rtol=0, atol=1e-5)
    same = pairwise.compare(first, first, prompts)
    torch.testing.assert_close(same, torch.full((3,), 0.5), rtol=0, atol=1e-5)


def test_submit_returns_at_once(vlm: LocalVLM) -> None:
    asked = questions(24)
    vlm.ready()
    start = time.monotonic()
    job = vlm.submit(asked)
    begun = time.monotonic() - start
    assert len(vlm.result(job)) == 24
    assert begun < 0.2 * (time.monotonic() - start)


# ---------------------------------------------------------------- before it is loaded


def test_the_engine_names_the_weights(folder: Path, tmp_path: Path) -> None:
    model = LocalVLM(str(folder), device="cpu")
    assert model.engine.startswith(f"vlm:{folder.name}:") and model.engine.endswith(":float32")
    other = shutil.copytree(folder, tmp_path / folder.name)
    assert LocalVLM(str(other), device="cpu").engine == model.engine
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert LocalVLM(str(other), device="cpu").engine != model.engine


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer_config.json", "has no tokenizer_config.json"),
        ("chat_template.jinja", "no chat template"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_a_folder_that_lacks_a_file(folder: Path, tmp_path: Path, file: str, what: str) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / file).unlink()
    with pytest.raises(Unavailable, match=what):
        LocalVLM(str(other), device="cpu")


def test_what_is_no_judge(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(content | {"model_type": "bert"}))
    with pytest.raises(InputError, match="of type 'bert', which does not read images"):
        LocalVLM(str(other), device="cpu")
    with pytest.raises(Unavailable, match="no folder"):
        LocalVLM(str(tmp_path / "nowhere"), device="cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for bad in ({"dtype": "int4"}, {"quantise": "fp3"}, {"batch": 0}, {"reason_tokens": 0}):
        with pytest.raises(InputError, match="local model:"):
            LocalVLM(str(folder), device="cpu", **bad)


def test_weights_that_are_not_whole(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "norm" not in k},
        other / "model.safetensors",
        {"format": "pt"},
    )
    model = LocalVLM(str(other), device="cpu")
    with pytest.raises(InputError, match=r"lacks .*norm"):
        model.ready()
    model.close()
