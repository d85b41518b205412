"""The nouns. Nothing here computes; everything else speaks in these words.

Shape letters, used everywhere: b batch, n target tokens, m reference tokens, s text tokens, c
latent channels (128), d text features, h w pixels. σ = t ∈ [0, 1]; 1 is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from flux2.rng import Rng


@dataclass(frozen=True)
class Condition:
    """What a velocity sees besides x and t.

    Attributes:
        text: b s d, the prompt's features.
        text_ids: b s 4, positions (0, 0, 0, l).
        ids: b n 4, the target's positions (0, h, w, 0).
        ref: b m c, reference latents, clean; None without references.
        ref_ids: b m 4, positions (10 + 10·i, h, w, 0) of reference i.
        mask: b (s + n + m) bool, True where a token takes part; None means all do.
        guidance: b, embedded guidance strength, for models that have the embedder; the interval
            t − r for a flow map.
        null: the same condition with the empty prompt, for classifier-free guidance.
    """

    text: Tensor
    text_ids: Tensor
    ids: Tensor
    ref: Tensor | None = None
    ref_ids: Tensor | None = None
    mask: Tensor | None = None
    guidance: Tensor | None = None
    null: Condition | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with `fn` applied to every tensor in it."""
        out: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                out[name] = fn(value)
            elif isinstance(value, Condition):
                out[name] = value.map(fn)
        return replace(self, **out)

    def select(self, index: Tensor | slice) -> Condition:
        """Rows `index` of the batch."""
        return self.map(lambda x: x[index])

    def repeat(self, times: int) -> Condition:
        """Each row `times` times in succession: a group per prompt."""
        return self.map(lambda x: x.repeat_interleave(times, 0))


def cat_conditions(parts: Sequence[Condition]) -> Condition:
    """Conditions of equal lengths joined along the batch."""
    out: dict[str, Any] = {}
    for name in vars(parts[0]):
        values = [getattr(p, name) for p in parts]
        if isinstance(values[0], Tensor):
            out[name] = torch.cat(values)
        elif isinstance(values[0], Condition):
            out[name] = cat_conditions(values)
    return Condition(**out)


