"""stage=pipeline: what is refused before the first link, what is done again, and what ends a link.

The quick tests have stages of their own, which need no torch, in processes like any; the chains of
real stages are at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import run
from flux2 import pipeline
from flux2.chain import Facts, chain_of, changes, facts_of, identity, moved_on
from flux2.checkpoint import latest_checkpoint, load_checkpoint, write_checkpoint
from flux2.dryrun import examine
from flux2.errors import InputError
from flux2.examine import Examiner

ROOT = Path(run.__file__).parent
STAGES = """
import hashlib, pathlib, time
from flux2.errors import InputError
from flux2.runs import Interrupt

def count(cfg):
    file, start = pathlib.Path(cfg.run.dir, "steps"), 0
    if cfg.resume is not None and file.exists():
        start = len(file.read_text().splitlines())
    elif file.exists():
        file.unlink()
    if cfg.fail == "refuse":
        raise InputError("the data has no images; name a folder that has")
    if cfg.fail == "crash":
        raise RuntimeError("boom")
    before = pathlib.Path(cfg.data, "steps").read_text() if cfg.data else ""
    with Interrupt() as stop:
        for step in range(start, cfg.steps):
            time.sleep(cfg.pause)
            line = hashlib.sha256(f"{cfg.seed} {step} {before}".encode()).hexdigest()
            with file.open("a") as out:
                out.write(line + chr(10))
            if stop.signum:
                stop.abort()
    return {"steps": cfg.steps, "seed": cfg.seed, "group": cfg.logger.group}

def check(cfg):
    if cfg.steps < 1:
        raise InputError(f"steps is {cfg.steps}: it must be at least 1")
"""
COUNT = """# @package _global_
stage: {name: count, run: chain_stages.count, check: chain_stages.check}
steps: 2
pause: 0.0
fail: null
data: null
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """conf/ with a stage of the test's own and a chain of three; run.py as a script over it."""
    conf = tmp_path / "conf"
    for part in ("logger", "launch"):
        shutil.copytree(ROOT / "conf" / part, conf / part)
    shutil.copy(ROOT / "conf" / "config.yaml", conf)
    for name in ("stage", "links", "experiment"):
        (conf / name).mkdir()
    shutil.copy(ROOT / "conf" / "stage" / "pipeline.yaml", conf / "stage")
    for name in ("count", "nft"):
        (conf / "stage" / f"{name}.yaml").write_text(COUNT)
    (conf / "links" / "nano.yaml").write_text(
        "a: stage=count\nb: stage=count data={a}\nc: [stage=count, 'data={b}', steps=3]\n"
    )
    (tmp_path / "chain_stages.py").write_text(STAGES)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, pathlib; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        f"import run; run.CONF = pathlib.Path({str(conf)!r})\n"
        "run.pipeline.SCRIPT = pathlib.Path(__file__); sys.exit(run.main())\n"
    )
    monkeypatch.setattr(run, "CONF", conf)
    monkeypatch.setattr(pipeline, "SCRIPT", script)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    yield conf
    sys.modules.pop("chain_stages", None)
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def call(conf, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """call("…") → (exit code, stdout, lines of stderr) of stage=pipeline run.dir=p …"""

    def call(*arguments: str, again: bool = False):
        words = ["stage=pipeline", "run.dir=p", *(["resume=auto"] if again else []), *arguments]
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        code = run.main()
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return call


def manifest(path: str | Path):
    return json.loads(Path(path, "manifest.json").read_text())


def ids(*names: str) -> list[str]:
    return [manifest(f"p/{name}")["id"] for name in names]


# ---------------------------------------------------------------- what is refused


def one_by_one(cfg, folder: Path):
    """The steps of a pipeline, or (exit code, the line that it is refused with)."""
    words: list[str] = []
    try:
        examiner, steps = Examiner(cfg, run._composed, folder), []
        for link in examiner.chain:
            words = link.arguments(examiner.chain)
            steps.append(examiner.step(link))
        examiner.check_common()
    except Exception as error:
        return run._ending(error, words)
    return steps


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["links.b='stage=count step=3'"], ["no key 'step'", "'steps'"]),
        (["links.b='stage=count steps=???'"], ["steps has no value"]),
        (["links.b='stage=count data={c}'"], ["link b: {c} is none before it", "choose from a"]),
        (["links.a=null"], ["link b: {a} is left out"]),
        (["links.b='stage=count run.dir=x'"], ["link b: the pipeline sets run.dir itself"]),
        (["links.b='stage=count -m'"], ["link b: '-m' is no key=value"]),
        (["links.b='steps=3'"], ["link b names no stage"]),
        (["links.b='stage=pipeline'"], ["a pipeline cannot be a link"]),
        (["links.b='stage=count \"'"], ["links.b: No closing quotation"]),
        (["links.b=3"], ["links.b is no command line"]),
        (["links.b='stage=count launch.processes=2'"], ["launch.processes=2", "engine="]),
        (["links.b='stage=count launch.nodes=2'"], ["launch.nodes=2"]),
        (["links.b='stage=count init_from=nowhere'"], ["nowhere is no run"]),
        (["links.b='stage=count init_from={a}'"], ["a makes no weights to start from"]),
        (["+more.d='steps=1'"], ["more.d is for no link: choose from a, b, c"]),
        (["common='step=1'"], ["common: no link has such a key: step=1"]),
        (["first=d"], ["first=d is no link: choose from a, b, c"]),
        (["only=[a,d]"], ["only=d is no link"]),
        (["only=c"], ["it comes from b, which is not done"]),
        (["run.dir='p,1'"], ["link b: run.dir=", "cannot hold"]),
    ],
)
def test_what_cannot_be_is_refused(conf, tmp_path, arguments, words):
    cfg, _ = run._compose(["stage=pipeline", "run.dir=p", *arguments])
    code, line = one_by_one(cfg, tmp_path)
    assert code == 2 and line.startswith("error: ") and "\n" not in line
    for word in words:
        assert word in line


