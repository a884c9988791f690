"""How long does a leaderboard take? `python benchmarks/leaderboard.py RUN [--sizes 50 100 200]`: one row per size.

RUN is a run folder of the plugin. Its files are linked into as many folders as a size asks for, each with an adapter of
its own name, and the command runs on them in a process of its own, start included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lmms_keyspace.store import find_runs


def copies(run: Path, number: int, root: Path) -> None:
    """`number` folders below `root` with the files of `run` and another adapter each."""
    files = find_runs(run)[-1]
    for index in range(number):
        folder = root / f"run{index:03d}"
        folder.mkdir()
        for file in files.folder.glob(f"{files.date}*"):
            if not file.name.endswith("_keyspace.json"):
                os.link(file, folder / file.name)
        record = json.loads((files.folder / f"{files.date}_keyspace.json").read_text())
        changed = record | {"adapter": f"adapters/{index}", "adapter_sha256": f"{index:064x}"}
        (folder / f"{files.date}_keyspace.json").write_text(json.dumps(changed))


def seconds(run: Path, number: int) -> tuple[float, float]:
    """Wall and CPU time of the command over `number` runs."""
    with tempfile.TemporaryDirectory(dir=run.resolve().parent) as root:
        copies(run, number, Path(root))
        command = [sys.executable, "-c", "from lmms_keyspace.cli import main; main()", "leaderboard", root]
        start, before = time.perf_counter(), cpu_of_children()
        done = subprocess.run([*command, "--out", f"{root}/out"], check=True, capture_output=True, text=True)
        taken = time.perf_counter() - start, cpu_of_children() - before
        assert "leaderboard.html" in done.stdout
        page = Path(root, "out", "leaderboard.md").read_text()
        assert page.count("\n| ") == number + 1, "a row for every run"
        return taken


def cpu_of_children() -> float:
    """CPU seconds of all processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200])
    arguments = parser.parse_args()
    print("| runs | wall s | CPU s | CPU s a run | peak memory of all so far, MB |\n|---|---|---|---|---|")
    for size in arguments.sizes:
        wall, cpu = seconds(arguments.run, size)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"| {size} | {wall:.1f} | {cpu:.1f} | {cpu / size:.3f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
