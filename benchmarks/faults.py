"""Faults on purpose: damaged files, killed stages, full disks, a process that dies, and what the commands make of it.

    python benchmarks/faults.py corruptions RUN RUN [--n 1000] [--seed 0] [--log FILE]
    python benchmarks/faults.py kills [--n 200] [--seed 0] [--log FILE]
    python benchmarks/faults.py disks
    python benchmarks/faults.py ranks

A log has one line of JSON a round; the same command goes on after it. Exits 1 when there was a fault.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

# Before torch is imported: processes are forked, and many stand beside each other.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def kills(given: argparse.Namespace) -> int:
    fault_kills = importlib.import_module("fault_kills")
    with tempfile.TemporaryDirectory() as folder:
        found = list(fault_kills.rounds(Path(folder), given.n, given.seed, given.log))
    print(fault_kills.table(found))
    faults = [one for one in found if one.wrong_read or one.lost or one.hang or one.again]
    for one in faults:
        print(f"\nround {one.number}, {one.stage}, {one.signal} by {one.moment}:")
        print("\n".join(filter(None, (one.wrong_read, one.lost, one.hang, one.again))))
    print(f"{len(faults)} faults in {sum(one.killed for one in found)} kills")
    return len(faults)


def disks(given: argparse.Namespace) -> int:
    fault_disks = importlib.import_module("fault_disks")
    with tempfile.TemporaryDirectory() as folder:
        found = fault_disks.try_all(Path(folder))
    for one in found:
        print(f"{one.stage:8} {'no folder' if one.room is None else f'{one.room} bytes':12} {one.fault or 'ok'}")
    return sum(bool(one.fault) for one in found)


def ranks(given: argparse.Namespace) -> int:
    fault_ranks = importlib.import_module("fault_ranks")
    with tempfile.TemporaryDirectory() as folder:
        fault = fault_ranks.kill_one(Path(folder))
    print(fault or "ok")
    return bool(fault)


def corruptions(given: argparse.Namespace) -> int:
    fault_corruptions = importlib.import_module("fault_corruptions")
    found = fault_corruptions.rounds(given.runs, range(given.seed, given.seed + given.n), given.log)
    print(fault_corruptions.table(found.values()))
    faults = {seed: one for seed, one in found.items() if one.fault}
    for seed, one in faults.items():
        print(f"\nseed {seed}: {one.command} after {one.corruption} of {one.file}\n{one.fault}")
    print(f"{len(faults)} faults in {len(found)} rounds")
    return len(faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command, n in ((corruptions, 1000), (kills, 200)):
        one = commands.add_parser(command.__name__)
        one.set_defaults(command=command)
        one.add_argument("--n", type=int, default=n)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--log", type=Path)
        if command is corruptions:
            one.add_argument("runs", type=Path, nargs=2)
    for alone in (disks, ranks):
        commands.add_parser(alone.__name__).set_defaults(command=alone)
    given = parser.parse_args()
    os.environ |= ENVIRONMENT
    sys.exit(bool(given.command(given)))


if __name__ == "__main__":
    main()
