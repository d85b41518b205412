"""What a training stage refuses before it begins."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from flux2.checks import _check_best
from flux2.errors import InputError


@pytest.mark.parametrize(
    ("every", "save_every", "steps", "works"),
    [(10, 20, 40, True), (0, 20, 40, False), (10, 15, 40, False), (10, 20, 45, False)],
)
def test_the_best_checkpoint_needs_a_value_at_each(every, save_every, steps, works):
    train = {"best": ["ocr_exact", "max"], "save_every": save_every, "steps": steps}
    cfg = OmegaConf.create({"train": train, "evaluation": {"every": every}})
    if works:
        _check_best(cfg)
    else:
        with pytest.raises(InputError, match=r"train\.best"):
            _check_best(cfg)
    cfg.train.best = None
    _check_best(cfg)
