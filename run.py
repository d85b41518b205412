"""The entry: compose the configuration once, then run the stage it names.

    python run.py stage=<stage> [experiment=<recipe>] [init_from=<run>] [key=value …]

main composes (or, for resume=<run>, reads what was composed) and hands each configuration to `job`,
which knows nothing of Hydra. Only `job` imports stages, and with them torch and diffusers, so that
--help and a misspelt key are answered at once. With launch.processes=2 the job is done by two
processes (flux2/launch.py); and where a launcher has started several, they do it (docs/launch.md).

Exit codes: 0 done; 1 failed; 2 wrong configuration or input, told in one line on stderr; 130 and
143 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.errors import OverrideParseException as ParseError
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from flux2 import distributed, launch, pipeline
from flux2.errors import InputError
from flux2.examine import STAGE, Composed, examine_links
from flux2.files import disk_fault
from flux2.ranks import attend, create, started_by_launcher, undisturbed, without_local_rank
from flux2.runs import Interrupted, finished

CONF = Path(__file__).resolve().parent / "conf"
DONE, FAILED, WRONG = 0, 1, 2
OmegaConf.register_new_resolver(  # files that are shipped with the project, from any folder
    "project", lambda path: str(CONF.parent / path), replace=True
)
OmegaConf.register_new_resolver(  # whether one of these strengths needs the empty prompt
    "guided", lambda *scales: any(s not in (None, 1) for s in scales), replace=True
)


def job(cfg: DictConfig) -> dict[str, Any]:
    """Run cfg's stage in cfg.run.dir; returns its summary, which is also in summary.json.

    Among several ranks every one calls this, with the same configuration; rank 0 alone writes the
    run's files. Raises what the stage raises, after the manifest's status has been set.
    """
    _check_recipe(cfg)
    chain = cfg.stage.name == STAGE  # it looks at its links itself, and has no torch
    if not chain and (summary := finished(cfg)) is not None:
        print(f"{cfg.run.dir} is done already, with this configuration", flush=True)
        return summary
    if cfg.launch.threads is not None and not chain:
        import torch

        torch.set_num_threads(cfg.launch.threads)
    if distributed.launched():
        distributed.start(distributed.pick_device(OmegaConf.select(cfg, "engine.device") or "auto"))
    if chain and cfg.dry:  # nothing is made, and a run that is there stays as it is
        return pipeline.run(cfg)
    run = create(cfg)

    def finish(status: str, summary: dict[str, Any] | None = None) -> None:
        if distributed.is_main():
            with undisturbed():
                run.finish(status, summary)

    try:
        module, _, function = str(cfg.stage.run).rpartition(".")
        stage: Callable[[DictConfig], dict[str, Any]] = getattr(import_module(module), function)
        summary = stage(cfg)
    except KeyboardInterrupt as interrupt:
        finish("interrupted")
        interrupt.add_note(f"interrupted; to go on: python run.py resume={run.path}")
        raise
    except BaseException:
        finish("failed")
        raise
    finish("done", summary)
    if distributed.launched():  # after a failure the others may be waiting elsewhere
        distributed.barrier()
        distributed.stop()
    return summary


# ---------------------------------------------------------------- the command


def main() -> int:
    """Run what sys.argv says; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == [launch.AGENT]:
        return launch.agent(arguments[1:])
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    if arguments[:1] == [launch.WORKER]:
        return launch.work(arguments[1:], job, lambda error: _ending(error, ()))
    if arguments[:1] == [pipeline.LINKS]:
        return examine_links(arguments[1:], _composed, _ending)
    if arguments[:1] == [pipeline.LINK]:
        return pipeline.run_link(arguments[1:], _perform, _ending)
    try:
        started = started_by_launcher()
    except InputError as error:
        return _say(*_ending(error, arguments))
    if started is None:
        return _command(arguments, _perform, _say)
    arguments = without_local_rank(arguments)

    def command(perform: Callable[[DictConfig], int], say: Callable[[int, str], int]) -> int:
        if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
            raise InputError(
                "-m runs several jobs, and a launcher's ranks do one: give each key one value, or "
                "leave the launcher out and write launch.processes=…"
            )

        def checked(cfg: DictConfig) -> int:
            launch.check(cfg, started)
            return perform(cfg)

        return _command(arguments, checked, say)

    return attend(command, job, lambda error: _ending(error, arguments), _say)


