"""What the probes cost and whether their intervals hold: `python benchmarks/probes.py [CASE ...]`.

`coverage` simulates models that follow a sentence with a known probability, seeds 0 to 999; the other cases time the
making of documents and pictures, and a whole run of the headline task through the command line.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from lmms_keyspace import outcomes
from lmms_keyspace.outcomes import BLANK, CLEAN, CONFLICT, GOLD, IRRELEVANT, LURE, MATCH, OTHER, TEXT_ONLY_CONFLICT
from lmms_keyspace.store import read_samples
from lmms_keyspace.tasks import documents, probes
from lmms_keyspace.tasks.derived import DERIVED
from lmms_keyspace.tasks.metrics import summarize
from lmms_keyspace.tasks.rows import Replies

GROUPS = 300
SEEDS = range(1000)
ROUNDS = 3


def follower(seed: int, p: float, sees: float) -> Replies:
    """Replies of a model that follows a sentence with probability p, else answers what it sees.

    It sees the truth with probability `sees` in a group, else another word; each sentence is followed or not anew.
    """
    rng = np.random.default_rng([seed, round(1000 * p), round(1000 * sees)])
    seen = np.where(rng.random(GROUPS) < sees, GOLD, OTHER)

    def told(answer: str) -> np.ndarray:
        return np.where(rng.random(GROUPS) < p, answer, seen)

    said = pd.DataFrame(
        {CLEAN: seen, MATCH: told(GOLD), CONFLICT: told(LURE), IRRELEVANT: seen, TEXT_ONLY_CONFLICT: LURE, BLANK: OTHER}
    )
    return Replies(said, said, said.iloc[:, :0], list(map(str, said.index)))


def interval(name: str, replies: Replies) -> tuple[float | None, float | None]:
    """The 95 % interval of a metric."""
    if name in DERIVED:
        return DERIVED[name][0](replies)[1:3]
    measured = outcomes.measure(outcomes.METRICS[name], replies.outcomes)
    return (None, None) if measured is None else (measured.low, measured.high)


def true_values(p: float, sees: float) -> dict[str, float]:
    """What the metrics of a `follower` estimate."""
    right, lured = sees * (1 - p), p
    values = {
        "text_flip_rate": p,
        "conflict_acc": right,
        "conflict_drop": sees * p,
        "excess_flip": p,
        "tpr_label": lured / (lured + right),
        "tpr_gated": p,
        "tpr_model": p,
        "vrs": 2 * right * (1 - lured) / (right + 1 - lured),
    }
    return values if sees == 1 else values | {"benefit": (1 - sees) * p, "discrimination": 0.0}


def coverage() -> Iterator[str]:
    """Share of 1,000 simulated runs whose 95 % interval holds the true value."""
    names = list(true_values(0.5, 0.9))
    yield f"| follows with p | sees | {' | '.join(names)} |"
    yield "|---" * (2 + len(names)) + "|"
    for sees in (1.0, 0.9):
        for p in (0.1, 0.3, 0.5):
            truth = true_values(p, sees)
            covered = dict.fromkeys(truth, 0)
            for seed in SEEDS:
                replies = follower(seed, p, sees)
                for name, value in truth.items():
                    low, high = interval(name, replies)
                    covered[name] += low is not None and high is not None and low <= value <= high
            cells = (f"{covered[name] / len(SEEDS):.3f}" if name in truth else "" for name in names)
            yield f"| {p} | {sees:g} | {' | '.join(cells)} |"


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    """Median and largest of `ROUNDS` CPU times in seconds: what else runs on the machine counts little."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), max(seconds)


def building() -> Iterator[str]:
    """CPU seconds to make all documents of a task."""
    yield f"| documents of | number | CPU seconds, median of {ROUNDS} | max |\n|---|---|---|---|"
    for probe, groups in {"textbias_probe": 300, "textbias_rich": 324, "visreliance_probe": 200}.items():
        number = len(documents.build_documents(groups, probe=probe))
        median, most = _timed(lambda probe=probe, groups=groups: documents.build_documents(groups, probe=probe))
        yield f"| {probe} | {number} | {median:.3f} | {most:.3f} |"


def rendering() -> Iterator[str]:
    """CPU milliseconds to draw one picture, over the first 100 groups, none of them drawn before."""
    yield f"| pictures of | number | CPU ms each, median of {ROUNDS} | max |\n|---|---|---|---|"
    for probe in probes.NAMES:
        docs = [doc for doc in documents.build_documents(100, probe=probe) if doc["image"] != "none"]
        distinct = list({doc["image_sha"]: doc for doc in docs}.values())  # more than are kept in memory
        median, most = _timed(lambda distinct=distinct: [documents.doc_to_visual(doc) for doc in distinct])
        yield f"| {probe} | {len(distinct)} | {1000 * median / len(distinct):.2f} | {1000 * most / len(distinct):.2f} |"


def headline() -> Iterator[str]:
    """Seconds of `lmms-eval --tasks textbias_probe` with the bundled model, start to end, keys captured."""
    command = [str(Path(sys.executable).with_name("lmms-eval")), "--model", "malora_llava", "--tasks", "textbias_probe"]
    yield "| documents | clean accuracy | valid | seconds |\n|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [*command, "--batch_size", "8", "--output_path", folder, "--log_samples"], check=True, capture_output=True
        )
        seconds = time.perf_counter() - start
        (samples,) = Path(folder).rglob("*_samples_textbias_probe.jsonl")  # lmms-eval exits 0 when it failed
        rows = read_samples(samples)
        summary = summarize(rows.to_dict("records"))
    assert set(rows["condition"]) == set(outcomes.CONDITIONS)
    yield f"| {len(rows)} | {summary['clean_acc'].value:.3f} | {summary['valid'].value:g} | {seconds:.0f} |"


CASES: dict[str, Callable[[], Iterator[str]]] = {
    case.__name__: case for case in (coverage, building, rendering, headline)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default all")
    given = parser.parse_args()
    unknown = sorted(set(given.cases) - set(CASES))
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(CASES)}")
    for name in given.cases or CASES:
        start = time.perf_counter()
        for line in CASES[name]():
            print(line, flush=True)
        print(f"\n({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
