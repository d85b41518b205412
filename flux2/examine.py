"""What is to be done about each link of a pipeline, and what of it is refused, before the first
link begins: in a process of its own, so that the pipeline's has no torch.

Links are gone through in the order in which they would run. One whose parent is not there yet is
compared with what that parent will have made (flux2.dryrun).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flux2 import launch
from flux2.chain import (
    INIT,
    Facts,
    Link,
    chain_of,
    facts_of,
    naming,
    outdated,
    records_of,
    selected,
    standing,
    uses_of,
    words_of,
)
from flux2.errors import InputError
from flux2.launch import die_with, write_note
from flux2.lineage import find_init
from flux2.ranks import parsed, resolved

STAGE = "pipeline"
MERGING = ("merge", "fuse")
"""Stages that train nothing and whose result is weights."""
LOGGER = ("wandb", "project", "entity", "group", "tags", "interval")
"""What the links' loggers take over from the pipeline's."""

Composed = tuple[DictConfig, Mapping[str, Any], set[str]]
Compose = Callable[[Sequence[str], Sequence[str]], Composed]
"""(a command line, words that it gets where it has such keys) → its configuration, the choices of
its groups, and which of those words it got."""
Ending = Callable[[BaseException, Sequence[str]], tuple[int, str]]
"""(an exception, the command line) → its exit code, and what to say."""


@dataclass(frozen=True)
class Step:
    """What is to be done about a link.

    Attributes:
        name, number, path: of the link. stage: of its configuration.
        state: new, again (it goes on), done, or kept (not asked for).
        init: where its weights come from; None where it starts from no run.
        note: what is odd about one that is kept.
    """

    name: str
    number: int
    path: str
    stage: str
    state: str
    init: str | None = None
    note: str | None = None

    @property
    def todo(self) -> bool:
        """Whether there is something to do."""
        return self.state in ("new", "again")


def examine_links(arguments: list[str], compose: Compose, ending: Ending) -> int:
    """The process that examines all links. Arguments: a folder with the pipeline's config.yaml, the
    pipeline's process. Leaves NN.yaml of each link that is to be done, and links.json."""
    folder, parent = Path(arguments[0]), int(arguments[1])
    die_with(parent)
    where: Link | None = None
    words: list[str] = []
    steps: list[Step] = []
    try:
        cfg = parsed((folder / "config.yaml").read_text(encoding="utf-8"))
        examiner = Examiner(cfg, compose, folder)
        for link in examiner.chain:
            where, words = link, link.arguments(examiner.chain)
            steps.append(examiner.step(link))
        where = None
        examiner.check_common()
    except BaseException as error:
        code, text = ending(error, words)
        if code == 2:
            text = text.removeprefix("error: ")
            text = text if where is None else f"link {where.name}: {text}"
        elif where is not None:
            text += f"\nerror: link {where.name} could not be examined"
        write_note(folder / "links.json", {"code": code, "text": text})
        return code
    write_note(folder / "links.json", {"code": 0, "plan": [asdict(step) for step in steps]})
    return 0


