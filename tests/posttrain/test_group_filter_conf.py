"""Through the configuration: the filter axis, and the empty prompt only where a strength needs
it."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

import run
from posttrain._common import GroupFilter


def composed(*overrides: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "want"),
    [
        (("stage=grpo",), True),
        (("stage=grpo", "sampler.guidance=1"), False),
        (("stage=nft", "method.guidance=1"), False),
        (("stage=grpo", "sampler.guidance=1.0", "method.train_guidance=2"), True),
        (("stage=nft", "sampler.guidance=1", "anchor=guided", "method.anchor.guidance=3"), True),
        (("stage=awm", "sampler.guidance=1", "anchor=velocity"), False),
        (("stage=direct", "sampler.guidance=1"), False),
    ],
)
def test_the_empty_prompt_is_made_where_a_strength_needs_it(overrides, want: bool):
    assert composed(*overrides).data.collate.unconditional is want


def test_the_filter_is_an_axis_and_knows_the_batch():
    cfg = composed(
        "stage=awm", "filter=dynamic", "data.batch_size=24", "method.filter.oversample=3"
    )
    assert instantiate(cfg.method.filter) == GroupFilter(0.1, 3, 24)
    assert not instantiate(composed("stage=nft").method.filter).on