@dataclass(frozen=True)
class Batch:
    """Samples that travel together; all of one bucket (size, number of references).

    Attributes:
        ids: b int64, sample indices; they key all randomness.
        prompts: b strings.
        cond: None where a method needs no text (the autoencoder).
        groups: b int64, the prompt's id: samples of one prompt share it.
        meta: b ground-truth dictionaries (the record's `meta`).
        x0: b n c, clean latents; None for prompts only.
        images: b 3 h w uint8, target pixels where the stage wants them.
        weight: b, 0 for samples that do not count; the engine scales them to sum to 1 over the
            global update (all ranks), and the loss is Σ weight · loss.
        grid: (rows, columns) of target tokens.
        channels: of a token.
        extra: tensors of the method's own, first dimension b.
    """

    ids: Tensor
    prompts: tuple[str, ...]
    cond: Condition | None
    groups: Tensor
    meta: tuple[Mapping[str, Any], ...]
    grid: tuple[int, int]
    channels: int = 128
    x0: Tensor | None = None
    images: Tensor | None = None
    weight: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, c) of a sample's latents."""
        return self.grid[0] * self.grid[1], self.channels

    def select(self, index: Tensor) -> Batch:
        """Rows `index` (int64, on any device)."""
        rows = index.tolist()
        return replace(
            self,
            ids=self.ids[index],
            prompts=tuple(self.prompts[i] for i in rows),
            cond=None if self.cond is None else self.cond.select(index),
            groups=self.groups[index],
            meta=tuple(self.meta[i] for i in rows),
            x0=None if self.x0 is None else self.x0[index],
            images=None if self.images is None else self.images[index],
            weight=None if self.weight is None else self.weight[index],
            extra={k: v[index] for k, v in self.extra.items()},
        )

    def repeat(self, times: int) -> Batch:
        """Each sample `times` times in succession, with sample ids of their own.

        The ids become id · times + member, so that members draw different noise.
        """
        rows = torch.arange(len(self), device=self.ids.device).repeat_interleave(times)
        member = torch.arange(times, device=self.ids.device).repeat(len(self))
        out = self.select(rows)
        return replace(out, ids=out.ids * times + member)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` samples, in order."""
        rows = torch.arange(len(self), device=self.ids.device)
        return [self.select(part) for part in rows.split(size)]


class Velocity(Protocol):
    """What every role can do: v = ε − x0 at (x, t)."""

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x: b n c, t: b → b n c, fp32."""
        ...


class Features(Protocol):
    """A velocity that also tells what it has inside."""

    def features(self, x: Tensor, t: Tensor, cond: Condition, block: int) -> tuple[Tensor, Tensor]:
        """v as by calling: b n c, and the target tokens' hidden states after `block` blocks, the
        first being 1: b n w, fp32."""
        ...

    def states(
        self, x: Tensor, t: Tensor, cond: Condition, blocks: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """The same after each of `blocks`, from one forward."""
        ...

    @property
    def depth(self) -> tuple[int, int]:
        """How many double-stream and how many single-stream blocks there are."""
        ...


class Law(Protocol):
    """What a policy says at one state, and answers from there on without the network."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """At a later state x: b n c, t: b → b n c."""
        ...

    def detach(self) -> Law:
        """The same, without gradients."""
        ...

    def without(self, dropped: Tensor) -> Law:
        """Without some of its components; dropped: b k bool."""
        ...


@dataclass(frozen=True)
class PolicyShape:
    """A policy over x0 and the sampler that it is for.

    Attributes:
        components: of each token's Gaussian mixture.
        segments: steps of the grid, each one call of the network.
        substeps: Euler steps of a segment, none of which calls it.
    """

    components: int = 8
    segments: int = 4
    substeps: int = 32


@runtime_checkable
class Policy(Protocol):
    """A velocity whose network is asked once a segment (flux2.policy)."""

    @property
    def shape(self) -> PolicyShape:
        """Of what it says, and how it is sampled."""
        ...

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> Law:
        """x: b n c, t: b → the law from there on."""
        ...


class Autoencoder(Protocol):
    """What the role of an autoencoder's method can do, with gradients."""

    def reconstruct(
        self, images: Tensor, noise: Callable[[tuple[int, ...]], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """images: b 3 h w in [−1, 1] → reconstruction, posterior mean and log-variance."""
        ...


Metrics = Mapping[str, float | Tensor]
LossFn = Callable[["Mapping[str, Any]", Batch, Rng], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class RoleSpec:
    """What a method asks of a role.

    Attributes:
        trainable: gets a parameter group of its own, as an adapter or as a full copy.
        kind: "velocity", "policy" (a velocity with a head of its own, see `Policy`), "autoencoder",
            or "projector": a small network of its own from the transformer's hidden states, b n w,
            to b n `out`.
        follows: a role whose weights this one tracks by exponential moving average.
        decay: of that average, per update of the role followed; 0 copies it.
        out: length of a projector's outputs. block: whose hidden states it takes; the first is 1.
        embeds: whether it takes a second number, cond.guidance, through the guidance embedder,
            which is inserted without effect where the model has none; None: as the model does.
        strength: what an inserted embedder is given where nothing else is said, if the number is a
            strength of guidance; None: it is another number, and who asks must give it.
        blocks: numbers of the double-stream and of the single-stream blocks that it keeps of the
            model's, on a backbone of its own; None: all of them. What follows it keeps the same.
        policy: shape of a role of that kind.
        tangents: whether forward-mode derivatives are taken through it.
        source: a run or an export whose result a frozen role is, and not what this run starts from:
            its adapter on the shared backbone where it was trained on the same weights, else a
            backbone of its own.
    """

    trainable: bool = False
    kind: str = "velocity"
    follows: str | None = None
    decay: float = 0.0
    out: int = 0
    block: int = 1
    embeds: bool | None = None
    strength: float | None = None
    blocks: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    policy: PolicyShape = field(default_factory=PolicyShape)
    source: str | None = None
    tangents: bool = False


@dataclass(frozen=True)
class Turn:
    """One optimizer update of one role: every `every`-th step."""

    role: str
    loss: LossFn
    every: int = 1


class Method(Protocol):
    """A loss, a way to collect, and nothing else.

    Attributes:
        accepts: roles of model that it can start from: base, distilled, guidance-distilled.
        result: what it makes of them; None: what it was given.
    """

    accepts: ClassVar[tuple[str, ...]]
    result: ClassVar[str | None]

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The roles that the method needs, by name."""
        ...

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The updates of one step, in order."""
        ...

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """The step's updates; each is its list of micro-batches, with weights set. Every rank
        gives as many updates, from its own rows of the batch."""
        ...

    def metrics(self) -> Metrics:
        """What `collect` noted of the step; the loop logs it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume: JSON types and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        ...


class Memoryless:
    """The end of most methods: their state is all in the roles and the step, so that a resume has
    nothing to restore, and their losses say all that is logged."""

    def metrics(self) -> Metrics:
        """None."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


@runtime_checkable
class Described(Protocol):
    """A method that says, before the first step, what its settings amount to."""

    def describe(self) -> str:
        """A line."""
        ...


class Reward(Protocol):
    """Scores decoded images. NaN says: could not be scored (masked, counted, never 0)."""

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """images: b 3 h w uint8 → named scores, each b fp32; "reward" is the one to maximise."""
        ...


Scores = Mapping[str, Tensor]
Score = Callable[[Tensor, Batch], Callable[[], Scores]]
"""(latents b n c, batch) → a function that waits for the named scores: a reward after the decoder,
as methods get it. Scoring has begun when the call returns, so that the next chunk samples
meanwhile."""


class DirectScore(Protocol):
    """A reward after the decoder, with gradients: what methods get that follow them."""

    def check_gradient(self) -> None:
        """Raises InputError where the reward has none."""
        ...

    def differentiable(self, latents: Tensor, batch: Batch) -> Tensor:
        """latents: b n c → b, with gradients; NaN where there is no score."""
        ...


@runtime_checkable
class Deferred(Protocol):
    """A reward that scores in processes of its own."""

    def ready(self) -> None:
        """Waits until its processes can score; raises InputError where they cannot."""
        ...

    def submit(self, images: Tensor, batch: Batch) -> Any:
        """Starts scoring and returns at once."""
        ...

    def result(self, pending: Any) -> Scores:
        """Waits for what submit started."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A reward that measures something on the policy as it is when the run starts."""

    @property
    def wants(self) -> tuple[int, int] | None:
        """(prompts of each rank, samples of each prompt); None where nothing is to be measured."""
        ...

    def calibrate(
        self, chunks: Iterable[tuple[Tensor, Batch]]
    ) -> Mapping[str, Mapping[str, float]]:
        """chunks: (images b 3 h w uint8, whole groups), every rank as many → what was measured, for
        the log; the same on every rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was measured: JSON types."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        ...


@runtime_checkable
class Differentiable(Protocol):
    """A reward through which gradients reach the image."""

    def differentiable(self, images: Tensor, batch: Batch) -> Tensor:
        """images: b 3 h w in [0, 1], floating → b, with gradients; NaN where there is no score."""
        ...


class Metric(Protocol):
    """One evaluation measure: a value per sample, from which aggregates are recomputed."""

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """images: b 3 h w uint8 → named values, each b fp32, NaN where undefined."""
        ...


@runtime_checkable
class SetMetric(Protocol):
    """A measure of a whole set of images (FID): a feature of each, and one number of them all."""

    def features(self, images: Tensor, batch: Batch) -> Tensor:
        """images: b 3 h w uint8 → b d fp32 on the CPU."""
        ...

    def aggregates(self, features: Tensor, prompts: Tensor) -> Sequence[Any]:
        """features: n d of all samples; prompts: n int64, their prompts → `eval.records.Aggregate`
        each."""
        ...