class Examiner:
    """Goes through the links in order, as they would run.

    Attributes:
        chain: the links.
    """

    def __init__(self, cfg: DictConfig, compose: Compose, folder: Path) -> None:
        self.chain = chain_of(cfg)
        self._cfg, self._compose, self._folder = cfg, compose, folder
        self._wanted = selected(cfg, self.chain)
        common: Any = OmegaConf.to_container(cfg, resolve=True)
        self._common = words_of(common["common"], "common")
        self._taken: set[str] = set()
        self._records = records_of(Path(cfg.run.dir))
        self._facts: dict[str, Facts] = {}
        self._last: Link | None = None  # the latest that made weights

    def check_common(self) -> None:
        """Refuses words of common= that no link took, where all were asked. Raises InputError."""
        idle = [word for word in self._common if word not in self._taken]
        if idle and len(self._wanted) == len(self.chain):
            raise InputError(f"common: no link has such a key: {idle[0]}")

    def step(self, link: Link) -> Step:
        """What is to be done about a link. Its configuration is written where it is to be run.

        Raises:
            InputError: it cannot be, or what there is of it does not fit any more.
        """
        if link.name not in self._wanted:
            return self._kept(link)
        cfg, choices, taken = self._compose(link.arguments(self.chain), self._common)
        self._taken |= taken
        if cfg.stage.name == STAGE:
            raise InputError("a pipeline cannot be a link: write its links here")
        self._settle(link, cfg, choices)
        cfg = resolved(cfg)
        launch.check(cfg)
        if cfg.launch.nodes > 1:
            raise InputError("a pipeline's links run on this machine alone: set launch.nodes=1")
        state, open_links = self._state(link, cfg)
        if state == "done":
            facts = facts_of(link.path)
        else:
            facts = self._examine(link, cfg, open_links, "model" in choices)
            cfg.resume = "auto" if state == "again" else None
            file = self._folder / f"{link.number:02d}.yaml"
            file.write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
        self._note(link, facts)
        return Step(link.name, link.number, str(link.path), cfg.stage.name, state, cfg.init_from)

    def _kept(self, link: Link) -> Step:
        """A link that is not asked for, and stays as it is."""
        manifest = link.manifest
        if link.done:
            self._note(link, facts_of(link.path))
        else:  # those after it may be made from it, and must not pass over it
            cfg, _, _ = self._compose(link.arguments(self.chain), ())
            self._note(link, Facts(link.path, False, self._makes_weights(cfg)))
        note = outdated(link, self.chain, self._records.get(link.name))
        stage = "" if manifest is None else manifest["stage"]
        return Step(link.name, link.number, str(link.path), stage, "kept", None, note)

    @staticmethod
    def _makes_weights(cfg: DictConfig) -> bool:
        if cfg.get("method") is None:
            return cfg.stage.name in MERGING
        from flux2.dryrun import makes_weights, method_of

        return makes_weights(method_of(cfg))

    def _note(self, link: Link, facts: Facts) -> None:
        self._facts[link.name] = facts
        if facts.weights:
            self._last = link

    def _settle(self, link: Link, cfg: DictConfig, choices: Mapping[str, Any]) -> None:
        """What the pipeline says of every link that does not say it itself."""
        own = self._cfg
        cfg.run.dir, cfg.run.id, cfg.resume = str(link.path), None, "auto"
        if not link.says("seed"):
            cfg.seed = own.seed
        if own.launch.threads is not None and not link.says("launch.threads"):
            cfg.launch.threads = own.launch.threads
        if not any(word.startswith("logger") for word in link.words):
            for key in LOGGER:
                cfg.logger[key] = own.logger[key]
            cfg.logger.group = own.logger.group or Path(own.run.dir).name
        takes = "model" in choices and "runs" not in cfg and not self._brings_start(link, cfg)
        if takes and not link.says(INIT) and cfg.init_from is None:
            cfg.init_from = own.init_from if self._last is None else str(self._last.path)

    @staticmethod
    def _brings_start(link: Link, cfg: DictConfig) -> bool:
        """Whether its `lora` says what it lies on, as that of a run or of another link does."""
        if cfg.get("lora") is None:
            return False
        from flux2.fuse import is_run

        return bool(link.refers("lora")) or is_run(Path(cfg.lora))

    def _state(self, link: Link, cfg: DictConfig) -> tuple[str, list[Link]]:
        """(new, again or done; the links that it is made from and that are yet to be done)"""
        sources = {*link.refers(), *(other.name for other in self._parents(cfg))}
        ready = {name for name, facts in self._facts.items() if facts.ready}
        unready = [o for o in self.chain if o.name in sources and o.name not in ready]
        for other in unready:
            if other.name not in self._wanted:
                raise InputError(
                    f"it comes from {other.name}, which is not done: do {other.name} as well "
                    "(first=, only=)"
                )
        init = cfg.init_from
        if init is not None and not self._parents(cfg):
            find_init(init)
        if self._cfg.first is not None:
            return "new", unready
        uses = None if unready else uses_of(link, init, self.chain) if link.manifest else {}
        state, why = standing(link, cfg, uses, self._records.get(link.name))
        if state == "invalid":
            raise InputError(
                f"{link.path} is not what is asked for: {why}; add first={link.name} to make it "
                "and what follows anew, or choose another run.dir"
            )
        return state, unready

    def _parents(self, cfg: DictConfig) -> list[Link]:
        """The links that a run takes weights from: of init_from, of runs=, or of lora=."""
        runs: Any = OmegaConf.to_container(cfg).get("runs") or ()  # pyright: ignore
        given = runs.values() if isinstance(runs, dict) else runs
        given = [cfg.lora] if cfg.get("lora") is not None else given
        given = given if cfg.init_from is None else [cfg.init_from]
        paths = [Path(str(path).rpartition("=")[2]).resolve() for path in given]
        return [link for path in paths for link in self.chain if link.path in (path, *path.parents)]

    def _examine(
        self, link: Link, cfg: DictConfig, unready: Sequence[Link], has_model: bool
    ) -> Facts:
        """A dry run. What has neither a model nor a method is refused, if at all, by itself."""
        parents = self._parents(cfg)
        for other in parents:
            if cfg.init_from is not None and not self._facts[other.name].weights:
                raise InputError(f"{other.name} makes no weights to start from: name another link")
        facts = Facts(link.path, False, False)
        if has_model or "method" in cfg:
            from flux2.dryrun import examine

            told = [self._facts[other.name] for other in parents]
            merges = cfg.stage.name in MERGING
            facts = examine(cfg, told, [other.path for other in unready], merges)
        if cfg.stage.get("check") and not naming(cfg, [other.path for other in unready]):
            plain = cfg.copy()
            if any(other in unready for other in parents):
                plain.init_from = None
            module, _, function = str(cfg.stage.check).rpartition(".")
            getattr(import_module(module), function)(plain)
        return facts
