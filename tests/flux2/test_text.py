"""Prompt features against diffusers' own pipelines."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, Qwen3ForCausalLM

from flux2 import sources
from flux2.adapters import Switch
from flux2.architecture import text_config
from flux2.errors import InputError
from flux2.latents import grid_ids
from flux2.nano import build_text_encoder, build_tokenizer
from flux2.roles import VelocityRole
from flux2.text import TextEncoder, attention_mask, language_model, text_ids
from flux2.types import Condition

CPU = torch.device("cpu")
PROMPTS = ['a red circle at the top, "TAXI" in white on black', "", "make the word cyan"]
DEV_LAYERS = (10, 20, 30)
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
       "num_attention_heads": 1, "head_dim": 16, "image_size": 28, "patch_size": 14}  # fmt: skip
BODY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "sliding_window": None}  # fmt: skip
MISTRAL = {"model_type": "mistral3", "text_config": BODY, "vision_config": EYE}


@pytest.fixture(scope="module")
def dev():
    """A whole Mistral3 with an eye and a head, and its tokenizer."""
    tokenizer = build_tokenizer(28, "mistral3")
    return build_text_encoder(MISTRAL, len(tokenizer), seed=0), tokenizer


# ---------------------------------------------------------------- klein


def test_features_equal_the_pipelines(tiny):
    for length in (24, 40, 9):  # 9 truncates
        mine = TextEncoder(tiny.text.encoder, tiny.text.tokenizer, length)
        with torch.no_grad():
            want = Flux2KleinPipeline._get_qwen3_prompt_embeds(
                tiny.text.encoder, tiny.text.tokenizer, PROMPTS, max_sequence_length=length
            )
        got = mine(PROMPTS)
        assert got.shape == (3, length, mine.dim) and want.std() > 0.1
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_prompts_differ_in_their_features(tiny):
    a, b = tiny.text(['"TAXI"', '"TAXX"'])
    assert (a - b).abs().max() > 0.1


def test_padding_is_on_the_right(tiny):
    mask = tiny.text.mask(PROMPTS).int()
    assert (mask.diff(dim=1) <= 0).all() and mask[:, 0].all() and not mask.all()


def test_ids_equal_the_pipelines():
    want = Flux2KleinPipeline._prepare_text_ids(torch.zeros(2, 5, 3))
    assert torch.equal(text_ids(2, 5), want)


def test_the_last_layer_is_refused(tiny):
    """Its output is normalised: another feature than the pipeline's users know."""
    with pytest.raises(InputError, match="text_layers"):
        TextEncoder(tiny.text.encoder, tiny.text.tokenizer, 24, (9, 18, 28))


def test_the_padding_side_is_the_models_whatever_the_tokenizer_says(tiny, dev):
    import copy

    for encoder, tokenizer, layers in (
        (tiny.text.encoder, tiny.text.tokenizer, (9, 18, 27)),
        (*dev, DEV_LAYERS),
    ):
        wrong = copy.deepcopy(tokenizer)
        wrong.padding_side = "left" if tokenizer.padding_side == "right" else "right"
        want = TextEncoder(encoder, tokenizer, 28, layers)
        got = TextEncoder(encoder, wrong, 28, layers)
        assert torch.equal(got.mask(PROMPTS), want.mask(PROMPTS))
        assert torch.equal(got(PROMPTS), want(PROMPTS))


# ---------------------------------------------------------------- dev


def test_features_equal_devs_pipeline(dev):
    encoder, tokenizer = dev
    for length in (28, 40, 12):  # 12 truncates
        mine = TextEncoder(encoder, tokenizer, length, DEV_LAYERS)
        with torch.no_grad():
            want = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
                encoder, tokenizer, PROMPTS, max_sequence_length=length
            )
        got = mine(PROMPTS)
        assert got.shape == (3, length, mine.dim) == (3, length, 96) and want.std() > 0.1
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_devs_prompts_have_the_system_message_and_are_padded_on_the_left(dev):
    encoder, tokenizer = dev
    mine = TextEncoder(encoder, tokenizer, 28, DEV_LAYERS)
    mask = mine.mask(PROMPTS).int()
    assert (mask.diff(dim=1) >= 0).all() and mask[:, -1].all() and not mask.all()
    (first, *_) = tokenizer.batch_decode(mine.tokens(PROMPTS)["input_ids"])
    turns = [f"<|im_start|>{x}<|im_end|>" for x in (SYSTEM_MESSAGE, PROMPTS[0])]
    assert first.endswith("".join(turns))
    # [IMG] would be taken for an image; the pipeline removes it.
    ids = mine.tokens(["a [IMG]sign", "a sign"])["input_ids"]
    assert torch.equal(ids[0], ids[1])


