"""Kills at random moments of the four stages, and what they leave: nothing lost, nothing half read as whole, no hang.

A round makes a copy of a finished run, starts one stage beside it, kills it, looks at what is there, and starts
the same command again. It is killed at a random time, at one of its file operations, or in the midst of a write.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fault_stages as stages
from fault_stages import Ended, Kill
from transformers import AutoConfig

from lmms_keyspace import embedded
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import check_adapter
from lmms_keyspace.store import LoadedRun, find_runs, load_run
from lmms_keyspace.training.checkpoints import last_whole
from lmms_keyspace.training.run import RECORD

STAGES = ("run", "analyze", "train", "report")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("time", "time", "operation", "operation", "write")
_WEIGHTS = "adapter_model.safetensors"
_RUN_TABLES = ("divergence", "attention", "tokens")


@dataclass(frozen=True)
class Round:
    """One kill. The last four are empty when all was well; `killed` is False where the stage ended before."""

    number: int
    stage: str
    signal: str
    moment: str
    killed: bool
    wrong_read: str
    lost: str
    hang: str
    again: str


@dataclass(frozen=True)
class Laid:
    """What is there before the first kill: each stage's whole result, and how each stage went."""

    runs: Path
    results: dict[str, Path]
    went: dict[str, Ended]


def lay(folder: Path) -> Laid:
    """Every stage once to its end.

    Raises:
        RuntimeError: a stage fails without being killed.
    """
    runs = folder / "runs"
    results = {stage: folder / stage for stage in STAGES[1:]} | {"run": runs / "base"}
    went = {}
    for stage in STAGES:
        went[stage] = stages.start(_command(stage, runs, results[stage]), folder)
        if went[stage].code != 0 or (stage == "run" and not find_runs(runs)):
            raise RuntimeError(f"{stage} does not end well without a kill:\n{went[stage].said}")
    return Laid(runs, results, went)


def _command(stage: str, runs: Path, out: Path) -> list[str]:
    if stage == "run":
        return stages.evaluate(out, "--model", "keyspace_llava")
    if stage == "analyze":
        return stages.analyze(runs / "base", out)
    if stage == "train":
        return stages.train(out)
    return stages.report([runs / "base"], out, "--no-figures")


def kill_once(laid: Laid, number: int, seed: int, scratch: Path) -> Round:
    """The round of that number; with the same seed the same draws, though a time falls where the machine lets it."""
    draw = random.Random(f"{seed} {number}")
    stage, sent, moment = STAGES[number % len(STAGES)], draw.choice(SIGNALS), draw.choice(MOMENTS)
    went = laid.went[stage]
    operation = draw.randint(1, went.operations)
    kill = {
        "time": Kill(sent, seconds=draw.random() * went.seconds),
        "operation": Kill(sent, operation=operation),
        "write": Kill(signal.SIGXFSZ, operation=operation, room=int(10 ** draw.uniform(0, 4.5))),
    }[moment]
    runs = scratch / "runs"
    shutil.copytree(laid.runs, runs)
    out = runs / "base" if stage == "run" else scratch / stage
    if stage in ("analyze", "report") and draw.random() < 0.5:  # over a finished result
        shutil.copytree(laid.results[stage], out)
    before = fingerprint(scratch)
    command, limit = _command(stage, runs, out), 300 + 30 * went.seconds
    ended = stages.start(command, scratch, kill=kill, limit_s=limit)
    hang = "did not end" if ended.code is None else ""
    lost = _lost(before, fingerprint(scratch))
    check = _CHECKS[stage]
    wrong = check(laid, out, False)
    again, problem = _again(stage, command, scratch, limit)
    lost = lost or _lost(before, fingerprint(scratch))
    if again.code is None:
        hang = hang or f"did not end the second time: {again.said[-300:]}"
    else:
        problem = problem or check(laid, out, True)
    return Round(
        number=number,
        stage=stage,
        signal=signal.Signals(kill.signal).name,
        moment=moment,
        killed=ended.code != 0,
        wrong_read=wrong,
        lost=lost,
        hang=hang,
        again=f"{problem}\n{again.said[-2000:]}" if problem else "",
    )


def _again(stage: str, command: Sequence[str], within: Path, limit_s: float) -> tuple[Ended, str]:
    """The same command, and what is wrong with how it went; a refusal must name the option that goes on."""
    unfinished = stage == "analyze" and any(within.glob("analyze/parts/*/*.parquet"))
    again = stages.start(command, within, limit_s=limit_s)
    if stage == "train" and again.code == 2 and "go on with --resume" in again.said:
        again = stages.start([*command, "--resume"], within, limit_s=limit_s)
        if "going on from" not in again.said:
            return again, "does not say that it goes on"
    if stage == "train" and again.code == 2 and "holds a finished run" in again.said:
        return again, ""
    if unfinished and "going on" not in again.said:
        return again, "does not say that it goes on"
    return again, "" if again.code == 0 else f"exit {again.code} the second time"


