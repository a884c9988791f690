"""One of two processes of `test_several_processes.py`: several evaluations after each other, the last of which dies.

Usage, by a launcher that sets the ranks: python tests/two_processes.py FOLDER
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import sys
from pathlib import Path

from evaluation import evaluate, fix_cache_version
from lmms_eval.tasks import TaskManager
from transformers import GenerationMixin

from lmms_keyspace.sampling import Sampler

MODEL = "keyspace_llava"
TASK = "textbias_probe_quick"
ARGUMENTS = "keep_keys=on,capture_clusters=4,layers=0+3"
UNEVEN = 41  # documents; the second process has one fewer and answers a clone
# A probe whose documents are clusters of their own, so that the cache may answer those of one process.
ALONE = """
include: {folder}/textbias_probe/_textbias_probe_template
task: alone
dataset_kwargs:
  data_files:
    test: {folder}/textbias_probe/textbias_probe_quick.jsonl
metadata:
  version: 1.0
"""


def command_line(*arguments: str) -> None:
    """lmms-eval's own, as `python -m lmms_eval` runs it; only it does not look at every task that it brings."""
    from lmms_eval import __main__

    __main__.TaskManager = functools.partial(TaskManager, include_defaults=False)
    sys.argv = ["lmms-eval", "--model", MODEL, "--tasks", TASK, *arguments]
    __main__.cli_evaluate()


def seed_that_chooses_even_documents(count: int) -> int:
    names = [str(number) for number in range(count)]
    seeds = range(1000)
    return next(
        seed
        for seed in seeds
        if all(int(name) % 2 == 0 for name in Sampler(seed, clusters=4).choose_clusters("alone", names))
    )


def cached(folder: Path, rank: int) -> None:
    """Twice with a cache, from which the documents of rank 0 are taken in between."""
    import torch.distributed as dist

    fix_cache_version()
    seed, cache = seed_that_chooses_even_documents(10), folder / "cache"
    given = {"tasks": ["alone"], "include_path": folder, "limit": 10, "use_cache": str(cache)}
    given["model_args"] = f"{ARGUMENTS},seed={seed}"
    evaluate(MODEL, folder / "filled", **given)
    dist.barrier()
    if rank == 0:
        with contextlib.closing(sqlite3.connect(cache / "cache.db")) as answers, answers:
            answers.execute("DELETE FROM responses WHERE doc_id % 2 = 0")
        for left in (cache / "runs").rglob("rank_*"):  # or the cache would take them up again, as after a crash
            left.unlink()
    dist.barrier()
    evaluate(MODEL, folder / "half_cached", **given)


def dies(rank: int) -> None:
    """From now on the second process fails at its second batch."""
    generate, calls = GenerationMixin.generate, []

    def broken(*args, **kwargs):
        calls.append(kwargs)
        if rank == 1 and len(calls) == 2:
            raise ValueError("the model broke")
        return generate(*args, **kwargs)

    GenerationMixin.generate = broken


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    options = ["--model_args", ARGUMENTS, "--log_samples", "--limit", str(UNEVEN), "--batch_size", "4"]
    command_line(*options, "--output_path", str(folder / "uneven"))
    evaluate(MODEL, folder / "nothing", limit=1, model_args=ARGUMENTS)
    cached(folder, rank)
    dies(rank)
    command_line(*options, "--output_path", str(folder / "died"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
