"""Performance as ratios within one run: `python benchmarks/run.py [CASE ...]` prints one table row per case.

Each case alternates its two sides and reports the median ratio of its rounds with the range, beside the same code run
twice. Cases of the library alone run where lmms-eval is not installed; the others say so and are left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
from pathlib import Path

import timing
import torch

# case -> module of this folder
CASES = {
    "capture_overhead": "capture_cost",
    "capture_bundled": "capture_run",
    "capture_random_llava": "capture_run",
    "capture_llava_7b": "capture_cost",
    "throughput_bundled_16": "throughput",
    "throughput_bundled_1": "throughput",
    "throughput_random_16": "throughput",
    "throughput_random_1": "throughput",
    "memory_bundled": "memory",
    "memory_random_llava": "memory",
    "malora_prefill": "adapters",
    "gated_layer": "malora",
    "training_step_bundled": "malora",
    "training_step_llava_7b": "malora",
    "robust_mmd_2048": "estimators",
    "robust_mmd_4096": "estimators",
    "all_kernels_4096": "estimators",
    "classifier_2048": "estimators",
    "classifier_apart_2048": "estimators",
    "hyppo_mmd_4096": "estimators",
    "kernel_memory_4096": "estimators",
    "robust_llava_7b": "estimators",
}
NEEDS_GPU = {"capture_llava_7b", "training_step_llava_7b", "robust_llava_7b"}


def row(case: str, device: torch.device, rounds: int) -> dict[str, object]:
    """Run a case; what it measured, or why it was not run."""
    if case in NEEDS_GPU and device.type != "cuda":
        return {"case": case, "note": "not run: no GPU at hand"}
    try:
        measured = getattr(importlib.import_module(CASES[case]), case)(device, rounds)
    except ModuleNotFoundError as missing:
        return {"case": case, "note": f"not run: {missing.name} is not installed"}
    return {"case": case, "ratios": measured.ratios, "noise": measured.noise, "note": measured.note}


def line(found: dict[str, object]) -> str:
    """A row as Markdown."""
    cells = [found["case"], *(_summary(found.get(name, [])) for name in ("ratios", "noise")), found["note"]]
    return f"| {' | '.join(map(str, cells))} |"


def _summary(ratios: list[float]) -> str:
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall", help="cpu: processor time of the process")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write every round to this file too")
    given = parser.parse_args()
    unknown = sorted(set(given.cases) - set(CASES))
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    timing.use_clock(given.clock)
    device = torch.device(given.device)
    threads = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    print(f"{name}; {given.clock} time, median of {given.rounds} rounds, with the range\n")
    print("| case | ratio | same code twice | |\n|---|---|---|---|")
    rows = []
    for case in given.cases or CASES:
        rows.append(row(case, device, given.rounds))
        print(line(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"device": name, "rounds": given.rounds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