def fingerprint(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _lost(before: dict[str, str], after: dict[str, str]) -> str:
    changed = [path for path, sha256 in before.items() if after.get(path) != sha256]
    return f"gone or changed: {changed}" if changed else ""


def _run_differs(laid: Laid, out: Path, whole: bool) -> str:
    """Every run in the folder is that of the reference, or refused; with `whole`, there is a second one."""
    expected, read = _reference(laid.runs / "base"), 0
    for files in find_runs(out):
        with contextlib.suppress(InputError):
            found = _named(load_run(files))
            if differing := [name for name, content in expected.items() if content != found.get(name)]:
                return f"{files.date}: {', '.join(differing)} differ from the whole run's"
            read += 1
    return "" if read >= 1 + whole else f"{read} of the runs can be read: {sorted(out.iterdir())}"


@functools.cache
def _reference(folder: Path) -> dict[str, str]:
    (files,) = find_runs(folder)
    return _named(load_run(files))


def _named(run: LoadedRun) -> dict[str, str]:
    """What a run says, by file; without its date and the paths and times in it."""
    data = run.data
    if data is None:
        return {"captured": "nothing"}
    sums = {key: [getattr(value, name).tolist() for name in ("vv", "tt", "vt")] for key, value in data.gram.items()}
    keys = {task: {name: arrays[name].tolist() for name in arrays} for task, arrays in data.keys.items()}
    samples = {task: frame.to_csv() for task, frame in run.samples.items()}
    tables = {name: getattr(data, name).to_csv() for name in _RUN_TABLES}
    named = {"captured": "all", "gram": sums, "keys": keys, "samples": samples, "results": run.results["results"]}
    return tables | {name: str(content) for name, content in named.items()}


def _files_differ(stage: str) -> Callable[[Laid, Path, bool], str]:
    """For a stage whose files depend on its input alone: each is the reference's, byte for byte, or is not there."""

    def check(laid: Laid, out: Path, whole: bool) -> str:
        expected, found = _visible(laid.results[stage]), _visible(out)
        strange = [name for name, sha256 in found.items() if expected.get(name) != sha256]
        missing = sorted(expected.keys() - found.keys()) if whole else []
        return f"strange: {strange}; missing: {missing}" if strange or missing else ""

    return check


def _visible(folder: Path) -> dict[str, str]:
    """As `fingerprint`, by path in the folder; not what is hidden, nor an analysis' unfinished parts."""
    own = {str(Path(path).relative_to(folder)): sha256 for path, sha256 in fingerprint(folder).items()}
    return {path: sha256 for path, sha256 in own.items() if not re.search(r"(^|/)(\.|parts/)", path)}


def _adapter_differs(laid: Laid, out: Path, whole: bool) -> str:
    """An adapter or checkpoint that can be read is the reference's."""
    expected = laid.results["train"]
    config = AutoConfig.from_pretrained(embedded.base_path())
    folders = [out, *(checkpoint for checkpoint in [last_whole(out)] if checkpoint is not None)]
    read = []
    for folder in folders:
        with contextlib.suppress(InputError):
            found = check_adapter(folder, config).sha256
            reference = expected / folder.relative_to(out) / _WEIGHTS
            if found != hashlib.sha256(reference.read_bytes()).hexdigest():
                return f"{folder.name} holds another adapter"
            read.append(folder)
    if len(folders) > 1 and folders[1] not in read:
        return f"{folders[1].name} is taken for whole and cannot be read"
    recorded = (out / RECORD).exists()
    if recorded:
        json.loads((out / RECORD).read_text())
    if recorded and out not in read:
        return "a record without its adapter"
    return "" if recorded or not whole else f"no record: {sorted(out.iterdir())}"


_CHECKS: dict[str, Callable[[Laid, Path, bool], str]] = {
    "run": _run_differs,
    "analyze": _files_differ("analyze"),
    "train": _adapter_differs,
    "report": _files_differ("report"),
}


def rounds(folder: Path, n: int, seed: int, log: Path | None) -> Iterator[Round]:
    """Rounds until `n` stages were killed, those in the log first; each new one is added to it."""
    known = [] if log is None or not log.exists() else [Round(**json.loads(line)) for line in log.open()]
    yield from known
    killed, number = sum(one.killed for one in known), len(known)
    laid = lay(folder / "laid") if killed < n else None
    while killed < n:
        assert laid is not None
        scratch = folder / str(number)
        scratch.mkdir()
        one = kill_once(laid, number, seed, scratch)
        shutil.rmtree(scratch)
        if log is not None:
            with log.open("a") as lines:
                lines.write(json.dumps(asdict(one)) + "\n")
        yield one
        killed, number = killed + one.killed, number + 1


def table(found: Sequence[Round]) -> str:
    """Kills by stage and signal as Markdown, and what was wrong."""
    killed = [one for one in found if one.killed]
    columns = sorted({one.signal for one in killed})
    said = io.StringIO()
    print(f"| stage | {' | '.join(columns)} | wrong reads | lost | hangs | not well the second time |", file=said)
    print("|---" * (len(columns) + 5) + "|", file=said)
    for stage in STAGES:
        own = [one for one in killed if one.stage == stage]
        faults = [sum(bool(getattr(one, name)) for one in own) for name in ("wrong_read", "lost", "hang", "again")]
        counts = [sum(one.signal == name for one in own) for name in columns]
        print(f"| {stage} | {' | '.join(map(str, counts + faults))} |", file=said)
    return said.getvalue()
