"""The arithmetic of merging, against hand computation; what may not be merged."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flux2 import adapters
from flux2.adapters import LoRA
from flux2.checkpoint import write_checkpoint
from flux2.errors import InputError
from flux2.formats import Adapter
from flux2.merge import (
    Source,
    check_adapters,
    check_parents,
    combined,
    joined,
    of_folder,
    parents_of,
    parts_of,
    put,
)


def layer(seed: int, dtype: torch.dtype = torch.float32) -> Source:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=g) * 10.0 ** torch.randint(-12, 3, (5, 7), generator=g)
    return Source.of({"weight": weight.to(dtype)})


def test_a_merged_layer_is_the_hand_computed_one():
    a, b, base = (s.read("weight").tolist() for s in map(layer, (1, 2, 3)))
    w = (0.75, 0.5)  # task arithmetic: the sum is not 1
    got = combined("weight", parts_of(w, [layer(1), layer(2)], layer(3)))
    for i in range(5):
        for j in range(7):
            o = base[i][j]
            want = o + w[0] * (a[i][j] - o) + w[1] * (b[i][j] - o)
            assert float(got[i, j]) == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (0.1,) * 10, (1.7, -0.7)])
def test_merging_identical_weights_gives_them_bit_for_bit(weights, dtype):
    source = layer(4, dtype)
    source.read("weight")[0, 0] = -0.0
    network = nn.Linear(7, 5, bias=False, dtype=dtype)
    put(network, parts_of(weights, [source] * len(weights), None))
    got, want = network.weight.detach(), source.read("weight")
    assert torch.equal(got, want)
    if min(weights) > 0:  # 1.7·(−0) − 0.7·(−0) is +0
        assert torch.signbit(got[0, 0])


def test_weights_of_sum_1_do_not_read_the_base():
    def never(name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")

    base = Source({"weight": (5, 7)}, never)
    tenths = (0.1,) * 10  # whose sum is not exactly 1
    assert len(parts_of(tenths, [layer(1)] * 10, base)) == 10
    assert parts_of((1.0, 0.0), [layer(1), base], base)[0][0] == 1.0
    assert len(parts_of((1.0, 0.0), [layer(1), base], base)) == 1  # nor what has no weight
    assert [w for w, _ in parts_of((1.0, 1.0), [layer(1), layer(2)], base)] == [1, 1, -1]


def test_no_source_is_held_whole():
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.ones(8, 8)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    names = [f"l{k}" for k in range(10)]
    network = nn.ModuleDict({k: nn.Linear(8, 8, bias=False) for k in names})
    source = Source({f"{k}.weight": (8, 8) for k in names}, read)
    put(network, [(0.5, source), (0.5, source)])
    assert most == 1


def adapter(seed: int, rank: int, scale: float, paths: tuple[str, ...]) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    pairs = {p: (torch.randn(rank, 7, generator=g), torch.randn(5, rank, generator=g))
             for p in paths}  # fmt: skip
    return Adapter(pairs, scale)


def test_adapters_are_joined_exactly_and_not_factor_by_factor():
    one, two = adapter(1, 3, 0.5, ("x", "y")), adapter(2, 4, 2.0, ("y", "z"))
    got = joined([one, two], [0.25, -1.5])
    assert got.scale == 1.0 and {k: a.shape[0] for k, (a, _) in got.pairs.items()} == {
        "x": 3, "y": 7, "z": 4,
    }  # fmt: skip
    torch.testing.assert_close(got.delta("x"), 0.25 * one.delta("x"))
    torch.testing.assert_close(got.delta("z"), -1.5 * two.delta("z"))
    want = 0.25 * one.delta("y") - 1.5 * two.delta("y")
    torch.testing.assert_close(got.delta("y"), want, rtol=1e-5, atol=1e-5)
    # What averaging A and B would give is something else altogether.
    three = adapter(3, 3, 0.5, ("x",))
    half = [(one.pairs["x"][k] + three.pairs["x"][k]) / 2 for k in (0, 1)]
    wrong = 0.5 * half[1] @ half[0]
    right = joined([one, three], [0.5, 0.5]).delta("x")
    assert (wrong - right).norm() > 0.3 * right.norm()
    assert joined([one, two], [1.0, 0.0]).pairs.keys() == {"x", "y"}
    with pytest.raises(InputError, match="no adapter is left"):
        joined([one, two], [0.0, 0.0])
    other = Adapter({"x": (torch.zeros(2, 9), torch.zeros(5, 2))}, 1.0)
    with pytest.raises(InputError, match="x does not fit"):
        joined([one, other], [0.5, 0.5])


def test_a_folder_of_shards_is_read_tensor_by_tensor(tiny, tmp_path):
    tiny.transformer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source, state = of_folder(tmp_path), tiny.transformer.state_dict()
    assert source.shapes == {k: tuple(v.shape) for k, v in state.items()}
    assert all(torch.equal(source.read(k), v) for k, v in state.items())


# ---------------------------------------------------------------- runs


def make_run(folder: Path, cfg: Any, tensors: dict[str, torch.Tensor], **facts: Any) -> Path:
    """A run directory with a checkpoint of these tensors, of a model that began with random
    weights."""
    from omegaconf import OmegaConf

    folder.mkdir()
    more = {k: facts.pop(k) for k in ("adapter", "init_from", "seed") if k in facts}
    run = {"model": cfg, "adapter": None, "init_from": None, "seed": 0, "allow": [], **more}
    OmegaConf.save(OmegaConf.create(run), folder / "config.yaml")
    manifest = {"id": folder.name, "stage": "sft", "model": cfg.name, "model_role": "base",
                "result_role": "base", "seed": run["seed"], "parents": [], "status": "done",
                "base": {"source": "", "hash": ""}, "trained": ["model"], **facts}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    named = {f"model/{k}": v for k, v in tensors.items()}
    write_checkpoint(folder / "checkpoints", 1, named, {}, {})
    return folder


def lora_tensors(tiny: Any, rank: int, seed: int) -> dict[str, torch.Tensor]:
    adapters.add(tiny.transformer, LoRA(rank, 3.0, ["to_q"]), "model")
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=g)
            for k, p in adapters.parameters(tiny.transformer, "model").items()}  # fmt: skip


def test_a_lora_run_is_its_base_and_its_product(tiny, tiny_config, tmp_path):
    plain = {k: v.clone() for k, v in tiny.transformer.state_dict().items()}
    tensors = lora_tensors(tiny, 2, 0)
    shape = {"rank": 2, "alpha": 3.0, "targets": ["to_q"]}
    [parent] = parents_of([str(make_run(tmp_path / "a", tiny_config, tensors, adapter=shape))])
    with torch.no_grad():
        for k, p in adapters.parameters(tiny.transformer, "model").items():
            p.copy_(tensors[k])
    want = adapters.merged(tiny.transformer, "model")
    assert parent.weights.shapes == {k: tuple(v.shape) for k, v in want.items()}
    changed = 0
    for name, value in want.items():
        got = parent.weights.read(name)
        changed += not torch.equal(value, plain[name])
        torch.testing.assert_close(got.float(), value, rtol=1e-5, atol=1e-5)
    assert changed == len(tensors) // 2


def test_full_results_keep_their_own_tensors(tiny, tiny_config, tmp_path):
    state = tiny.transformer.state_dict()
    [parent] = parents_of([str(make_run(tmp_path / "a", tiny_config, state))])
    assert parent.adapter is None and parent.roots == {"random tiny, seed 0"}
    assert all(torch.equal(parent.weights.read(k), v) for k, v in state.items())


def test_what_does_not_fit_is_refused_with_both_names(tiny, tiny_config, tmp_path):
    state = tiny.transformer.state_dict()

    def run(name: str, tensors: Any = state, **facts: Any) -> Any:
        return parents_of([str(make_run(tmp_path / name, tiny_config, tensors, **facts))])[0]

    first = run("first")
    check_parents([first, run("second")], (), tasks=False)
    with pytest.raises(InputError, match=r"first and .*other are base and distilled"):
        check_parents([first, run("other", result_role="distilled")], (), False)
    elsewhere = run("elsewhere", seed=7)
    with pytest.raises(InputError, match=r"different base models.*allow=\[base\]"):
        check_parents([first, elsewhere], (), False)
    check_parents([first, elsewhere], ("base",), False)
    with pytest.raises(InputError, match="started from different weights"):
        check_parents([first, elsewhere], ("base",), True)
    small = {k: v[:1] if k == "proj_out.weight" else v for k, v in state.items()}
    with pytest.raises(InputError, match=r"different architectures: proj_out.weight is 128×"):
        check_parents([first, run("small", small)], (), False)
    with pytest.raises(InputError, match="different autoencoders"):
        third = run("third")
        third.config.model.vae = str(tmp_path / "vae.safetensors")
        (tmp_path / "vae.safetensors").write_bytes(b"another")
        check_parents([first, third], (), False)
    with pytest.raises(InputError, match="has no adapter"):
        check_adapters([first])
    failed = make_run(tmp_path / "failed", tiny_config, state, status="failed")
    with pytest.raises(InputError, match="failed is failed"):
        parents_of([str(failed)])
    assert parents_of([str(failed / "checkpoints" / "step_000001")])  # it is whole, and was named
    with pytest.raises(InputError, match="trained no transformer"):
        parents_of([str(make_run(tmp_path / "vae", tiny_config, {}, trained=["autoencoder"]))])
    with pytest.raises(InputError, match="no run"):
        parents_of([str(tmp_path / "nowhere")])


def test_a_base_that_changed_since_is_refused(tiny_config, tiny, tmp_path):
    from tests.flux2.test_model import at, write

    folder = write(tiny, tmp_path / "model")
    cfg = at(tiny_config, folder)
    tensors, shape = lora_tensors(tiny, 2, 0), {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}
    base = {"source": str(folder), "hash": "0123456789abcdef"}
    run = make_run(tmp_path / "a", cfg, tensors, adapter=shape, base=base)
    with pytest.raises(InputError, match=r"started from has changed since.*allow=\[base\]"):
        _ = parents_of([str(run)])[0].weights
    assert parents_of([str(run)], ["base"])[0].weights.shapes  # as the message says