def test_the_tokenizer_alone_gives_what_devs_processor_gives(tmp_path, monkeypatch):
    """dev's pipeline is given a PixtralProcessor, whose other half reads images and wants
    torchvision. We load its tokenizer alone, and the tokens are the same: with a first token in the
    template, which must not come twice, and with a template that looks at roles."""
    absent = ModuleType("transformers.models.pixtral.image_processing_pixtral")
    absent.get_resize_output_image_size = None  # of images alone
    monkeypatch.setitem(sys.modules, absent.__name__, absent)
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    from flux2.model import quiet

    quiet()
    tokenizer = build_tokenizer(64, "mistral3")
    special = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]",
               "[IMG_END]"]  # fmt: skip
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": special})
    first = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]{% else %}"
        "[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
    )
    processor = PixtralProcessor(
        PixtralImageProcessorPil(), tokenizer, patch_size=14, chat_template=template
    )
    processor.save_pretrained(tmp_path)
    alone = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    encoder = build_text_encoder(MISTRAL, len(tokenizer), seed=0)
    mine = TextEncoder(encoder, alone, 16, DEV_LAYERS).tokens(PROMPTS)
    want = processor.apply_chat_template(
        format_input(PROMPTS), add_generation_prompt=False, tokenize=True, return_dict=True,
        return_tensors="pt", padding="max_length", truncation=True, max_length=16,
    )  # fmt: skip
    assert torch.equal(mine["input_ids"], want["input_ids"])
    assert torch.equal(mine["attention_mask"], want["attention_mask"])
    assert (mine["input_ids"] == first).sum(1).tolist() == [1, 1, 1]


# ---------------------------------------------------------------- cut off after the last layer used


def test_a_truncated_qwen_equals_the_whole_to_the_bit(tiny, tmp_path):
    encoder = tiny.text.encoder
    encoder.save_pretrained(tmp_path)
    for layers in ((9, 18, 27), (2, 5)):
        cut = sources.load_text_encoder(tmp_path, encoder.config, layers, CPU, torch.float32)
        assert len(cut.layers) == max(layers) and "lm_head" not in dict(cut.named_modules())
        whole = TextEncoder(encoder, tiny.text.tokenizer, 24, layers)
        mine = TextEncoder(cut, tiny.text.tokenizer, 24, layers, source=tmp_path)
        assert torch.equal(mine(PROMPTS), whole(PROMPTS)) and mine.dim == whole.dim
    cut.norm = Qwen3ForCausalLM(encoder.config).model.norm  # what would be wrong
    assert not torch.equal(TextEncoder(cut, tiny.text.tokenizer, 24, layers, source=tmp_path)(
        PROMPTS), whole(PROMPTS))  # fmt: skip


@pytest.mark.parametrize("old_names", [False, True])
def test_a_truncated_mistral_equals_the_whole_to_the_bit(dev, tmp_path, old_names):
    """Whatever the file calls them: transformers has changed the names of Mistral3's weights."""
    from safetensors.torch import load_file, save_file

    encoder, tokenizer = dev
    encoder.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    old = any(k.startswith("language_model.model.") for k in state)
    if old != old_names:
        a, b = "language_model.model.", "model.language_model."
        a, b = (a, b) if old else (b, a)
        save_file({k.replace(a, b): v for k, v in state.items()}, path, {"format": "pt"})
    config = text_config(MISTRAL, len(tokenizer))
    cut = sources.load_text_encoder(tmp_path, config, DEV_LAYERS, CPU, torch.float32)
    assert len(cut.layers) == 30 and not any("vision" in k for k, _ in cut.named_modules())
    weights = language_model(encoder).state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in cut.state_dict().items())
    sources.check_folder(tmp_path, "text_encoder", cut)
    whole = TextEncoder(encoder, tokenizer, 28, DEV_LAYERS)
    mine = TextEncoder(cut, tokenizer, 28, DEV_LAYERS, source=tmp_path)
    assert torch.equal(mine(PROMPTS), whole(PROMPTS))


