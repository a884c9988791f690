"""How often is the gate right? `python benchmarks/gate.py [--simulations N]` prints one table row per case.

Paired binary outcomes of groups with a known true change: a group is right in the baseline only with probability
(discordance + drop) / 2, in the candidate only with (discordance - drop) / 2. Simulation i is drawn with seed i.
The whole gate runs, as on two runs, on the accuracy under misleading text with a margin of 5 points.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import numpy as np
import pandas as pd

from lmms_keyspace.outcomes import CONFLICT, GOLD, LURE
from lmms_keyspace.reports.comparable import Fingerprint
from lmms_keyspace.reports.gate import FAIL, INCONCLUSIVE, PASS, gate
from lmms_keyspace.reports.items import Items, TaskItems
from lmms_keyspace.reports.policy import MetricRule, Policy

MARGIN = 0.05
DISCORDANCE = 0.2
GROUPS = 300
ONE_METRIC = Policy(name="simulation", metric=(MetricRule(name="conflict_acc", margin=MARGIN),))
# name -> (true drop, groups, discordance)
CASES = {
    "no change": (0.0, GROUPS, DISCORDANCE),
    "true drop of the margin": (MARGIN, GROUPS, DISCORDANCE),
    "true drop of twice the margin": (2 * MARGIN, GROUPS, DISCORDANCE),
    "true gain of twice the margin": (-2 * MARGIN, GROUPS, DISCORDANCE),
    "no change, 50 groups": (0.0, 50, DISCORDANCE),
    "no change, 20 groups": (0.0, 20, DISCORDANCE),
    "no change, little discordance": (0.0, GROUPS, 0.02),
    "equal runs": (0.0, GROUPS, 0.0),
    "equal runs, 20 groups": (0.0, 20, 0.0),
}


def simulated(seed: int, drop: float, groups: int, discordance: float) -> tuple[Items, Items]:
    """Baseline and candidate: 60 % right in the baseline but for the groups that differ."""
    rng = np.random.default_rng(seed)
    lost, won = (discordance + drop) / 2, (discordance - drop) / 2
    kind = rng.choice(4, size=groups, p=[lost, won, 0.6 * (1 - discordance), 0.4 * (1 - discordance)])
    return _items("baseline", (kind == 0) | (kind == 2)), _items("candidate", (kind == 1) | (kind == 2))


def verdicts(simulations: int, drop: float, groups: int, discordance: float, *, swapped: bool = False) -> Counter[str]:
    """How often each verdict comes in `simulations` simulations."""
    found: Counter[str] = Counter()
    for seed in range(simulations):
        sides = simulated(seed, drop, groups, discordance)
        baseline, candidate = reversed(sides) if swapped else sides
        found[gate(baseline, candidate, ONE_METRIC).verdict] += 1
    return found


def _items(label: str, right: np.ndarray) -> Items:
    names = pd.Index([f"g{index:04d}" for index in range(len(right))], name="group_id")
    outcomes = pd.DataFrame({CONFLICT: np.where(right, GOLD, LURE)}, index=names)
    fingerprint = Fingerprint(tasks={}, batch_size="8")
    return Items(label, fingerprint, {"simulated": TaskItems(outcomes, {}, {})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    simulations = parser.parse_args().simulations
    print("| case | groups | discordance | pass | inconclusive | fail |\n|---|---|---|---|---|---|")
    start = time.perf_counter()
    cases = [(name, case, False) for name, case in CASES.items()]
    cases.insert(3, ("the same, runs swapped", CASES["true drop of twice the margin"], True))
    for name, case, swapped in cases:
        found = verdicts(simulations, *case, swapped=swapped)
        shares = (f"{found[verdict] / simulations:.3f}" for verdict in (PASS, INCONCLUSIVE, FAIL))
        print(f"| {name} | {case[1]} | {case[2]} | {' | '.join(shares)} |", flush=True)
    print(f"\n({simulations} simulations a case: {time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
