"""The links of stage=pipeline: their command lines, their places, and what there is of them.

A link is an ordinary run in <run.dir>/<number>-<name>/. What it was made from (the weights it
started from, and the results of links that its command line names) is recorded, by hash, in the
pipeline's links.json before it begins, so that a result whose origin has changed is recognised.
Nothing here imports torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flux2.checkpoint import steps
from flux2.errors import InputError
from flux2.files import read_json
from flux2.lineage import MANIFEST, find_init, manifests_of, result_role
from flux2.runs import ASIDE

NAME = re.compile(r"[A-Za-z][\w-]*")
REFERENCE = re.compile(r"\{([A-Za-z][\w-]*)\}")
UNFIT = re.compile(r"[,=(){}\[\]'\"\\$]")
"""Characters of a path that an override could not hold."""
OWN = ("run.dir", "run.id", "resume", "recipe.stage")
"""Keys that the pipeline sets in every link."""
INIT = "init_from"
RECORD = "links.json"


@dataclass(frozen=True)
class Link:
    """A run of the chain.

    Attributes:
        name, number: of the link; numbers count from 1, links that are left out included.
        path: its run directory.
        words: its command line as written, each word an override.
    """

    name: str
    number: int
    path: Path
    words: tuple[str, ...]

    @property
    def manifest(self) -> dict[str, Any] | None:
        """manifest.json as it is now; None where nothing has begun."""
        file = self.path / MANIFEST
        return read_json(file) if file.is_file() else None

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        manifest = self.manifest
        ended = manifest is not None and manifest["status"] == "done"
        return ended and (self.path / "summary.json").is_file()

    def says(self, key: str) -> bool:
        """Whether its command line sets this key."""
        return any(word.lstrip("+~").partition("=")[0] == key for word in self.words)

    def refers(self, key: str | None = None) -> list[str]:
        """The links that its words name, each once; key: of this word alone."""
        words = [w for w in self.words if key is None or w.lstrip("+").startswith(f"{key}=")]
        return list(dict.fromkeys(n for w in words for n in REFERENCE.findall(w)))

    def arguments(self, chain: Sequence[Link]) -> list[str]:
        """Its command line, each {name} replaced by that link's run directory."""
        places = {other.name: str(other.path) for other in chain}
        return [REFERENCE.sub(lambda m: places[m[1]], word) for word in self.words]


@dataclass(frozen=True)
class Facts:
    """What a link made, or will have made.

    Attributes:
        path: its run directory. ready: whether it is done.
        weights: whether there is a transformer to start from.
        role: base, distilled or guidance-distilled.
        models: names of the models that its line of runs was trained on.
        schedule: hash of its noise schedule. adapter: whether the weights are a LoRA.
        policy: whether they are a policy student's.
    """

    path: Path
    ready: bool
    weights: bool
    role: str | None = None
    models: tuple[str, ...] = ()
    schedule: str | None = None
    adapter: bool = False
    policy: bool = False


# ---------------------------------------------------------------- from the configuration


def chain_of(cfg: DictConfig) -> list[Link]:
    """The links of cfg (conf/stage/pipeline), in order.

    Raises:
        InputError: no links; a name or a command line that cannot be; a {name} that no earlier
            link has.
    """
    links: Any = OmegaConf.to_container(cfg.links, resolve=True) if cfg.links else {}
    more: Any = OmegaConf.to_container(cfg.more, resolve=True) if cfg.more else {}
    if not isinstance(links, dict) or not any(links.values()):
        raise InputError("links= names nothing to do: give e.g. +links.sft='stage=sft'")
    for name in more:
        if links.get(name) is None:
            raise InputError(f"more.{name} is for no link: choose from {', '.join(links)}")
    root, chain = Path(cfg.run.dir).resolve(), []
    for number, (name, value) in enumerate(links.items(), 1):
        if NAME.fullmatch(str(name)) is None:
            raise InputError(f"link {name!r}: give a name of letters, digits, _ and -")
        if value is not None:
            words = (*words_of(value, f"links.{name}"), *words_of(more.get(name), f"more.{name}"))
            link = Link(name, number, root / f"{number:02d}-{name}", words)
            _check(link, chain, links)
            chain.append(link)
    return chain


