"""Weights that several runs' results make together, tensor by tensor.

    θ = θ_base + Σ_i w_i·(θ_i − θ_base) = (1 − Σ w_i)·θ_base + Σ_i w_i·θ_i

Where the weights sum to 1 this is linear interpolation, a model soup (arXiv 2203.05482), and the
base is not read; any other sum is task arithmetic (arXiv 2212.04089), for which all runs must have
started from the same weights. Sums are in fp64 and rounded once, so that a model merged with itself
is that model, bit for bit.

The weighted sum of ΔW = s·B A is not that of A and of B. Adapters are joined exactly instead:
Σ w_i·s_i·B_i A_i = [w_1 s_1 B_1 … w_n s_n B_n] [A_1; …; A_n], whose rank is the sum of theirs.

Nothing is read whole: a source says its shapes, and gives a tensor when it is asked for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from flux2 import architecture, sources
from flux2.checkpoint import load_checkpoint
from flux2.errors import InputError
from flux2.formats import Adapter
from flux2.lineage import (
    Init,
    find_init,
    inserted,
    manifests_of,
    resolve_init,
    result_role,
)
from flux2.model import DTYPES, KEPT, load_model
from flux2.shards import Tensors

EXACT = 1e-9
"""How far a sum of weights may be from 1, by rounding alone, for the base not to count."""


# ---------------------------------------------------------------- the arithmetic


@dataclass(frozen=True, eq=False)
class Source:
    """A transformer's weights by diffusers' names.

    Attributes:
        shapes: of all of them.
        read: name → that tensor, on the CPU.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Source:
        """Tensors that are there."""
        return Source({k: tuple(v.shape) for k, v in tensors.items()}, lambda k: tensors[k])


def combined(
    name: str, parts: Sequence[tuple[float, Source]], device: torch.device | None = None
) -> Tensor:
    """Σ w·θ of one tensor, fp64."""
    total: Tensor | None = None
    for weight, source in parts:
        value = source.read(name).to(device or "cpu", torch.float64)
        # The first is multiplied, not added to 0, which would lose the sign of −0.
        total = weight * value if total is None else total.add_(value, alpha=weight)
        del value  # before the next is read
    if total is None:
        raise ValueError("no part has a weight")
    return total


def parts_of(
    weights: Sequence[float], results: Sequence[Source], base: Source | None
) -> list[tuple[float, Source]]:
    """(weight, source) of all that counts: the results, and the base where the sum is not 1."""
    rest = 1 - math.fsum(weights)
    out = [(w, r) for w, r in zip(weights, results, strict=True) if w != 0]
    if abs(rest) > EXACT:
        assert base is not None, "a sum other than 1 needs the base"
        out.append((rest, base))
    return out


@torch.no_grad()
def put(network: nn.Module, parts: Sequence[tuple[float, Source]]) -> None:
    """Σ w·θ into a network, in place, in its own dtype: one tensor of fp64 at a time."""
    for name, tensor in network.state_dict().items():
        tensor.copy_(combined(name, parts, tensor.device))


