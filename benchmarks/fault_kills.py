"""Kills at random moments of the four stages, and what they leave: nothing lost, nothing half read as whole, no hang.

A round makes a copy of a finished run, starts one stage beside it, kills it, looks at what is there, and starts
the same command again. It is killed at a random time, at one of its file operations, or in the midst of a write.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fault_stages as stages
from fault_checks import CHECKS, Laid, fingerprint, lost, unfinished
from fault_stages import Ended, Kill

from lmms_keyspace.store import find_runs

STAGES = ("run", "analyze", "train", "report")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("time", "time", "operation", "operation", "write")


@dataclass(frozen=True)
class Round:
    """One kill. The last four are empty when all was well; `killed` is False where the stage ended before.

    `unfinished` counts the files that were being written; the second start removes them.
    """

    number: int
    stage: str
    signal: str
    moment: str
    killed: bool
    unfinished: int
    wrong_read: str
    lost: str
    hang: str
    again: str


def lay(folder: Path) -> tuple[Laid, dict[str, Ended]]:
    """Every stage once to its end: what it leaves, and how it went.

    Raises:
        RuntimeError: a stage fails without being killed.
    """
    runs = folder / "runs"
    results = {stage: folder / stage for stage in STAGES[1:]} | {"run": runs / "base"}
    went = {}
    for stage in STAGES:
        went[stage] = stages.start(command_of(stage, runs, results[stage]), folder)
        if went[stage].code != 0 or (stage == "run" and not find_runs(runs)):
            raise RuntimeError(f"{stage} does not end well without a kill:\n{went[stage].said}")
    return Laid(runs, results), went


def command_of(stage: str, runs: Path, out: Path) -> list[str]:
    """The stage on the finished run in `runs`, into `out`."""
    if stage == "run":
        return stages.evaluate(out, "--model", "keyspace_llava")
    if stage == "analyze":
        return stages.analyze(runs / "base", out)
    if stage == "train":
        return stages.train(out)
    return stages.report([runs / "base"], out, "--no-figures")


def kill_once(laid: Laid, went: Ended, number: int, seed: int, scratch: Path) -> Round:
    """The round of that number: with the same seed the same draws, though a time falls where the machine lets it.

    `went` is how the stage went without a kill, `scratch` an empty folder.
    """
    draw = random.Random(f"{seed} {number}")
    stage, sent, moment = STAGES[number % len(STAGES)], draw.choice(SIGNALS), draw.choice(MOMENTS)
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
    command, limit = command_of(stage, runs, out), 300 + 30 * went.seconds
    ended = stages.start(command, scratch, kill=kill, limit_s=limit)
    hang = "did not end" if ended.code is None else ""
    gone = lost(before, fingerprint(scratch))
    check = CHECKS[stage]
    left = unfinished(scratch)
    wrong = check(laid, out, False)
    again, problem = _again(stage, command, scratch, limit)
    gone = gone or lost(before, fingerprint(scratch))
    if again.code is None:
        hang = hang or f"did not end the second time: {again.said[-300:]}"
    else:
        problem = problem or check(laid, out, True) or ", ".join(unfinished(scratch))
    return Round(
        number=number,
        stage=stage,
        signal=signal.Signals(kill.signal).name,
        moment=moment,
        killed=ended.code != 0,
        unfinished=len(left),
        wrong_read=wrong,
        lost=gone,
        hang=hang,
        again=f"{problem}\n{again.said[-2000:]}" if problem else "",
    )


def _again(stage: str, command: Sequence[str], within: Path, limit_s: float) -> tuple[Ended, str]:
    """The same command, and what is wrong with how it went; a refusal must name the option that goes on."""
    tables = within.glob("analyze/parts/*/*.parquet")
    unfinished = any(len(list(table.parent.glob(f"{table.stem}.*"))) == 3 for table in tables)
    if stage == "run":
        # lmms-eval names files by the second, and adds to those that are there. These processes are forked with all
        # imports done: two can start in one second, as nobody's can who types the command again.
        time.sleep(1)
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


def rounds(folder: Path, n: int, seed: int, log: Path | None) -> Iterator[Round]:
    """Rounds until `n` stages were killed, those in the log first; each new one is added to it."""
    known = [] if log is None or not log.exists() else [Round(**json.loads(line)) for line in log.open()]
    yield from known
    killed, number = sum(one.killed for one in known), len(known)
    if killed >= n:
        return
    laid, went = lay(folder / "laid")
    while killed < n:
        scratch = folder / str(number)
        scratch.mkdir()
        one = kill_once(laid, went[STAGES[number % len(STAGES)]], number, seed, scratch)
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
    rest = ("left unfinished", "wrong reads", "lost", "hangs", "not well the second time")
    said = io.StringIO()
    print(f"| stage | {' | '.join((*columns, *rest))} |", file=said)
    print("|---" * (1 + len(columns) + len(rest)) + "|", file=said)
    for stage in STAGES:
        own = [one for one in killed if one.stage == stage]
        names = ("unfinished", "wrong_read", "lost", "hang", "again")
        faults = [sum(bool(getattr(one, name)) for one in own) for name in names]
        counts = [sum(one.signal == name for one in own) for name in columns]
        print(f"| {stage} | {' | '.join(map(str, counts + faults))} |", file=said)
    return said.getvalue()