def _perform(cfg: DictConfig, say: Callable[[int, str], int] | None = None) -> int:
    """One job, here or on the ranks that it asks for; returns its exit code."""
    if launch.check(cfg) == 1:
        job(cfg)
        return DONE
    code, text = launch.start(cfg, Path(__file__))
    (say or _say)(code, text)
    if code > 128:
        raise Interrupted(code - 128)
    return code


def _command(
    arguments: Sequence[str], perform: Callable[[DictConfig], int], say: Callable[[int, str], int]
) -> int:
    """Do the jobs that the command line asks for; returns the exit code.

    perform: does one; returns its exit code. say: prints what went wrong; returns the exit code.
    """
    jobs: list[tuple[str, int]] = []  # (overrides, exit code) of each

    def attempt(run: Callable[[], int]) -> int:
        """Run one job; its failure is told at once, and is returned, so that a sweep goes on."""
        try:
            return run()
        except Exception as error:
            return say(*_ending(error, arguments))

    def composed(cfg: DictConfig) -> None:
        # Unresolved: an override may be an interpolation, and a wrong one at that.
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        name = " ".join(map(str, overrides or ()))
        if sweep := HydraConfig.get().mode == RunMode.MULTIRUN:
            print(f"job {HydraConfig.get().job.num}: {name}", flush=True)
        jobs.append((name, attempt(lambda: perform(_placed(cfg, sweep)))))

    chosen = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        _check_flags(arguments)
        if stored := _stored(arguments):
            return attempt(lambda: perform(_reread(*stored)))
        arguments = planned(arguments)
        with _command_line(arguments):
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(composed)()
    except Interrupted as interrupt:
        return say(*_ending(interrupt, arguments))
    except Exception as error:  # jobs' own are caught above: this is Hydra at work
        if isinstance(error, OSError) and error.filename is not None:
            text = f"cannot write {error.filename}: {error.strerror}; choose another run.dir"
            error = InputError(text)
        elif type(error) is ValueError:
            error = InputError(f"{error}; see --help")
        return say(*_ending(error, arguments))
    finally:
        if chosen is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = chosen
    failed = [f"{name} (exit {code})" for name, code in jobs if code != DONE]
    if failed and len(jobs) > 1:
        print(f"{len(failed)} of {len(jobs)} jobs failed: {'; '.join(failed)}", file=sys.stderr)
    codes = {code for _, code in jobs} - {DONE}
    return FAILED if FAILED in codes else WRONG if codes else DONE


@contextlib.contextmanager
def _command_line(arguments: Sequence[str]):
    """Hydra reads sys.argv: these arguments in it."""
    whole = sys.argv
    sys.argv = [whole[0], *arguments]
    try:
        yield
    finally:
        sys.argv = whole


def _composed(words: Sequence[str], common: Sequence[str]) -> Composed:
    """What a link's command line composes to, and as much of `common` as it has keys for."""
    cfg, choices = _compose(words)
    known = {*_keys(cfg), *choices}
    if not choices.get("model"):  # a stage that takes its model from its parent
        known.discard("model")
    parsed = OverridesParser.create().parse_overrides(list(common))
    pairs = zip(common, parsed, strict=True)
    taken = [word for word, o in pairs if o.is_add() or o.key_or_group in known]
    if taken:
        cfg, choices = _compose([*words, *taken])
    _check_recipe(cfg)
    return cfg, choices, set(taken)