def test_the_features_of_a_bf16_encoder_are_its_own(tiny):
    """Remembered as they are and given in fp32, which adds nothing."""
    import copy

    encoder = copy.deepcopy(tiny.text.encoder).bfloat16()
    mine = TextEncoder(encoder, tiny.text.tokenizer, 24)
    with torch.no_grad():
        want = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            encoder, tiny.text.tokenizer, PROMPTS, max_sequence_length=24
        )
    assert want.dtype == torch.bfloat16 and mine(PROMPTS).dtype == torch.float32
    assert torch.equal(mine(PROMPTS), want.float())


# ---------------------------------------------------------------- masking


@pytest.mark.parametrize("name", ["klein", "dev"])
def test_masking_padding_equals_truncating_to_the_real_tokens(tiny, dev, name):
    """Through the encoder's own mask and the transformer: padding on the right, or on the left."""
    text = tiny.text if name == "klein" else TextEncoder(*dev, 28, DEV_LAYERS)
    features, real = text(PROMPTS), text.mask(PROMPTS)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 6, 128, generator=g), torch.tensor([0.2, 0.5, 0.9])
    ids, places = grid_ids((2, 3)).expand(3, -1, -1), text_ids(3, text.max_length)
    role = VelocityRole(tiny.transformer, Switch(tiny.transformer), None, None)
    with torch.no_grad():
        cond = Condition(features, places, ids, mask=attention_mask(real, 6))
        got = role(x, t, cond)
        for i in range(3):
            one = slice(i, i + 1)
            kept = real[i]
            short = Condition(features[one, kept], places[one, kept], ids[one])
            want = role(x[one], t[one], short)
            torch.testing.assert_close(got[one], want, atol=1e-6, rtol=1e-6)
        all_in = role(x, t, Condition(features, places, ids))
    assert (all_in - got).abs().max() > 1e-3  # without the option padding takes part


def test_an_attention_mask_lets_all_image_tokens_in():
    mask = attention_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]), 2)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False, True, True], [True, False, False, True, True]]


# ---------------------------------------------------------------- memory


def test_memory_returns_the_same_and_does_not_run_twice(tiny, monkeypatch):
    mine = TextEncoder(tiny.text.encoder, tiny.text.tokenizer, 24)
    first = mine(PROMPTS)
    runs = []
    encode = mine._encode
    monkeypatch.setattr(mine, "_encode", lambda p: runs.append(list(p)) or encode(p))
    assert torch.equal(mine(PROMPTS[::-1]), first.flip(0)) and not runs
    new = mine([PROMPTS[0], "new", "new"])
    assert runs == [["new"]] and torch.equal(new[0], first[0]) and torch.equal(new[1], new[2])


def test_memory_is_bounded(tiny):
    size = 4 * tiny.text.dim * 24
    mine = TextEncoder(tiny.text.encoder, tiny.text.tokenizer, 24, remember=2 * size)
    first = mine(["one"])
    mine(["two"])
    mine(["three"])
    assert len(mine._seen) <= 2
    torch.testing.assert_close(mine(["one"]), first)


def test_long_sequences_are_encoded_a_few_at_a_time(tiny, monkeypatch):
    mine = TextEncoder(tiny.text.encoder, tiny.text.tokenizer, 24)
    sizes = []
    encode = mine._encode
    monkeypatch.setattr(mine, "_encode", lambda p: sizes.append(len(p)) or encode(p))
    monkeypatch.setattr("flux2.text.AT_ONCE", 60)
    mine([f"sign {i}" for i in range(5)])
    assert sizes == [2, 2, 1]


def test_a_released_encoder_is_gone_and_what_it_said_is_kept(dev):
    import copy
    import weakref

    mine = TextEncoder(copy.deepcopy(dev[0]), dev[1], 28, DEV_LAYERS)
    first = mine(PROMPTS)
    weight = weakref.ref(next(mine.encoder.parameters()))
    mine.release()
    assert weight() is None and mine.encoder is None
    assert torch.equal(mine(PROMPTS), first) and mine.dim == 96
    assert mine.mask(PROMPTS).any()
    with pytest.raises(InputError, match="was freed and has not seen the prompt 'new'"):
        mine([PROMPTS[0], "new"])
    assert torch.equal(mine(PROMPTS), first)


def test_the_encoder_is_frozen(tiny):
    assert not tiny.text.encoder.training
    assert not any(p.requires_grad for p in tiny.text.encoder.parameters())