def test_all_is_refused_in_one_line_before_the_first_link(call):
    code, _, err = call("links.c='stage=count steps=0'")
    assert code == 2 and err == ["error: link c: steps is 0: it must be at least 1"]
    assert not Path("p/01-a").exists() and manifest("p")["status"] == "failed"
    assert call("dry=true")[0] == 0  # a run that failed before it began may be repeated


# ---------------------------------------------------------------- what is done, and done again


def test_links_run_in_order_and_are_runs_like_any(call):
    code, out, err = call("seed=5", "common='steps=4'", "+more.a='pause=0.01'")
    assert (code, err) == (0, [])
    assert [p.name for p in sorted(Path("p").glob("0*"))] == ["01-a", "02-b", "03-c"]
    for name in ("01-a", "02-b", "03-c"):
        assert manifest(f"p/{name}")["status"] == "done"
    assert OmegaConf.load("p/01-a/config.yaml").pause == 0.01
    stored = OmegaConf.load("p/03-c/config.yaml")
    assert (stored.data, stored.steps, stored.seed) == (str(Path("p/02-b").resolve()), 4, 5)
    summary = json.loads(Path("p/summary.json").read_text())["links"]
    assert {k: v["state"] for k, v in summary.items()} == dict.fromkeys("abc", "made")
    assert summary["b"]["id"] == ids("02-b")[0] and summary["b"]["numbers"]["steps"] == 4
    assert json.loads(Path("p/02-b/summary.json").read_text())["group"] == "p"  # W&B's
    assert manifest("p")["links"] == {"a": "01-a", "b": "02-b", "c": "03-c"}
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("link ")] == [
        f"link {k} of 3: {n} → {Path('p').resolve()}/0{k}-{n}" for k, n in enumerate("abc", 1)
    ]
    assert lines[-1].startswith("3 links in") and "steps 4, seed 5" in lines[-2]

    before = ids("01-a", "02-b", "03-c")
    code, out, err = call("seed=5", "common='steps=4'", "+more.a='pause=0.01'", again=True)
    assert (code, err) == (0, []) and "link 1 of" not in out and out.count("there already") == 3
    assert ids("01-a", "02-b", "03-c") == before

    # Other settings are not passed over in silence, and nothing is thrown away.
    code, _, err = call("seed=5", "common='steps=4'", again=True)
    assert code == 2 and "link a: " in err[0] and "pause 0.01 → 0.0" in err[0]
    assert "add first=a" in err[0] and ids("01-a", "02-b", "03-c") == before