def joined(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter that is Σ w_i·ΔW_i exactly, of scale 1. Ranks add up; a layer that only some of
    them have has only theirs.

    Raises:
        InputError: two of them do not fit one layer.
    """
    given = [(w, a) for w, a in zip(weights, adapters, strict=True) if w != 0]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path in sorted({path for _, a in given for path in a.pairs}):
        mine = [(w * x.scale, *x.pairs[path]) for w, x in given if path in x.pairs]
        if len({(a.shape[1], b.shape[0]) for _, a, b in mine}) > 1:
            raise InputError(f"the adapters are for different models: {path} does not fit")
        down = torch.cat([a.detach().float() for _, a, _ in mine])
        up = torch.cat([s * b.detach().float() for s, _, b in mine], 1)
        pairs[path] = (down, up)
    if not pairs:
        raise InputError("all weights are 0: no adapter is left to be merged")
    return Adapter(pairs, 1.0)


# ---------------------------------------------------------------- where weights lie


def of_folder(folder: Path) -> Source:
    """A diffusers transformer's folder, one file or shards."""
    shapes: dict[str, tuple[int, ...]] = {}
    index: dict[str, str] = {}
    for path in sources.files(folder, "transformer"):
        for name, (shape, _) in sources.header(path).items():
            shapes[name], index[name] = shape, path.name
    return Source(shapes, Tensors(folder, index).__getitem__)


def of_model(cfg: Any, seed: int) -> tuple[str, Source]:
    """(what tells them from other weights, the weights) of conf/model. Random ones are drawn.

    Raises:
        InputError: the model is not at hand.
    """
    if cfg.path is None:
        plain = cfg.copy()
        plain.quantise = None
        state = load_model(plain, torch.device("cpu"), seed).transformer.state_dict()
        return random_id(cfg.name, seed), Source.of(state)
    left_out = sources.left_out(cfg)
    folder = sources.locate(cfg.path, download=True, leave_out=left_out)
    assert folder is not None
    if left_out is None:
        found = sources.files(folder / "transformer", "transformer")
        return sources.fingerprint(found), of_folder(folder / "transformer")
    from safetensors.torch import load_file

    file = Path(cfg.transformer)
    shape = architecture.expected(cfg)
    with torch.device("meta"):
        empty = architecture.build("transformer", (shape or {})["transformer"])
    state = sources.original(load_file(file), "transformer", empty)  # mapped, not read
    return sources.fingerprint([file]), Source.of(state)


def random_id(name: str, seed: int) -> str:
    """What tells one model of random weights from another."""
    return f"random {name}, seed {seed}"


@dataclass(frozen=True, eq=False)
class Parent:
    """A run's result.

    Attributes:
        init: where its weights lie.
        config: of the run; None of an export, which holds whole weights.
        own: what was trained: the role's tensors, or None for an export.
        adapter: the same as LoRA, if it is one.
        allow: of lineage, of the run that asks; base: what it started from may have changed.
    """

    init: Init
    config: Any = None
    own: Source | None = None
    adapter: Adapter | None = None
    allow: Sequence[str] = ()

    @property
    def name(self) -> str:
        """For tables and messages."""
        return self.init.run.name

    @cached_property
    def weights(self) -> Source:
        """The result, whole."""
        if self.adapter is None:
            return of_folder(self.init.weights / "transformer") if self.own is None else self.own
        adapter, (_, base) = self.adapter, self.start
        # As training saw them: a base in fp32 that is used in bf16 is rounded.
        dtype = DTYPES[self.config.model.dtype]

        def read(name: str) -> Tensor:
            weight = base.read(name).to(dtype)
            path = name.removesuffix(".weight")
            if path not in adapter.pairs or path == name:
                return weight
            a, b = (t.double() for t in adapter.pairs[path])
            return weight.double() + adapter.scale * (b @ a)

        return Source(base.shapes, read)

    @cached_property
    def start(self) -> tuple[str, Source]:
        """What the run started from, and what tells it from other weights.

        Raises:
            InputError: an export does not say; or those weights are gone, or others lie there now.
        """
        if self.config is None:
            raise InputError(
                f"{self.init.weights} is an export, and does not say what it started from: name "
                "the run, or weights that sum to 1"
            )
        manifest, again = self.init.manifest, "restore it, or add allow=[base]"
        if self.config.init_from is not None:
            before = find_init(self.config.init_from)
            told, found = manifest["parents"][0]["hash"], before.parent()["hash"]
            source = opened(before, self.allow).weights
        else:
            told = (manifest.get("base") or {}).get("hash") or None
            found, source = of_model(self.config.model, self.config.seed)
        if told not in (None, found) and "base" not in self.allow:
            raise InputError(f"what {self.init.run} started from has changed since: {again}")
        return found, source

    @property
    def roots(self) -> set[str]:
        """The base weights that its line of runs began from, as far as manifests tell."""
        out: set[str] = set()
        for m in manifests_of(self.init.run):
            base = m.get("base") or {}
            if base.get("hash"):
                out.add(base["hash"])
            elif not m.get("parents") and base:
                out.add(random_id(m["model"], m["seed"]))
        return out

    @property
    def autoencoder(self) -> str:
        """What tells its autoencoder from others."""
        model, seed = self.root_model(None)
        if model.vae is not None:
            place = Path(model.vae)
        elif model.path is None:
            return random_id(model.name, seed)
        else:
            folder = sources.locate(model.path, leave_out=sources.left_out(model))
            if folder is None:
                return str(model.path)
            place = folder / "vae"
        return sources.fingerprint([place] if place.is_file() else sources.files(place, "vae"))

    def root_model(self, model: Any) -> tuple[Any, int]:
        """(conf/model, seed) of what lies under the result: its autoencoder and text encoder.

        model: of the run that asks, whose own settings (dtype and the like) it keeps; None where
            they do not matter.
        """
        if self.config is None:
            here = {"path": str(self.init.weights), "transformer": None, "vae": None}
            return OmegaConf.merge(model or {}, here), 0
        if self.config.init_from is not None:
            return opened(find_init(self.config.init_from)).root_model(model)
        chosen = self.config.model.copy()
        if model is not None:
            for key in KEPT:
                chosen[key] = model.get(key)
        return chosen, int(self.config.seed)


def opened(init: Init, allow: Sequence[str] = ()) -> Parent:
    """A run's result; its weights are not read yet, save an adapter's. allow: see `Parent`.

    Raises:
        InputError: it trained no transformer.
    """
    trained = init.manifest.get("trained")
    if init.manifest.get("policy"):
        raise InputError(f"{init.run} is a policy student, which is not merged: leave it out")
    if not trained or trained == ["autoencoder"]:
        raise InputError(
            f"{init.run} trained no transformer (stage {init.manifest.get('stage')}): name a run "
            "that did"
        )
    if init.is_export:
        return Parent(init, allow=allow)
    if inserted(init.manifest):
        raise InputError(
            f"{init.run} gave its model a guidance embedder, which the base under it lacks: name "
            "its export/ in its place"
        )
    config = OmegaConf.load(init.run / "config.yaml")
    role = f"{trained[0]}/"
    stored = load_checkpoint(init.weights, verify=False).weights  # verified when it was found
    mine = stored.select(lambda name: name.startswith(role))
    if config.adapter is None:
        header = _shapes(init.weights, mine)
        shapes = {k.removeprefix(role): v for k, v in header.items()}
        own = Source(shapes, lambda k: mine[f"{role}{k}"])
        return Parent(init, config, own, allow=allow)
    tensors = {k.removeprefix(role): mine[k] for k in mine}
    adapter = Adapter.read(tensors, config.adapter.alpha / config.adapter.rank)
    return Parent(init, config, Source.of(tensors), adapter, allow)


def _shapes(folder: Path, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Of a checkpoint's tensors, from the headers of its files."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {k: shape for k, (shape, _) in sources.header(file).items() if k in tensors}
    return found


# ---------------------------------------------------------------- what may be merged


def parents_of(paths: Sequence[str], allow: Sequence[str] = ()) -> list[Parent]:
    """What runs= names, each opened. Every rank must call. allow: see `Parent`.

    Raises:
        InputError: no such run, one that failed or still runs, or one that trained no transformer.
    """
    out = []
    for path in paths:
        init = resolve_init(path)
        status = init.manifest.get("status")  # an export has none
        named = init.weights == Path(path).resolve()  # a checkpoint of its own is whole
        if status in ("failed", "running") and not named:
            raise InputError(
                f"runs: {init.run} is {status}: name a run that is done, or a checkpoint "
                f"({init.weights})"
            )
        out.append(opened(init, allow))
    return out


def check_parents(parents: Sequence[Parent], allow: Sequence[str], tasks: bool) -> None:
    """Refuses what cannot be merged, by manifests and headers.

    Args:
        allow: of lineage; base leaves out whether the runs share one.
        tasks: whether the base counts, so that all must have started from the same weights.

    Raises:
        InputError: what differs, and between which two.
    """
    first = parents[0]
    for other in parents[1:]:
        mine, theirs = result_role(first.init.manifest), result_role(other.init.manifest)
        both = f"{first.init.run} and {other.init.run}"
        if mine != theirs and "role" not in allow:
            raise InputError(f"{both} are {mine} and {theirs}: merge models of one kind")
        if "base" not in allow and not first.roots & other.roots:
            raise InputError(
                f"{both} come from different base models: merge what was trained from one, or add "
                "allow=[base]"
            )
        if "base" not in allow and first.autoencoder != other.autoencoder:
            raise InputError(
                f"{both} have different autoencoders, and latents of one mean nothing to the "
                "other: merge runs of one, or add allow=[base]"
            )
    if tasks and len({p.start[0] for p in parents}) > 1:
        raise InputError(
            "tasks=true adds what each run has changed to what all of them started from, and these "
            "started from different weights: give weights that sum to 1, without tasks=true"
        )
    shapes = first.weights.shapes
    for other in parents[1:]:
        theirs = other.weights.shapes
        odd = sorted(k for k in {*shapes, *theirs} if shapes.get(k) != theirs.get(k))
        if odd:
            raise InputError(
                f"{first.init.run} and {other.init.run} are of different architectures: {odd[0]} "
                f"is {_told(shapes.get(odd[0]))} and {_told(theirs.get(odd[0]))}"
            )


def _told(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else "×".join(map(str, shape))


def check_adapters(parents: Sequence[Parent]) -> None:
    """Refuses LoRA formats where the results are not all adapters on the same weights.

    Raises:
        InputError: which is not.
    """
    for parent in parents:
        if parent.adapter is None:
            raise InputError(
                f"{parent.init.run} has no adapter in a checkpoint: choose format=[diffusers] or "
                "single"
            )
    if len({p.start[0] for p in parents}) > 1:
        raise InputError(
            "the adapters lie on different weights, so that no one adapter is their merger: "
            "choose format=[diffusers] or single"
        )
