"""The four stages as a person starts them, each in a process forked from this one: imported once, killed many times.

A process forked from one that has used torch's threads may hang, so there is one thread, and nothing here computes.
Nothing of lmms-eval or of the library is replaced but the list of lmms-eval's own tasks, which takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import mmap
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from lmms_eval import __main__ as harness_command
from lmms_eval.tasks import TaskManager

from lmms_keyspace import cli

# What a stage imports late: once here, not in every process.
for late in (
    "matplotlib.backends.backend_pdf",
    "matplotlib.backends.backend_svg",
    "nltk",
    "seaborn",
    "lmms_keyspace.analysis",
    "lmms_keyspace.model_wrappers.keyspace_vlm",
    "lmms_keyspace.reports",
    "lmms_keyspace.training.run",
):
    importlib.import_module(late)
for lazy in ("AutoModelForImageTextToText", "AutoProcessor", "LlavaForConditionalGeneration", "Trainer"):
    getattr(transformers, lazy)
torch.set_num_threads(1)
gc.freeze()  # or every process would look at all of this again when it collects

TASK = "textbias_probe_quick"
_FILE_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.chmod"})


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit status, minus a signal's number where that ended it, or None: it hung and was ended."""

    code: int | None
    said: str
    seconds: float
    operations: int  # on files below the folder that was watched


@dataclass(frozen=True)
class Kill:
    """When a process is ended: at a time, or at one of its file operations (opened to write, renamed, removed, ...).

    `room` is for a kill in the midst of writing: from the file operation on, no file may grow beyond so many bytes, and
    the process ends where one does.
    """

    signal: signal.Signals
    seconds: float | None = None
    operation: int | None = None
    room: int | None = None


def evaluate(out: Path, *arguments: str) -> list[str]:
    model_args = "capture_clusters=4,layers=0,capture_tokens=4"
    fixed = ["--batch_size", "4", "--limit", "24", "--log_samples", "--verbosity", "INFO"]
    return ["lmms-eval", "--tasks", TASK, "--model_args", model_args, *fixed, "--output_path", str(out), *arguments]


def analyze(run: Path, out: Path) -> list[str]:
    return ["lmms-keyspace", "analyze", str(run), "--permutations", "20", "--out", str(out)]


def train(out: Path, *arguments: str) -> list[str]:
    trainer = "{per_device_train_batch_size: 4, max_steps: 3, logging_steps: 1, save_steps: 1, disable_tqdm: true}"
    settings = (
        "data.scenes={n: 16, hint: 0.5, misleading: 0.5}",
        "evaluation.every=0",
        "loss={calibration_examples: 4}",
        f"trainer={trainer}",
    )
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["lmms-keyspace", "train", "--output-dir", str(out), *sets, *arguments]


def report(runs: Sequence[Path], out: Path, *arguments: str) -> list[str]:
    return ["lmms-keyspace", "report", *map(str, runs), "--out", str(out), "--tsne-runs", "0", *arguments]


def start(
    command: Sequence[str],
    within: Path,
    *,
    kill: Kill | None = None,
    prepare: Callable[[], None] = lambda: None,
    limit_s: float = 600,
) -> Ended:
    """Run a command in a process of its own, and wait for it.

    Args:
        command: of `lmms-eval` or `lmms-keyspace`.
        within: folder whose file operations are counted.
        kill: when to end it.
        prepare: called in the new process first.
        limit_s: from here on it hangs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    said, theirs = os.pipe()
    counted = mmap.mmap(-1, 8)  # shared with the process
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(said)
        _watch(within, kill, counted)
        be(command, theirs, prepare)
    os.close(theirs)
    due = begun + kill.seconds if kill is not None and kill.seconds is not None else None
    text, hung = bytearray(), False
    while True:
        now = time.monotonic()
        if due is not None and now >= due:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, kill.signal if kill is not None else signal.SIGKILL)
            due = None
        if not hung and now >= begun + limit_s:
            os.kill(child, signal.SIGKILL)
            hung = True
        until = min(due or begun + limit_s, begun + limit_s)
        if select.select([said], [], [], max(0.0, until - time.monotonic()) if not hung else None)[0]:
            if not (part := os.read(said, 1 << 16)):
                break
            text += part
    os.close(said)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(None if hung else code, text.decode(errors="replace"), time.monotonic() - begun, _number(counted))


def be(command: Sequence[str], said: int, prepare: Callable[[], None]) -> None:
    """The rest of the life of a forked process."""
    code = 70
    try:
        for number in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDONLY) if number == 0 else said, number)
        os.close(said)
        sys.argv = list(command)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
        prepare()
        _main(command[0])
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001  # what the interpreter would print
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _main(program: str) -> None:
    if program == "lmms-eval":
        harness_command.TaskManager = functools.partial(TaskManager, include_defaults=False)
        harness_command.cli_evaluate()
    else:
        cli.main()


def _watch(within: Path, kill: Kill | None, counted: mmap.mmap) -> None:
    """Count the file operations of this process below a folder, and end it at one of them."""

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if not _changes_files(event, arguments) or not str(arguments[0]).startswith(str(within)):
            return
        counted[:8] = struct.pack("<q", _number(counted) + 1)
        if kill is None or kill.operation != _number(counted):
            return
        if kill.room is None:
            os.kill(os.getpid(), kill.signal)
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (kill.room, kill.room))

    sys.addaudithook(watch)


def _number(counted: mmap.mmap) -> int:
    return int(struct.unpack("<q", counted[:8])[0])


def _changes_files(event: str, arguments: tuple[object, ...]) -> bool:
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in _FILE_EVENTS
