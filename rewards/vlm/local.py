"""A judge or writer in this process: a vision-language model of transformers (Qwen3-VL,
Qwen2.5-VL), or, for writing alone, a language model.

A judge's answer is read from the logits after the question, or, with reasoning, from those after
what the model wrote and a forced "Score:", decoded greedily. What a writer draws depends on the
request's seed, and on nothing else that is asked at the same time.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from PIL import Image
from torch import Tensor

from flux2.distributed import pick_device
from flux2.errors import InputError
from flux2.rng import keyed
from flux2.sources import fingerprint, pretrained, read_json
from rewards.base import Unavailable
from rewards.nets.weights import weight_files, weights_folder
from rewards.vlm.model import (
    MARKER,
    Answer,
    Picture,
    Question,
    Request,
    Written,
    option_of,
    plain,
)

log = logging.getLogger(__name__)

A = TypeVar("A", Question, Request)
B = TypeVar("B", Answer, Written)

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REFUSED: Final = Answer(None, "refused")
FULL_WIDTH: Final = 0xFEE0
"""From a plain character to its full-width form."""


class LocalVLM:
    """A model from a folder or the hub, run on a thread of its own.

    Args:
        path: a folder in transformers' layout, or a hub id as Qwen/Qwen3-VL-8B-Instruct.
        device: "auto", "cpu", "cuda" or "cuda:1". Beside the policy on one GPU it takes turns with
            the sampling; on another it runs meanwhile.
        dtype: "auto" is bf16 on CUDA and fp32 on the CPU.
        batch: questions at a time.
        quantise: "nf4" keeps the language model in 4 bits (bitsandbytes); None as it is.
        reason_tokens: of the reasoning, at most.
        sees: false for a language model, which cannot judge, and writes without seeing images.

    Raises:
        Unavailable: the weights are not there, or bitsandbytes is not.
        InputError: for bad arguments, or a model that does not take images (text, without `sees`).
    """

    cost = "heavy"
    licence = "the model's own licence: read what it says of using its outputs in training"

    def __init__(
        self,
        path: str,
        device: str = "auto",
        dtype: str = "auto",
        batch: int = 8,
        quantise: str | None = None,
        reason_tokens: int = 384,
        sees: bool = True,
    ) -> None:
        if dtype not in ("auto", *DTYPES) or quantise not in (None, "nf4"):
            raise InputError(
                f"local model: dtype={dtype}, quantise={quantise}: choose from auto, "
                f"{', '.join(DTYPES)}, and nf4 or null"
            )
        if batch < 1 or reason_tokens < 1:
            raise InputError(f"local model: batch={batch}, reason_tokens={reason_tokens}: use ≥ 1")
        if quantise and importlib.util.find_spec("bitsandbytes") is None:
            raise Unavailable("local model: quantise=nf4 needs bitsandbytes: pip install it")
        self.device = pick_device(device)
        self.path, self.batch, self.quantise = path, batch, quantise
        self.reason_tokens, self.sees = reason_tokens, sees
        kind = ("bf16" if self.device.type == "cuda" else "fp32") if dtype == "auto" else dtype
        self.dtype = DTYPES[kind]
        self.folder = weights_folder(path, ("config.json", "tokenizer_config.json"))
        _check(self.folder, sees)
        self._hash: str | None = None
        self._model: Any = None
        self._options: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")

    @property
    def engine(self) -> str:
        """The model's name, the hash of its weights, and their precision."""
        if self._hash is None:
            self._hash = fingerprint(weight_files(self.folder))[:12]
        name = self.path if not Path(self.path).expanduser().is_dir() else self.folder.name
        kind = self.quantise or str(self.dtype).removeprefix("torch.")
        return f"vlm:{name}:{self._hash}:{kind}".translate(str.maketrans("()", "[]"))

    # ------------------------------------------------------------ the model's protocol

    def ready(self) -> None:
        """Waits until the model is loaded. Raises InputError where its files are not whole."""
        self._thread.submit(self._load).result()

    def submit(self, questions: Sequence[Question]) -> Future[list[Answer]]:
        """Starts on the questions and returns at once."""
        return self._thread.submit(self._all, list(questions))

    def result(self, pending: Future[list[Answer]]) -> list[Answer]:
        """Waits for what submit started; answers in order."""
        return pending.result()

    def write(self, requests: Sequence[Request]) -> Future[list[Written]]:
        """Starts on the requests and returns at once."""
        return self._thread.submit(self._written, list(requests))

    def written(self, pending: Future[list[Written]]) -> list[Written]:
        """Waits for what write started; answers in order."""
        return pending.result()

    def close(self) -> None:
        """Ends the thread, after what it is at, and frees the model."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._model = None

    # ------------------------------------------------------------ its thread

    def _load(self) -> None:
        if self._model is not None:
            return
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoTokenizer,
            GenerationConfig,
        )

        if self.sees:
            self.processor = processor_of(self.folder)
            self.tokenizer = self.processor.tokenizer
        else:
            self.tokenizer = pretrained(AutoTokenizer, self.folder)
        more: dict[str, Any] = {}
        if self.device.type != "cpu":
            more["device_map"] = {"": self.device}
        if self.quantise:
            more["quantization_config"] = _nf4(self.dtype)
        model, info = pretrained(
            AutoModelForImageTextToText if self.sees else AutoModelForCausalLM,
            self.folder,
            dtype=self.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **more,
        )
        if missing := sorted(info["missing_keys"]):
            raise InputError(f"{self.folder} lacks {missing[0]}: restore the folder's weights")
        tokenizer = self.tokenizer
        # The folder's own asks for sampling and for penalties.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.reason_tokens,
            eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self._model = model.eval().requires_grad_(False)

    @torch.inference_mode()
    def _all(self, questions: list[Question]) -> list[Answer]:
        self._load()
        answers: dict[int, Answer] = {}
        for reason in (False, True):
            rows = [i for i, q in enumerate(questions) if q.reason == reason]
            for start in range(0, len(rows), self.batch):
                part = rows[start : start + self.batch]
                some = self._some([questions[i] for i in part], self._batch, REFUSED)
                answers |= zip(part, some, strict=True)
        return [answers[i] for i in range(len(questions))]

    @torch.inference_mode()
    def _written(self, requests: list[Request]) -> list[Written]:
        self._load()
        refused = Written("", "refused")
        parts = [requests[k : k + self.batch] for k in range(0, len(requests), self.batch)]
        return [w for part in parts for w in self._some(part, self._draft, refused)]

    def _some(
        self, asked: Sequence[A], batch: Callable[[Sequence[A]], list[B]], refused: B
    ) -> list[B]:
        try:
            return batch(asked)
        except ValueError as error:  # an image that the processor refuses, as one of 1 : 200
            if len(asked) > 1:
                return [a for q in asked for a in self._some([q], batch, refused)]
            log.warning("a question could not be asked: %s", str(error).split("\n")[0])
            return [refused]

    def _batch(self, questions: Sequence[Question]) -> list[Answer]:
        texts = [self._text(q) for q in questions]
        images = [[_pil(p) for p in q.parts if isinstance(p, Picture)] for q in questions]
        if questions[0].reason:
            inputs = self._inputs(texts, images)
            written = self._model.generate(
                **inputs, stop_strings=[MARKER], tokenizer=self.tokenizer
            )
            words = self.tokenizer.batch_decode(
                written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            thoughts = (plain(w.partition(MARKER)[0]).rstrip() for w in words)
            texts = [f"{t}{w}\n{MARKER} " for t, w in zip(texts, thoughts, strict=True)]
        inputs = self._inputs(texts, images)
        logits = self._model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        chances = logits.float().softmax(-1)
        return [
            Answer(tuple(row[self._ids(option)].sum().item() for option in question.options))
            for row, question in zip(chances, questions, strict=True)
        ]

    def _draft(self, requests: Sequence[Request]) -> list[Written]:
        images = [[_pil(p) for p in r.parts if isinstance(p, Picture)] for r in requests]
        inputs = self._inputs([self._text(r) for r in requests], images)
        begin = inputs["input_ids"].shape[1]
        drawn = self._model.generate(
            **inputs,
            max_new_tokens=max(r.tokens for r in requests),
            logits_processor=[_Draw(tuple((r.temperature, r.seed) for r in requests), begin)],
        )[:, begin:]
        ends = self._model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends)
        out = []
        for row, request in zip(drawn.tolist(), requests, strict=True):
            length = next((k for k, token in enumerate(row) if token in ends), len(row) + 1)
            if length > request.tokens:
                out.append(Written("", "too long"))
                continue
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            out.append(Written(text) if text.strip() else Written("", "no words"))
        return out

    def _text(self, asked: Question | Request) -> str:
        if not self.sees:
            if any(isinstance(p, Picture) for p in asked.parts):
                raise InputError(f"{self.folder} sees no images: choose a vision-language model")
            template, content = self.tokenizer, "".join(str(p) for p in asked.parts)
        else:
            template = self.processor
            content = [
                {"type": "image"} if isinstance(p, Picture) else {"type": "text", "text": p}
                for p in asked.parts
            ]
        messages = [
            {"role": "system", "content": asked.system},
            {"role": "user", "content": content},
        ]
        # A judge's thinking is the question's own affair (`reason`); a writer's would be its text.
        thinks = isinstance(asked, Request) and "enable_thinking" in str(template.chat_template)
        more = {"enable_thinking": False} if thinks else {}
        return template.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **more
        )

    def _inputs(self, texts: Sequence[str], images: Sequence[Any]) -> Any:
        # The answer stands at the end of each row, so padding must not.
        if self.sees:
            shown = [image for row in images for image in row]  # in the order of their places
            encode, more = self.processor, {"images": shown or None}
        else:
            encode, more = self.tokenizer, {}
        return encode(
            text=list(texts), **more, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.device)

    def _ids(self, option: str) -> Tensor:
        """The tokens that say an option: alone, after a space or a new line, full-width."""
        if option not in self._options:
            tokenizer = self.tokenizer
            spelled = [option, f" {option}", f"\n{option}", chr(ord(option) + FULL_WIDTH)]
            coded = [tokenizer.encode(s, add_special_tokens=False) for s in spelled]
            ids = {c[0] for c in coded if len(c) == 1 and option_of(tokenizer.decode(c)) == option}
            if not ids:
                raise InputError(
                    f"{self.folder}: its tokenizer has no token for {option!r} alone: choose "
                    "another model"
                )
            self._options[option] = torch.tensor(sorted(ids), device=self.device)
        return self._options[option]


@dataclass(frozen=True)
class _Draw:
    """Leaves, of each row's logits, the token that is drawn: by its own seed and place, so that a
    text does not depend on what is written beside it.

    rows: (temperature, seed) of each. begin: where the answers begin.
    """

    rows: tuple[tuple[float, int], ...]
    begin: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Both b v."""
        place = input_ids.shape[1] - self.begin
        tokens = []
        for logits, (temperature, seed) in zip(scores, self.rows, strict=True):
            if temperature == 0:
                tokens.append(logits.argmax())
                continue
            # The inverse of the distribution function at one uniform number.
            up_to = (logits.double() / temperature).softmax(-1).cumsum(-1)
            u = keyed(seed, "written", place).random() * float(up_to[-1])
            tokens.append((up_to <= u).sum().clamp(max=len(logits) - 1))
        chosen = torch.stack(tokens)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def processor_of(folder: Path) -> Any:
    """The folder's processor for text and images: its own class, without the part for videos, which
    needs torchvision, and always with PIL for images, so that a score does not depend on whether
    torchvision is installed.

    Raises:
        InputError: the folder's files are not whole.
    """
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = pretrained(AutoConfig, folder)
    base: Any = PROCESSOR_MAPPING[type(config)]
    parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
    stills = type(base.__name__, (base,), {"get_attributes": parts})
    return pretrained(stills, folder, backend="pil")


def _check(folder: Path, sees: bool) -> None:
    """Refuses a model that does not take what it must, or whose chat template is missing."""
    from transformers.models.auto import modeling_auto as known

    kind = read_json(folder / "config.json").get("model_type")
    if sees and kind not in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        more = "" if kind not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else (
            ", or, to write without seeing images, set sees=false"
        )  # fmt: skip
        raise InputError(
            f"{folder} holds a model of type {kind!r}, which does not read images and text: choose "
            f"a Qwen3-VL or Qwen2.5-VL{more}"
        )
    if not sees and kind not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{folder} holds a model of type {kind!r}, no language model: set sees=true"
        )
    files = ("chat_template.jinja", "chat_template.json")
    told = read_json(folder / "tokenizer_config.json").get("chat_template")
    if told is None and not any((folder / name).is_file() for name in files):
        raise Unavailable(f"{folder} has no chat template ({files[0]}): restore the folder")


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "visual", "model.visual"],
    )


def _pil(picture: Picture) -> Image.Image:
    return Image.fromarray(picture.array)