def test_first_makes_a_link_and_what_follows_anew(call):
    assert call()[0] == 0
    before = ids("01-a", "02-b", "03-c")
    code, out, _ = call("first=b", "links.b='stage=count data={a} steps=5'", again=True)
    assert code == 0 and "link 1 of 2: b" in out
    after = ids("01-a", "02-b", "03-c")
    assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]
    assert [manifest(f"p/{n}.1")["id"] for n in ("02-b", "03-c")] == before[1:]
    assert set(json.loads(Path("p/links.json").read_text())) == set("abc")
    # The run has forgotten first=: resumed, it has nothing to do.
    assert OmegaConf.load("p/config.yaml").first is None
    code, out, _ = call("links.b='stage=count data={a} steps=5'", again=True)
    assert code == 0 and ids("01-a", "02-b", "03-c") == after


def test_what_came_of_a_changed_result_is_not_taken_for_its_own(call, monkeypatch):
    two = "links.c=null"
    assert call(two)[0] == 0
    monkeypatch.setattr(sys, "argv", ["run.py", "resume=p/01-a"])  # by hand, with a later end
    time.sleep(1.1)
    assert run.main() == 0
    code, _, err = call(two, again=True)
    assert code == 2 and "link b: " in err[-1] and "a has changed since" in err[-1]
    # A link that is not asked for stays, and that is said.
    code, out, _ = call(two, "only=a", again=True)
    assert code == 0
    assert any("b " in line and "a has changed since" in line for line in out.splitlines())
    summary = json.loads(Path("p/summary.json").read_text())["links"]
    assert summary["b"]["state"] == "left as is" and summary["b"]["note"] == "a has changed since"
    # What is yet to be made cannot be what a link was made from.
    shutil.rmtree("p/01-a")
    code, _, err = call(two, again=True)
    assert code == 2 and "link b: " in err[-1] and "yet to be made" in err[-1]


def test_a_foreign_run_in_a_links_place_is_not_taken(call, monkeypatch):
    assert call("only=a")[0] == 0
    monkeypatch.setattr(sys, "argv", ["run.py", "stage=count", "data=p/01-a", "run.dir=p/02-b"])
    assert run.main() == 0
    code, _, err = call(again=True)
    assert code == 2 and "link b: " in err[-1] and "this pipeline did not begin it" in err[-1]


@pytest.mark.parametrize(
    ("how", "exit_code"), [("crash", 1), pytest.param("refuse", 2, marks=pytest.mark.slow)]
)
def test_a_link_that_fails_ends_the_chain_and_is_gone_on_with(call, how, exit_code):
    rest = "links.c='stage=count data={a}'"
    code, _, err = call(rest, f"+more.b='fail={how}'")
    assert code == exit_code
    assert "link b" in err[-1] and err[-1].startswith("error: ") and "resume=" in err[-1]
    assert (len(err) == 1) == (how == "refuse")
    assert any("boom" in line for line in err) == (how == "crash")
    assert manifest("p")["status"] == manifest("p/02-b")["status"] == "failed"
    assert manifest("p/01-a")["status"] == "done" and not Path("p/03-c").exists()
    before = ids("01-a")
    assert call("links.c=null", again=True)[0] == 0 and ids("01-a") == before


def test_dry_does_nothing(call):
    code, out, _ = call("dry=true")
    assert code == 0 and out.count("to do") == 3 and not Path("p/01-a").exists()


def test_a_dry_run_changes_nothing(call):
    assert call("only=a")[0] == 0

    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(Path("p").rglob("*")) if p.is_file()}

    before = files()
    assert call("dry=true", again=True)[0] == 0
    assert files() == before


def test_what_is_set_aside_is_no_link_any_more(tmp_path):
    cfg = OmegaConf.create({
        "links": {"a": "stage=x", "b": "stage=x"}, "more": {}, "first": "b",
        "run": {"dir": str(tmp_path)},
    })  # fmt: skip
    chain = chain_of(cfg)
    (tmp_path / "links.json").write_text(json.dumps({"a": {"uses": {}}, "b": {"uses": {}}}))
    (tmp_path / "manifest.json").write_text(json.dumps({"links": {"a": "01-a", "b": "02-b"}}))
    chain[1].path.mkdir()
    pipeline._begin_anew(cfg, chain[1:])
    assert (tmp_path / "02-b.1").is_dir() and not chain[1].path.exists()
    assert set(json.loads((tmp_path / "links.json").read_text())) == {"a"}
    assert manifest(tmp_path)["links"] == {"a": "01-a"}