def _compose(words: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """(a command line's configuration without Hydra's part, the choices of its groups)"""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", list(words), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    _check_named(cfg, choices)
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    return cfg, choices


def _interrupt(signum: int, _: FrameType | None) -> None:
    raise Interrupted(signum)


def _placed(cfg: DictConfig, sweep: bool) -> DictConfig:
    """`cfg` with the directory that Hydra chose for the job, and the sweep's W&B group."""
    now = HydraConfig.get()
    _check_named(cfg, now.runtime.choices)
    if sweep and cfg.logger.group is None:
        cfg.logger.group = Path(now.sweep.dir).name
    cfg.run.dir = now.runtime.output_dir
    return cfg


def _check_named(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    recipe = choices.get("experiment")
    if recipe is not None and cfg.recipe.stage is None:
        raise InputError(f"recipe {recipe} does not say its stage; add recipe: {{stage: …}} to it")


def _check_recipe(cfg: DictConfig) -> None:
    if cfg.recipe.stage not in (None, cfg.stage.name) and cfg.stage.name != "plan":
        raise InputError(_mismatch(cfg.recipe.stage, cfg.stage.name))


# ---------------------------------------------------------------- going on with a stored run


def _stored(arguments: Sequence[str]) -> tuple[Path, list[str]] | None:
    """(run directory, the other arguments) if the command line is resume=<run directory> …"""
    named = [a for a in arguments if a.startswith("resume=")]
    if not named or named[-1] in ("resume=auto", "resume=null", "resume="):
        return None
    rest = [a for a in arguments if a not in named]
    if any(a.startswith("-") for a in rest):
        raise InputError("resume=<run> takes no options; write key=value only")
    return Path(named[-1].removeprefix("resume=")), rest


def _reread(path: Path, changes: Sequence[str]) -> DictConfig:
    """The configuration stored in a run directory, with keys changed.

    Nothing is composed: the run goes on as it was, whatever has become of conf/ since.
    """
    if not (path / "manifest.json").is_file():
        raise InputError(f"resume={path} holds no run (no manifest.json); name a run directory")
    try:
        cfg = OmegaConf.load(path / "config.yaml")
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}/config.yaml: {_line(error)}; restore it") from error
    assert isinstance(cfg, DictConfig)
    # A run from before a launch key existed has the key's default.
    cfg.launch = OmegaConf.merge(OmegaConf.load(CONF / "launch" / "local.yaml"), cfg.launch)
    OmegaConf.set_struct(cfg, True)
    for change in OverridesParser.create().parse_overrides(list(changes)):
        key, value = change.key_or_group, change.value()
        if key == "stage" and value == cfg.stage.name:
            continue
        if change.is_add() or change.is_delete() or change.is_sweep_override():
            raise InputError(f"resume=<run> takes key=value only, not {change.input_line}")
        if (CONF / key).is_dir() or key == "run.dir":
            raise InputError(
                f"resume={path} takes {key} from {path}/config.yaml; leave out {change.input_line}"
            )
        if key not in (known := _keys(cfg)):
            raise InputError(f"no key '{key}'{_nearest(key, known)}")
        OmegaConf.update(cfg, key, value)
    cfg.resume = cfg.run.dir = str(path.resolve())
    return cfg


# ---------------------------------------------------------------- errors in one line


def _say(code: int, text: str) -> int:
    """Print, if there is something to say; returns the code."""
    if text:
        print(text, file=sys.stderr, flush=True)
    return code


def _ending(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code that an exception means, and what to say: one line, or the traceback."""
    if isinstance(error, Interrupted):
        return 128 + int(error.signum), "\n".join(getattr(error, "__notes__", ()))
    if isinstance(error, pipeline.LinkEnded):
        return error.code, str(error)
    text = _explain(error, arguments) if isinstance(error, Exception) else None
    if text is None and (fault := disk_fault(error)) is not None:
        return FAILED, f"error: {fault}"
    if text is None:
        return FAILED, "".join(traceback.format_exception(error)).rstrip()
    return WRONG, f"error: {_line(text)}"


def _explain(error: Exception, arguments: Sequence[str]) -> str | None:
    """The user's mistake in a few words; None if the error is none of the user's."""
    cause: BaseException | None = error
    while cause is not None:  # Hydra wraps what a constructor raises
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, RecursionError):
        return "the configuration includes itself: choose another file for one of its groups"
    text = str(error)
    if isinstance(error, InstantiationException):
        # A wrong argument comes from the configuration; what else a constructor raises is a crash.
        wrong = re.search(r"unexpected keyword argument|required \w+(-\w+)? argument", text)
        return text if wrong else None
    if isinstance(error, MissingConfigException | HydraException) and (
        reason := _recipe_mismatch(arguments)
    ):
        return reason
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        known = _choices(group) if group == "experiment" else list(error.options or [])
        return f"no {'recipe' if group == 'experiment' else group} '{name}'{_nearest(name, known)}"
    if isinstance(error, ParseError):
        return f"cannot read '{error.override}': {text.splitlines()[0]}; quote it, or see --help"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; add {error.full_key}=…"
    if isinstance(error, HydraException):
        missing = re.match(r"Could not (?:override|delete from config\.) '([^']+)'", text)
        if missing and not isinstance(error.__cause__, yaml.YAMLError):
            key, known = missing[1], _composable_keys(arguments)
            if key in known and error.__cause__ is None:
                return f"the stage has no {key} to choose: leave out {key}="
            new = re.search(r"Key '([^']+)' is not in struct", str(error.__cause__))
            if key in known and new:
                return f"{key} has no {new[1]!r}; if it takes new names, write +{key}.{new[1]}=…"
            if key in known:  # then what it was given does not fit
                return f"'{key}' cannot be set so: {str(error.__cause__).splitlines()[0]}"
            return f"no key '{key}'{_nearest(key, known)}"
        return f"{text} {error.__cause__ or ''}"
    if isinstance(error, OmegaConfBaseException):
        key = error.full_key
        return f"configuration{f' at {key}' if key else ''}: {text.splitlines()[0]}"
    if isinstance(error, yaml.YAMLError):
        return f"a YAML file cannot be read: {text}"
    return None


def _check_flags(arguments: Sequence[str]) -> None:
    """Refuse what argparse would answer with several lines of usage."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            _, unknown = get_args_parser().parse_known_args(list(arguments))
        except SystemExit:
            return  # it says the same again, in hydra.main
    for argument in unknown:
        if argument.startswith("-"):
            name = argument.split("=")[0]
            hint = f"write {argument.lstrip('-')}" if "=" in argument else "see --help"
            raise InputError(f"unknown option {name}; {hint}")
        raise InputError(f"'{argument}' comes after an option; write options such as -m first")


def _mismatch(recipe_stage: object, stage: object) -> str:
    return (
        f"the recipe is for stage={recipe_stage}, not stage={stage}; "
        f"leave out stage={stage} or choose another recipe"
    )


def _recipe_mismatch(arguments: Sequence[str]) -> str | None:
    """What is wrong if the command line gives a recipe another stage than it is for."""
    given, stage = _given(arguments)
    wrong = stage is not None and given.get("stage", stage) not in (stage, "plan")
    return _mismatch(stage, given["stage"]) if wrong else None


def planned(arguments: Sequence[str]) -> Sequence[str]:
    """stage=plan experiment=<recipe> plans the recipe's own stage: plan=<stage> is added."""
    given, stage = _given(arguments)
    if given.get("stage") != "plan" or stage is None:
        return arguments
    if given.get("plan", stage) != stage:
        raise InputError(f"the recipe is for stage={stage}: leave out plan={given['plan']}")
    return arguments if "plan" in given else [*arguments, f"plan={stage}"]


def _given(arguments: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """(stage=, plan= and experiment= of the command line, the recipe's stage). A recipe that is
    built on another has that one's stage where it says none of its own."""
    names = ("stage=", "plan=", "experiment=")
    given = dict(a.split("=", 1) for a in arguments if a.startswith(names))
    name, stage = given.get("experiment"), None
    while name is not None and stage is None:
        recipe = CONF / "experiment" / f"{name}.yaml"
        if not recipe.is_file():
            break
        content = OmegaConf.load(recipe)
        stage = OmegaConf.select(content, "recipe.stage")
        under = [d for d in OmegaConf.select(content, "defaults") or () if isinstance(d, str)]
        name = next((d.removeprefix("/experiment/") for d in under if "/experiment/" in d), None)
    return given, stage


def _choices(group: str) -> list[str]:
    """The names that group=<name> may take, recipes with their folder."""
    root = CONF / group
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: what may have been meant, or what there is."""
    known = list(known)
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # a key may be known by another path: lr → optim.lr
        near = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    if near:
        return f"; did you mean '{near[0]}'?"
    if known and len(known) <= 30:
        return f"; known: {', '.join(known)}"
    return "; python run.py --cfg job prints every key" if known else "; there is none"


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration."""
    out = []
    for key in cfg:
        name = f"{prefix}{key}"
        out.append(name)
        child = cfg._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            out += _keys(child, f"{name}.")
    return out


def _composable_keys(arguments: Sequence[str]) -> list[str]:
    """The keys and groups that the command line's groups would have given, for a suggestion."""
    groups = {p.name for p in CONF.iterdir() if p.is_dir()}
    chosen = [a for a in arguments if a.split("=")[0] in groups and "," not in a]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("config", chosen)
    except Exception:
        return sorted(groups)  # the suggestion is a courtesy; the error itself has been found
    return [*_keys(cfg), *sorted(groups)]


def _line(error: object) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