def words_of(value: Any, where: str) -> tuple[str, ...]:
    """A command line, as one text or as a list of its words. Raises InputError."""
    if value is None:
        return ()
    if isinstance(value, str):
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            raise InputError(f"{where}: {error} in {value!r}") from None
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return tuple(value)
    raise InputError(
        f"{where} is no command line: give it as one text, 'stage=sft train.steps=60', or as a "
        "list of its words"
    )


def _check(link: Link, earlier: Sequence[Link], links: Mapping[str, Any]) -> None:
    """Refuses words that a link cannot have. Raises InputError."""
    where = f"link {link.name}"
    for word in link.words:
        if word.startswith("-") or ("=" not in word and not word.startswith("~")):
            raise InputError(f"{where}: {word!r} is no key=value")
    for key in OWN:
        if link.says(key):
            raise InputError(f"{where}: the pipeline sets {key} itself: leave it out")
    if not link.says("stage") and not link.says("experiment"):
        raise InputError(f"{where} names no stage: begin it with stage=… or experiment=…")
    known = [other.name for other in earlier]
    for name in link.refers():
        if name not in known:
            absent = "is left out" if name in links and links[name] is None else "is none before it"
            raise InputError(
                f"{where}: {{{name}}} {absent}: choose from {', '.join(known) or 'nothing'}"
            )
        if UNFIT.search(str(link.path)):
            raise InputError(
                f"{where}: run.dir={link.path.parent} has characters that {{{name}}} cannot hold: "
                "choose another run.dir"
            )


def selected(cfg: DictConfig, chain: Sequence[Link]) -> set[str]:
    """The names of the links that cfg.first and cfg.only ask for; the others stay as they are.

    Raises:
        InputError: an unknown name.
    """
    names = [link.name for link in chain]
    only: Any = OmegaConf.to_container(cfg.only) if OmegaConf.is_config(cfg.only) else cfg.only
    asked = names if only is None else [only] if isinstance(only, str) else list(only)
    for key, name in [*(("only", n) for n in asked), ("first", cfg.first)]:
        if name is not None and name not in names:
            raise InputError(f"{key}={name} is no link: choose from {', '.join(names)}")
    start = 0 if cfg.first is None else names.index(cfg.first)
    return {name for name in names[start:] if name in asked}


# ---------------------------------------------------------------- what there is of a link


def identity(run: Path) -> str:
    """What changes when a link's result does: the hash of its weights; where it made none, which
    run it is and when it ended. Reads what the hash is of, where that is an export.

    Raises:
        InputError: its weights are damaged or gone.
    """
    manifest = read_json(run / MANIFEST)
    if manifest.get("trained"):
        return find_init(run).parent()["hash"]
    return f"{manifest['id']} {manifest['finished']}"


def facts_of(run: Path) -> Facts:
    """Of a run that is done, by its manifest."""
    line = manifests_of(run)
    mine = line[0]
    trained = mine.get("trained")
    stored = OmegaConf.load(run / "config.yaml")
    return Facts(
        path=run,
        ready=True,
        weights=bool(trained) and trained != ["autoencoder"],
        role=result_role(mine),
        models=tuple(dict.fromkeys(m["model"] for m in line if m.get("model"))),
        schedule=mine.get("schedule_hash"),
        adapter=OmegaConf.select(stored, "adapter") is not None,
        policy=bool(mine.get("policy")),
    )


