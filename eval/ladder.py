"""The ladder of steps: one model, the same prompts and noise, sampled in 1, 2, 3, … steps.

A rung is an ordinary evaluation with another sampler, and lies where a report finds it:

    <run>/ladder/<rung>/evaluation/step_NNNNNN/     rungs n01, n02, …, and teacher
    <run>/ladder/step_NNNNNN.json                   all rungs, what they keep of the teacher
    <run>/ladder/step_NNNNNN.png, …_samples.png     values by forwards; samples side by side
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from eval.evaluation import FOLDER, Evaluation, find
from eval.rungs import Rung, compared, fewest, picture, row_of, samples, text_table
from flux2 import distributed
from flux2.checkpoint import on_main
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.files import read_json, write_json, write_text
from flux2.generate import Sampler, blank_image
from flux2.model import Flux2
from flux2.roles import told
from flux2.types import RoleSpec, Velocity

if TYPE_CHECKING:
    from eval.heldout import HeldOut

LADDER: Final = "ladder"
TEACHER: Final = "teacher"
STEPS: Final = (1, 2, 3, 4, 6, 8)
PATCH: Final = 16
"""Pixels of a token, either way."""


@dataclass(frozen=True)
class AtSize:
    """A dataset's prompts, to be drawn at another size: targets are blank.

    Raises (when read):
        InputError: a record has references, which have a size of their own.
    """

    dataset: Dataset
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        record = self.dataset[index]
        if record.references:
            raise InputError(
                f"prompt {record.id} is an edit, whose image has a size of its own: leave out "
                "evaluation.ladder.sizes, or give prompts without references"
            )
        return replace(record, target=blank_image(*self.size))

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """See `Dataset`."""
        return *self.size, 0


@dataclass(frozen=True)
class Ladder:
    """Which samplings of a model are compared.

    Attributes:
        steps: of the rungs, rising.
        guidance: of the rungs; None: that of evaluation.sampler.
        sizes: [height, width]s; [] leaves the dataset's own.
        teacher: steps, guidance (and solver) of a further rung, the reference: a base's own weights
            or, in training, the frozen role `teacher`; None: no such rung.
        against: a run (or a rung's folder) whose latest evaluation is the reference in its place.
        keep: value → the share of the reference that is wanted.
        drift: values of which neither side is better: their distance from the reference, or else
            from the held-out images, is told.
        shows: values of the table and the picture; [] shows all.
        shown: samples of the picture with the images.
    """

    steps: Sequence[int] = STEPS
    guidance: float | None = None
    sizes: Sequence[Sequence[int]] = ()
    teacher: Mapping[str, Any] | None = None
    against: str | None = None
    keep: Mapping[str, float] = field(default_factory=dict)
    drift: Sequence[str] = ()
    shows: Sequence[str] = ()
    shown: int = 6

    def __post_init__(self) -> None:
        where = "evaluation.ladder"
        steps = list(self.steps)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in steps)
        if not steps or not whole:
            raise InputError(f"{where}.steps is {steps}: give whole numbers of at least 1")
        if steps != sorted(set(steps)):
            raise InputError(f"{where}.steps is {steps}: give each number once, rising")
        if self.guidance is not None and not self.guidance >= 0:
            raise InputError(
                f"{where}.guidance is {self.guidance}: it must be at least 0 (1: none)"
            )
        self._check_sizes(where)
        if self.teacher is not None:
            check_teacher(f"{where}.teacher", self.teacher)
            if self.against is not None:
                raise InputError(f"{where} has a teacher and against: give one reference")
        if self.against is not None and not find(Path(self.against)):
            raise InputError(f"{where}.against={self.against} holds no evaluation: name a run")
        for name, share in self.keep.items():
            if not share > 0:
                raise InputError(f"{where}.keep has {name}: {share}; give a share above 0")

    def _check_sizes(self, where: str) -> None:
        sizes = [tuple(s) for s in self.sizes]
        for size in sizes:
            if len(size) != 2:
                raise InputError(f"{where}.sizes has {list(size)}: give [height, width]")
            blank_image(*size)
        if len(set(sizes)) < len(sizes):
            raise InputError(f"{where}.sizes has a size twice: give each once")

    def check(self, role: str) -> None:
        """Before weights are read: whether a model of this role (stage=eval) is a teacher. Raises
        InputError where it is not."""
        if self.teacher is not None and role != "base":
            raise InputError(
                f"evaluation.ladder.teacher samples a base with guidance and this model is {role}: "
                "evaluate the teacher by itself, and name that run as evaluation.ladder.against"
            )

    def fits(self, sampler: Sampler, dataset: Dataset, prompts: int) -> None:
        """Before weights are read: raises InputError where a rung cannot be sampled, or the prompts
        not at the sizes."""
        self.rungs(sampler)
        edits = (i for i in range(prompts if self.sizes else 0) if dataset.bucket_of(i)[2])
        for i in edits:
            AtSize(dataset, (PATCH, PATCH))[i]

    def rungs(self, sampler: Sampler) -> list[Rung]:
        """All of them, the teacher's first; sampler: what they share."""
        scale = sampler.guidance if self.guidance is None else float(self.guidance)
        sizes = [(int(h), int(w)) for h, w in self.sizes] or [None]
        out = []
        for size in sizes:
            end = "" if size is None else f"-{size[0]}x{size[1]}"
            if self.teacher is not None:
                out.append(Rung(f"{TEACHER}{end}", teachers(sampler, self.teacher), size, True))
            out += [
                Rung(f"n{n:02d}{end}", replace(sampler, steps=n, guidance=scale), size)
                for n in self.steps
            ]
        return out


def tokens_of(size: Sequence[int]) -> int:
    """Of the latents of an image of (height, width)."""
    return (size[0] // PATCH) * (size[1] // PATCH)


def check_teacher(where: str, teacher: Mapping[str, Any]) -> None:
    """Raises InputError unless steps, guidance, and perhaps a solver make a sampler."""
    if set(teacher) - {"solver"} != {"steps", "guidance"} or not teacher["steps"] >= 1:
        raise InputError(
            f"{where} is {dict(teacher)}: give its steps and guidance, as in "
            "{steps: 50, guidance: 3}"
        )
    teachers(Sampler(), teacher)


def teachers(sampler: Sampler, teacher: Mapping[str, Any]) -> Sampler:
    """The teacher's sampler: its own steps, guidance and solver (euler), and the student's
    schedule."""
    own = {"solver": "euler", **teacher, "guidance": float(teacher["guidance"])}
    return replace(sampler, **own)


NO_TEACHER: Final = (
    "a teacher is to be evaluated, and this method has no frozen role of that name: set "
    "evaluation.ladder.teacher=null, and name an evaluation as evaluation.ladder.against"
)


def has_teacher(roles: Mapping[str, RoleSpec]) -> bool:
    """Whether a method has a role of that name which nothing trains."""
    return "teacher" in roles and not roles["teacher"].trainable


def frozen_teacher(roles: Any) -> Velocity:
    """The role that nothing trains, by its name; it may be told a strength, which reaches it where
    it takes one. Raises InputError where there is none."""
    if "teacher" not in roles or "teacher" in roles.trainable:
        raise InputError(NO_TEACHER)
    return told(roles["teacher"])


def settings(held: HeldOut) -> list[list[Any]]:
    """What two ladders must share to be compared: each rung's name and sampling; JSON types."""
    assert held.ladder is not None
    out = []
    for rung in held.ladder.rungs(held.sampler):
        s = rung.sampler
        out.append([rung.name, s.solver, s.steps, float(s.guidance), repr(s.schedule)])
    return out


def stored(run: Path, step: int) -> dict[str, Any] | None:
    """A whole ladder of `step`, as it was written; None where there is none."""
    path = _file(run, step)
    return read_json(path) if path.is_file() else None


def _file(run: Path, step: int, end: str = ".json") -> Path:
    return run / LADDER / f"step_{step:06d}{end}"


# ---------------------------------------------------------------- sampling


def climb(
    held: HeldOut, model: Flux2, velocity: Velocity, teacher: Velocity | None,
    facts: Mapping[str, Any], run: Path, step: int, main: Evaluation | None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates every rung, all ranks together; rank 0 writes, draws and returns what was found.

    Args:
        velocity: of the model. teacher: of the frozen teacher; None: the model is its own.
        facts: see `HeldOut.evaluate`. main: `held`'s own evaluation of this step (rank 0), which
            stands for the rung that is sampled as it is.

    Raises:
        InputError: the reference was measured otherwise, so that it shares no value.
    """
    assert held.ladder is not None
    reference = on_main(lambda: _reference(held, main))
    name, shots = facts.get("name", ""), {}
    for rung in held.ladder.rungs(held.sampler):
        folder = run / LADDER / rung.name / FOLDER
        label = f"{rung.name}: {name}"
        own = {**facts, "name": label}
        fixed = rung.teacher and teacher is not None
        if fixed and distributed.broadcast(_known(rung, held, run)):
            shots[rung.name] = _newest(rung, run)
            continue
        if rung.sampler == held.sampler and rung.size is None and not rung.teacher:
            shots[rung.name] = _copy(main, folder / f"step_{step:06d}", label)
            continue
        source = teacher if rung.teacher and teacher is not None else velocity
        shots[rung.name] = held.sampled(rung.sampler, rung.size).evaluate(
            model, source, f"rung {rung.name}", own, folder / f"step_{step:06d}"
        )
    found = on_main(lambda: _tell(held, shots, reference, run, step))
    return found if distributed.is_main() else {}


def _reference(held: HeldOut, main: Evaluation | None) -> Evaluation | None:
    """What `against` names; refused before the rungs are sampled."""
    assert held.ladder is not None
    if held.ladder.against is None:
        return None
    found = find(Path(held.ladder.against))
    reference = Evaluation.load(found[max(found)])
    if main is not None:
        compared(reference, main)
    return reference


def _known(rung: Rung, held: HeldOut, run: Path) -> bool:
    """Whether the frozen teacher has been measured in this run, by these settings. Rank 0 asks."""
    shot = _newest(rung, run)
    return shot is not None and drawn_by(shot, held.sampled(rung.sampler, rung.size))


def drawn_by(shot: Evaluation, held: HeldOut) -> bool:
    """Whether an evaluation is what `held` would measure: sampler and grid, noise, prompts and
    metrics."""
    sampler, prints = held.sampler, shot.results.fingerprints.values()
    grids = {sampler.grid(tokens_of(size)).hash for size in shot.identity["size"]}
    now = {
        "solver": sampler.solver, "steps": sampler.steps, "guidance": float(sampler.guidance),
        "noise_seed": held.seed, "grid": "+".join(sorted(grids)),
    }  # fmt: skip
    return (
        all(shot.identity[k] == v for k, v in now.items())
        and dict(shot.prompts) == {r.id: r.prompt for r in held.records()}
        and {f.n for f in prints} <= {held.prompts * held.noises}
        and {held.suite.engine(key) for key in held.suite.present} == {f.engine for f in prints}
    )


def _newest(rung: Rung, run: Path) -> Evaluation | None:
    if not distributed.is_main():
        return None
    found = find(run / LADDER / rung.name)
    return Evaluation.load(found[max(found)]) if found else None


def _copy(shot: Evaluation | None, folder: Path, name: str) -> Evaluation | None:
    """The evaluation once more, under another name; None on ranks other than 0."""
    if shot is None:
        return None
    assert shot.folder is not None
    images = sorted((shot.folder / "images").iterdir())

    def write(to: Path) -> None:
        for file in images:
            (to / file.name).write_bytes(file.read_bytes())

    return replace(shot, identity={**shot.identity, "name": name}).save(folder, write)


# ---------------------------------------------------------------- what the rungs say


def _tell(
    held: HeldOut, shots: Mapping[str, Evaluation | None], reference: Evaluation | None,
    run: Path, step: int,
) -> dict[str, Any]:  # fmt: skip
    ladder = held.ladder
    assert ladder is not None
    found = {k: s for k, s in shots.items() if s is not None}
    rows = []
    for rung in ladder.rungs(held.sampler):
        end = "" if rung.size is None else f"-{rung.size[0]}x{rung.size[1]}"
        base = found.get(f"{TEACHER}{end}", reference)
        rows.append(row_of(rung, found[rung.name], None if rung.teacher else base, ladder))
    out = {"step": step, "settings": settings(held), "against": ladder.against, "rungs": rows,
           "fewest": fewest(rows)}  # fmt: skip
    text = text_table(rows, ladder)
    where = _file(run, step)
    where.parent.mkdir(parents=True, exist_ok=True)
    write_text(_file(run, step, ".txt"), text + "\n")
    out["picture"] = str(picture(_file(run, step, ".png"), rows, ladder))
    shown = samples(_file(run, step, "_samples.png"), found, ladder)
    out["samples"] = None if shown is None else str(shown)
    write_json(where, out)
    return {**out, "table": text}
