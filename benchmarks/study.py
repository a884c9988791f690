"""Does aligning visual with text keys make a model rely on the image? The study on the bundled model.

    python benchmarks/study.py tune              # every arm, every learning rate, on the tuning seeds
    python benchmarks/study.py run               # the grid; `--base NAME=FOLDER` adds bases built from other seeds
    python benchmarks/study.py page              # docs/study.md and its figures from the raw files
    python benchmarks/study.py status            # what is done, and whether it still holds

A unit is one adapter, trained and measured; its raw file under benchmarks/study/ is written at once, and a unit whose
file is there is not done again. So a run can be stopped at any time, and `--shard 0/2` and `--shard 1/2` share it
between two processes. A file that rests on another base, generator or setting is done anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import study_page
from study_units import (
    CORE,
    OTHERS,
    Unit,
    base_folder,
    described,
    final_units,
    fingerprints,
    load_base,
    made,
    tuning_units,
)

RAW = Path(__file__).parent / "study"
ITEMS = {"tuning": ("dev", 20), "final": ("probe", 40)}  # seed space, scenes of each of five kinds of question


def is_done(unit: Unit, raw: Path, prints: dict[str, str]) -> bool:
    """Whether the file is there and rests on this base and generator and these settings."""
    file = raw / f"{unit.name}.json"
    if not file.is_file():
        return False
    saved = json.loads(file.read_text())
    return bool(saved["unit"] == described(unit)) and all(saved[name] == value for name, value in prints.items())


def work(units: list[Unit], raw: Path, bases: dict[str, Path], limit: int | None) -> None:
    """Do the units that are not done, at most `limit`."""
    from study_measure import Evaluation
    from transformers import AutoProcessor

    evaluations: dict[tuple[str, str], Any] = {}
    prints = {name: fingerprints(folder) for name, folder in bases.items()}
    waiting = [unit for unit in units if not is_done(unit, raw, prints[unit.base])]
    for unit in waiting[:limit]:
        folder = bases[unit.base]
        started = time.perf_counter()
        key = (unit.phase, unit.base)
        if key not in evaluations:
            space, n = ITEMS[unit.phase]
            evaluation = Evaluation(load_base(folder), AutoProcessor.from_pretrained(folder), space, n)
            evaluations[key] = evaluation, evaluation(load_base(folder))["bandwidth2"]
        evaluation, bandwidth2 = evaluations[key]
        prepared = time.perf_counter()
        with made(unit, folder) as (model, making):
            trained = time.perf_counter()
            result = evaluation(model, bandwidth2)
        if unit.arm != "base":
            del result["bandwidth2"]
        if unit.phase == "tuning":
            del result["documents"], result["by_layer"]
        seconds = {"train": round(trained - prepared, 1), "measure": round(time.perf_counter() - trained, 1)}
        record = {"unit": described(unit)} | prints[unit.base] | {"seconds": seconds} | making | result
        write(raw / f"{unit.name}.json", record)
        print(f"{unit.name}: {time.perf_counter() - started:.0f} s", flush=True)


def write(file: Path, record: dict[str, Any]) -> None:
    """One line for each entry; whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(f"{{\n{lines}\n}}\n")
    scratch.replace(file)


def tuned_rates(raw: Path) -> dict[str, float]:
    """The learning rate of each arm whose margin of the right answer on plain questions is best over the tuning seeds.

    The margin (log-odds of gold against one wrong answer, clean) is no outcome of the study, and every arm is tuned on
    it alike.
    """
    margins: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for unit in tuning_units():
        file = raw / f"{unit.name}.json"
        if not file.is_file():
            sys.exit(f"{unit.name} is missing: run `python benchmarks/study.py tune` first")
        margins[unit.arm][float(unit.learning_rate or 0)] += json.loads(file.read_text())["figures"]["margin_clean"]
    return {arm: max(found, key=found.__getitem__) for arm, found in margins.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "run", "page", "status"))
    parser.add_argument("--base", action="append", default=[], metavar="NAME=FOLDER", help="a further base; repeatable")
    parser.add_argument("--units", type=int, help="stop after so many")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do every Nth unit, beginning with the Ith")
    parser.add_argument("--arm", help="only this arm")
    parser.add_argument("--rate", type=float, help="this learning rate for all arms, in place of the tuned ones")
    parser.add_argument("--raw", type=Path, default=RAW, help="folder of the raw files (default: %(default)s)")
    given = parser.parse_args()
    others = {name: Path(folder) for name, folder in (entry.split("=", 1) for entry in given.base)}
    bases = {name: base_folder(name, others) for name in ("bundled", *others)}
    if given.command == "page":
        print(study_page.write_page(given.raw, fingerprints(bases["bundled"])))
        return
    if given.command == "tune":
        units = tuning_units()
    else:
        rates = dict.fromkeys((*CORE, *OTHERS), given.rate) if given.rate else tuned_rates(given.raw)
        units = final_units(list(bases), rates)
    units = [unit for unit in units if given.arm in (None, unit.arm)]
    if given.command == "status":
        done = [is_done(unit, given.raw, fingerprints(bases[unit.base])) for unit in units]
        print(f"{sum(done)} of {len(units)} units are done on this base and generator")
        sys.exit(0 if all(done) else 1)
    index, count = map(int, given.shard.split("/"))
    work(units[index::count], given.raw, bases, given.units)


if __name__ == "__main__":
    main()