def uses_of(link: Link, init: str | None, chain: Sequence[Link]) -> dict[str, str]:
    """What a link is made from, as it is now: `init_from` → the hash of those weights, and the name
    of each link that it refers to besides → its identity. All of that must be done.

    init: where its weights come from; None where it starts from no run.
    """
    uses = {} if init is None else {INIT: find_init(init).parent()["hash"]}
    others = [word for word in link.words if not word.startswith(f"{INIT}=")]
    named = {name for word in others for name in REFERENCE.findall(word)}
    return uses | {other.name: identity(other.path) for other in chain if other.name in named}


def moved_on(link: Link, uses: Mapping[str, str], record: Mapping[str, Any] | None) -> str | None:
    """Why what there is of a link no longer follows from what it was made from; None: it does.

    uses: of now. record: of links.json, from when it began.
    """
    if record is None:
        return "this pipeline did not begin it"
    was = record["uses"]
    for key in {**was, **uses}:
        what = "the weights that it started from" if key == INIT else key
        if key not in uses or key not in was:
            return f"it was made {'without' if key not in was else 'with'} {what}"
        if was[key] != uses[key]:
            return f"{what} {'have' if key == INIT else 'has'} changed since"
    return None


def outdated(link: Link, chain: Sequence[Link], record: Mapping[str, Any] | None) -> str | None:
    """moved_on of a link that is not to be made now, and that stays as it is."""
    if link.manifest is None or record is None:
        return None
    try:
        return moved_on(link, uses_of(link, record["init"], chain), record)
    except InputError:
        return "what it was made from is gone"


def standing(
    link: Link, cfg: DictConfig, uses: Mapping[str, str] | None, record: Mapping[str, Any] | None
) -> tuple[str, str]:
    """(new, again, done or invalid; why it is invalid) of a selected link.

    Args:
        cfg: its configuration, resolved.
        uses: what it would be made from now; None: some of that is yet to be made.
    """
    manifest = link.manifest
    if manifest is None:
        return "new", ""
    kept = steps(link.path / "checkpoints") or any(
        (link.path / name).is_dir() for name in (cfg.stage.name, "grid")
    )
    if manifest["status"] == "failed" and not kept:
        return "new", ""  # as of any run: it has nothing to lose
    changed = changes(link, cfg)
    if uses is None:
        return "invalid", "what it was made from is yet to be made"
    why = moved_on(link, uses, record)
    if why is None and changed:
        told = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
        why = f"it has other settings ({told})"
    if why is not None:
        return "invalid", why
    return "done" if link.done else "again", ""


def changes(link: Link, cfg: DictConfig) -> list[str]:
    """In which keys the run that is there differs from cfg: "train.steps 60 → 80"."""
    try:
        stored = OmegaConf.load(link.path / "config.yaml")
    except OSError:
        return ["config.yaml is gone"]
    was, now = (
        {k: v for k, v in dict(_leaves(OmegaConf.to_container(c, resolve=True))).items()
         if k.partition(".")[0] not in ASIDE}
        for c in (stored, cfg)
    )  # fmt: skip
    # A key that came since, and says nothing, is none that the run would have had otherwise.
    told = {k: (was.get(k), now.get(k)) for k in {**was, **now}}
    return [f"{k} {a} → {b}" for k, (a, b) in told.items() if a != b]


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no mapping; an empty mapping is a value."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def naming(cfg: DictConfig, places: Sequence[Path]) -> list[str]:
    """The dotted keys whose values name something in one of these directories."""
    roots = [str(place) for place in places]

    def within(value: Any) -> bool:
        if isinstance(value, list):
            return any(map(within, value))
        if isinstance(value, dict):
            return any(map(within, value.values()))
        text = str(value)
        return any(f"{root}/" in f"{text}/" for root in roots)

    content = OmegaConf.to_container(cfg, resolve=True)
    found = [key for key, value in _leaves(content) if within(value)]
    return [key for key in found if key not in (*OWN, INIT)]


def records_of(root: Path) -> dict[str, Any]:
    """links.json: of each link that was begun, what it is made from and its seconds."""
    return read_json(root / RECORD) if (root / RECORD).is_file() else {}
