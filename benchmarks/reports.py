"""Time and memory of a report over many runs: `python benchmarks/reports.py [RUNS ...]` prints one table row per size.

Every run has 1,800 documents (300 groups), 32 layers of 8 KV heads, 128 captured clusters with attention by head, and
kept keys of four layers; the files have the shape of those of a real run, the numbers are made up. The command is the
one a user types, in a process of its own, whose time and peak memory are read from the operating system.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import fake_runs

from lmms_keyspace.store import write_run

SIZES = (5, 10, 20)
GROUPS, LAYERS, HEADS, CLUSTERS, KEPT = 300, 32, 8, 128, (0, 10, 21, 31)


def write_runs(count: int, root: Path) -> list[Path]:
    """A base and `count` - 1 adapters, each a little different."""
    fake_runs.LAYERS, fake_runs.HEADS = tuple(range(LAYERS)), HEADS
    # Kernel sums cost more to make than all that is timed here; those of one layer serve them all.
    make_sums, made = fake_runs._sums, []
    fake_runs._sums = lambda *cloud: made[0] if made else made.append(make_sums(*cloud)) or made[0]
    folders = []
    for number in range(count):
        base = replace(fake_runs.BASE, groups=GROUPS, captured=CLUSTERS, clean_wrong=12, blank_right=60)
        run = replace(base, name=f"run{number:02d}", flips=120 - number, gap=1 - 0.02 * number)
        if number:
            run = replace(run, adapter=f"adapters/arm{number:02d}", method="MALORA", date=f"20260102_{number:06d}")
        folder = fake_runs.write(replace(run, capture=False), root)
        data = fake_runs.captured_data(run)
        few = data.attention[data.attention["cluster"].isin({f"g{group:03d}" for group in range(CLUSTERS)})]
        heads = [few.assign(head_group=str(head)) for head in range(HEADS)]
        keys = {
            task: {name: array for name, array in arrays.items() if int(name.split("/")[1]) in KEPT}
            for task, arrays in data.keys.items()
        }
        write_run(folder, run.date, replace(data, attention=pd.concat([data.attention, *heads]), keys=keys))
        folders.append(folder)
    return folders


def measured(folders: list[Path], out: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak memory in GB of `lmms-keyspace report`."""
    command = Path(sys.executable).with_name("lmms-keyspace")
    start = time.perf_counter()
    pid = os.posix_spawn(command, [str(command), "report", *map(str, folders), "--out", str(out)], dict(os.environ))
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"the report ended with status {status}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, metavar="RUNS")
    sizes = sorted(parser.parse_args().sizes)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = write_runs(sizes[-1], root)
        print("| runs | seconds | CPU seconds | CPU seconds a run | peak memory (GB) |\n|---|---|---|---|---|")
        for size in sizes:
            wall, cpu, memory = measured(folders[:size], root / f"report{size}")
            print(f"| {size} | {wall:.0f} | {cpu:.0f} | {cpu / size:.1f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