def test_the_stages_own_examples_are_taken(call):
    """A run that is there is gone on with: first= of it needs resume=."""
    text = (ROOT / "conf" / "stage" / "pipeline.yaml").read_text()
    examples = [line for line in text.splitlines() if "python run.py" in line and "first=" in line]
    assert examples and all("resume=" in line for line in examples)


@pytest.mark.slow
def test_pipelines_sweep(conf, monkeypatch, capfd):
    monkeypatch.setattr(
        sys, "argv", ["run.py", "-m", "stage=pipeline", "links.c=null", "seed=1,2", "run.dir=s"]
    )
    assert run.main() == 0
    for number, seed in ((0, 1), (1, 2)):
        assert [manifest(f"s/{number}/{n}")["seed"] for n in ("01-a", "02-b")] == [seed, seed]
    capfd.readouterr()


# ---------------------------------------------------------------- what ends a link


def steps_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def begun(*arguments: str) -> subprocess.Popen[str]:
    """stage=pipeline as a process of its own, once its link b is in the middle."""
    words = ["stage=pipeline", "run.dir=p", "resume=auto", *arguments]
    process = subprocess.Popen(
        [sys.executable, str(pipeline.SCRIPT), *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    until = time.monotonic() + 120
    while len(steps_of(Path("p/02-b/steps"))) < 2:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.02)
    return process


SLOW = ("links.b='stage=count data={a} steps=20 pause=0.06'", "links.c=null")


def lines_of(seed: int, steps: int, before: str) -> list[str]:
    """What stage=count writes."""
    texts = [f"{seed} {step} {before}".encode() for step in range(steps)]
    return [hashlib.sha256(text).hexdigest() for text in texts]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_pipeline_that_is_ended_goes_on_as_if_it_had_not_been(call, number):
    process = begun(*SLOW)
    link = int(Path("p/02-b/.lock").read_text().split()[0])
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    until = time.monotonic() + 20
    while Path(f"/proc/{link}").exists():  # a link dies with its pipeline
        assert time.monotonic() < until
        time.sleep(0.05)
    if number == signal.SIGKILL:
        assert process.returncode == -number and manifest("p")["status"] == "running"
    else:
        assert process.returncode == 128 + number
        assert manifest("p")["status"] == manifest("p/02-b")["status"] == "interrupted"
        assert out.splitlines()[-1].endswith(f"resume={Path('p').resolve()}")
        assert out.count("resume=") == 1
    assert 2 <= len(steps_of(Path("p/02-b/steps"))) < 20
    before = ids("01-a", "02-b")
    code, out, err = call(*SLOW, again=True)
    assert (code, err) == (0, []) and "link 1 of 1: b" in out
    assert ids("01-a", "02-b") == before
    assert steps_of(Path("p/01-a/steps")) == lines_of(0, 2, "")
    told = Path("p/01-a/steps").read_text()
    assert steps_of(Path("p/02-b/steps")) == lines_of(0, 20, told)
    seconds = json.loads(Path("p/links.json").read_text())["b"]["seconds"]
    assert seconds > 1.1 or number == signal.SIGKILL  # of both sessions together


@pytest.mark.slow
def test_a_link_that_is_killed_alone_is_told(call):
    process = begun(*SLOW)
    os.kill(int(Path("p/02-b/.lock").read_text().split()[0]), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: link b was ended by SIGKILL (out of memory?)" in out.splitlines()[-1]
    assert "Traceback" not in out and manifest("p")["status"] == "failed"
    assert call(*SLOW, again=True)[0] == 0


# ---------------------------------------------------------------- weights, and the real stages


def made(path: Path, value: float, **facts: object) -> Path:
    """A run directory whose result is one checkpoint."""
    write_checkpoint(path / "checkpoints", 1, {"model/w": torch.full((2,), value)}, {}, {})
    told = {"id": "1", "status": "done", "finished": "now", "parents": [], "trained": ["model"]}
    (path / "manifest.json").write_text(json.dumps({**told, **facts}))
    (path / "config.yaml").write_text("adapter: null\n")
    (path / "summary.json").write_text("{}")
    return path


def test_weights_are_told_by_their_hash(tmp_path):
    one, same, other = (made(tmp_path / n, v) for n, v in (("a", 1.0), ("b", 1.0), ("c", 2.0)))
    assert identity(one) == identity(same) != identity(other)
    # Where there are none, a run is told by when it ended.
    for path, end in ((one, "now"), (same, "now"), (other, "later")):
        made(path, 1.0, trained=None, finished=end)
    assert identity(one) == identity(same) != identity(other)


def test_facts_of_a_run(tmp_path):
    path = made(tmp_path / "a", 1.0, model="nano", result_role="distilled", schedule_hash="x")
    assert facts_of(path) == Facts(path, True, True, "distilled", ("nano",), "x", False)
    assert not facts_of(made(tmp_path / "b", 1.0, trained=["autoencoder"])).weights


def test_moved_on(tmp_path):
    cfg = OmegaConf.create({"links": {"a": "stage=x"}, "more": {}, "run": {"dir": str(tmp_path)}})
    [link] = chain_of(cfg)
    record = {"uses": {"init_from": "1", "pairs": "2"}}
    assert moved_on(link, {"init_from": "1", "pairs": "2"}, record) is None
    why = moved_on(link, {"init_from": "3", "pairs": "2"}, record)
    assert why == "the weights that it started from have changed since"
    assert moved_on(link, {"init_from": "1", "pairs": "3"}, record) == "pairs has changed since"
    assert moved_on(link, {"init_from": "1"}, record) == "it was made with pairs"
    assert moved_on(link, {**record["uses"], "dpo": "1"}, record) == "it was made without dpo"
    # Changed settings, but for those that do not make a run another one; a new key that is null.
    link.path.mkdir()
    stored = {"train": {"steps": 2, "gone": 1}, "logger": {"wandb": "off"}, "seed": 0}
    OmegaConf.save(OmegaConf.create(stored), link.path / "config.yaml")
    asked = {"train": {"steps": 3, "new": None}, "logger": {"wandb": "online"}, "seed": 0}
    assert changes(link, OmegaConf.create(asked)) == ["train.steps 2 → 3", "train.gone 1 → None"]


def plan(folder: Path, *links: str, **more: object):
    """What is to be done about links of real stages, each name: words."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg, _ = run._compose(["stage=pipeline", f"run.dir={folder / 'p'}"])
    OmegaConf.set_struct(cfg, False)
    cfg.links = dict(link.split(": ", 1) for link in links)
    cfg.merge_with(more)
    examiner = Examiner(cfg, run._composed, folder)
    return [examiner.step(link) for link in examiner.chain]


SMALL = "data.batch_size=2 evaluation=none heldout=none"


def test_links_start_from_the_latest_that_makes_weights(tmp_path):
    steps = plan(
        tmp_path, f"sft: stage=sft adapter=lora {SMALL}",
        "pairs: stage=pairs count=4",
        f"dpo: stage=dpo {SMALL.removesuffix('heldout=none')} data.dataset.path={{pairs}}/pairs",
        "both: stage=merge runs=[{sft},{dpo}]",
        "export: stage=export format=[diffusers]",
        "adapter: stage=export format=lora-diffusers init_from={sft}",
        "compare: stage=report runs=[{sft},{dpo}]",
    )  # fmt: skip
    found = {s.name: None if s.init is None else Path(s.init).name for s in steps}
    assert found == {
        "sft": None, "pairs": "01-sft", "dpo": "01-sft", "both": None, "export": "04-both",
        "adapter": "01-sft", "compare": None,
    }  # fmt: skip
    assert all(step.state == "new" for step in steps)


PARENT = Facts(Path("/nowhere/01-sft"), False, True, "base", ("nano",), "0123456789ab")


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("stage=eval evaluation=none model.role=distilled", "model.role"),
        (
            f"stage=sft {SMALL} allow=[schedule] model=nano-scratch",
            "trained on nano and the model is nano-scratch",
        ),
        (f"stage=sft {SMALL}", "add allow=[schedule]"),
        (f"stage=sft {SMALL} allow=[schedule] method.micro=0", "micro"),
        (f"stage=sft {SMALL} allow=[schedule] optim.optimizer.lr=-1", "learning rate"),
        ("stage=export format=lora-diffusers", "no adapter was trained"),
        ("stage=export format=zip", "format is 'zip'"),
        ("stage=export model=nano", "leave out model="),
        ("stage=dpo evaluation=none data.dataset.path=/nowhere/01-sft/x method.beta=-1", "beta"),
    ],
)
def test_a_link_is_compared_with_what_its_parent_will_have_made(link, words):
    cfg, _ = run._compose([*link.split(), f"init_from={PARENT.path}"])
    with pytest.raises(InputError) as refused:
        examine(cfg, [PARENT], [PARENT.path])
    assert words in str(refused.value)


def test_of_a_model_that_is_yet_to_be_made_the_settings_are_checked():
    """A first stage's autoencoder, and a stage that completes its method when it runs."""
    words = ["stage=pretrain", f"model.vae={PARENT.path}/export/vae"]
    facts = examine(run._compose(words)[0], [], [PARENT.path])
    assert (facts.weights, facts.role, facts.models) == (True, "base", ("nano-scratch",))
    with pytest.raises(InputError, match=r"train\.steps is 0"):
        examine(run._compose([*words, "train.steps=0"])[0], [], [PARENT.path])
    size, _ = run._compose(["stage=size", f"init_from={PARENT.path}"])
    assert examine(size, [PARENT], []).models == ("nano",)


def test_what_trained_a_policy_is_followed_and_not_trained_further(tmp_path):
    steps = plan(
        tmp_path, f"sft: stage=sft {SMALL}",
        "policy: stage=distill method=policy data.batch_size=2 evaluation=none",
        "student: stage=export allow=[role]",
    )  # fmt: skip
    assert [Path(s.init or "-").name for s in steps] == ["-", "01-sft", "02-policy"]
    student = replace(PARENT, role="distilled", schedule=None, policy=True)
    for words in (f"stage=sft allow=[role] {SMALL}", "stage=fuse model.role=distilled lora=x"):
        cfg, _ = run._compose([*words.split(), f"init_from={student.path}"])
        with pytest.raises(InputError, match="is a policy student"):
            examine(cfg, [student], [], merges="fuse" in words)


def test_a_link_with_a_parent_has_that_parents_role():
    """Its base's own role is no matter, whether or not the parent is there yet."""
    parent = replace(PARENT, role="distilled", schedule=None)
    given = f"init_from={parent.path}", "model.role=distilled"
    for words in ("stage=sample", "stage=size", f"stage=sft allow=[role] {SMALL}"):
        cfg, _ = run._compose([*words.split(), *given])
        assert examine(cfg, [parent], []).role in (None, "distilled")
    cfg, _ = run._compose(["stage=sft", *SMALL.split(), *given])
    with pytest.raises(InputError, match=r"stage=sft trains a base"):
        examine(cfg, [parent], [])
    cfg, _ = run._compose(["stage=sft", *SMALL.split(), given[1]])  # it has no parent
    with pytest.raises(InputError, match="is not distilled"):
        examine(cfg, [], [])


def test_what_a_method_makes_may_depend_on_its_settings():
    """Also where only the settings are checked, as a teacher is yet to be made."""
    parent = replace(PARENT, schedule=None)
    words = ["stage=distill", "method=imitation", "evaluation=none", f"init_from={parent.path}",
             f"method.teachers={{a: {parent.path}}}"]  # fmt: skip
    for own, role in ((1, "distilled"), (3, "base")):
        more = [f"method.own_guidance={own}", "method.guidance=3"]
        found = examine(run._compose([*words, *more])[0], [parent], [parent.path])
        assert (found.weights, found.role) == (True, role)
    reward = ["stage=direct", "evaluation=none", f"model.vae={parent.path}/export/vae"]
    assert examine(run._compose(reward)[0], [], [parent.path]).weights


def test_a_fuse_starts_from_what_its_lora_lies_on(tmp_path):
    made(tmp_path / "style", 1.0, model="nano", stage="sft")
    steps = plan(
        tmp_path, f"sft: stage=sft adapter=lora {SMALL}", f"more: stage=sft {SMALL}",
        "own: stage=fuse lora={sft}",
        "file: stage=fuse lora={sft}/export/lora-diffusers",
    )  # fmt: skip
    assert [Path(s.init or "-").name for s in steps] == ["-", "01-sft", "-", "-"]
    again = plan(tmp_path / "b", f"sft: stage=sft {SMALL}", f"f: stage=fuse lora={tmp_path}/style")
    assert again[1].init is None


def test_a_kept_autoencoder_is_nothing_to_start_from(tmp_path):
    links = "vae: stage=autoencoder", f"sft: stage=sft {SMALL}"
    assert plan(tmp_path, *links, only="sft")[1].init is None


def test_what_a_parent_makes_distilled_is_no_base():
    parent = replace(PARENT, role="distilled")
    cfg, _ = run._compose(["stage=eval", "evaluation=none", f"init_from={parent.path}"])
    with pytest.raises(InputError, match=r"distilled model and model\.role is base"):
        examine(cfg, [parent], [parent.path])
    cfg.allow = ["role"]
    assert not examine(cfg, [parent], [parent.path]).weights


# ---------------------------------------------------------------- whole chains, slow

CHAIN = (
    "launch.threads=1", "~links",
    '+links.sft="stage=sft adapter=lora train.steps=4"',
    '+links.tune="stage=sft data=signs-exact train.steps=3"',
    '+links.eval="stage=eval evaluation=signs"', '+links.export="stage=export"',
    "common=['heldout=none','sampler.steps=2','evaluation.prompts=2','evaluation.shown=1',"
    "'~evaluation.metrics.ocr','~evaluation.metrics.tesseract','train.save_every=1',"
    "'data.batch_size=2','data.dataset.length=64']",
)  # fmt: skip


def started(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("a") as out:
        return subprocess.Popen(
            [sys.executable, "run.py", "stage=pipeline", *CHAIN, f"run.dir={folder}",
             "resume=auto"], cwd=ROOT, stdout=out, stderr=out,
        )  # fmt: skip


@pytest.mark.slow
def test_a_chain_of_real_stages_survives_kills(tmp_path):
    """Killed, then ended, in the middle of two links: the same weights, exports and evaluation."""
    whole, torn, log = tmp_path / "whole", tmp_path / "torn", tmp_path / "log"
    assert started(whole, log).wait() == 0, log.read_text()
    for name, number in (("01-sft", signal.SIGKILL), ("02-tune", signal.SIGTERM)):
        process = started(torn, log)
        while not (torn / name / "metrics.jsonl").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() in (-signal.SIGKILL, 143), log.read_text()
        assert not (torn / "03-eval").exists()
    assert started(torn, log).wait() == 0, log.read_text()
    for name in ("01-sft", "02-tune"):
        a, b = (load_checkpoint(latest_checkpoint(p / name / "checkpoints")) for p in (whole, torn))
        assert a.step == b.step and set(a.tensors) == set(b.tensors)
        assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
    one, two = (sorted((p / "04-export" / "export").rglob("*.safetensors")) for p in (whole, torn))
    assert one and [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    scores = [json.loads((p / "03-eval" / "summary.json").read_text())["metrics"]
              for p in (whole, torn)]  # fmt: skip
    assert scores[0] == scores[1]
    for link, parent in (("02-tune", "01-sft"), ("03-eval", "02-tune"), ("04-export", "02-tune")):
        [entry] = manifest(torn / link)["parents"]
        assert entry["id"] == manifest(torn / parent)["id"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "nano/redistill", "nano/line"])
def test_every_link_of_what_is_shipped_composes(recipe, tmp_path):
    given = ["stage=pipeline"] if recipe is None else [f"experiment={recipe}"]
    cfg, _ = run._compose([*given, f"run.dir={tmp_path / 'p'}"])
    for link in chain_of(cfg):
        composed, _ = run._compose(link.arguments(chain_of(cfg)))
        assert composed.stage.name and composed.recipe.stage in (None, composed.stage.name)
