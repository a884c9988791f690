"""The gate: is a candidate at least as good as a baseline, up to the margins of a policy? It says when it cannot tell.

Per metric the change is paired by group and oriented so that positive is better.

- pass: the adjusted one-sided lower bound is above -margin.
- fail: the adjusted one-sided upper bound is below 0, an exact test confirms the loss, and the estimate is at or below
  -margin.
- inconclusive: everything else, and always below the policy's `min_groups`.

Adjusted means Holm over the metrics of the gate, for the passes and for the fails apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lmms_keyspace import stats
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import METRICS
from lmms_keyspace.reports.comparable import mismatches, remarks
from lmms_keyspace.reports.items import Items, TaskItems, load_items
from lmms_keyspace.reports.policy import MetricRule, Policy, load_policy
from lmms_keyspace.reports.rows import NAN, SCORE, SHARE
from lmms_keyspace.reports.text import one_line
from lmms_keyspace.reports.wording import with_unit

PASS, FAIL, INCONCLUSIVE = VERDICTS = ("pass", "fail", "inconclusive")
_EXIT = {PASS: 0, FAIL: 1, INCONCLUSIVE: 2}
_TREATED_AS = {"report": INCONCLUSIVE, "fail": FAIL, "pass": PASS}


@dataclass(frozen=True)
class MetricVerdict:
    """The verdict on one metric of one task, with what it rests on.

    `delta`, `lower` and `upper` are oriented: positive is better. `lower` and `upper` are one-sided bounds at
    `level_pass` and `level_fail`, the levels of Holm's procedure; `bound` says where `lower` comes from. `p_pass` is
    the adjusted p of "worse by the margin or more", `p_fail` that of "no loss". `n` is the denominator of the
    candidate's value, `clusters` the groups that both runs have and that count, `losses` and `gains` those that
    differ. `mde`: the loss that the upper bound would show with 80 % probability.
    """

    task: str
    metric: str
    label: str
    unit: str
    better: str
    margin: float
    verdict: str
    reason: str
    baseline: float = NAN
    candidate: float = NAN
    delta: float = NAN
    lower: float = NAN
    upper: float = NAN
    level_pass: float = NAN
    level_fail: float = NAN
    p_pass: float = NAN
    p_fail: float = NAN
    mcnemar: float = NAN
    mde: float = NAN
    n: int = 0
    clusters: int = 0
    losses: int = 0
    gains: int = 0
    bound: str = ""


@dataclass(frozen=True)
class GateResult:
    """What the gate found. `warnings` says what was left out of account or compared in spite of a difference."""

    baseline: str
    candidate: str
    policy: Policy
    verdicts: tuple[MetricVerdict, ...]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """fail when a metric fails, else inconclusive when one is, else pass."""
        found = {one.verdict for one in self.verdicts}
        return FAIL if FAIL in found else INCONCLUSIVE if INCONCLUSIVE in found else PASS

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 inconclusive; the policy may count inconclusive as one of the others."""
        return _EXIT[_TREATED_AS[self.policy.inconclusive] if self.verdict == INCONCLUSIVE else self.verdict]

    @property
    def table(self) -> pd.DataFrame:
        """One row per metric with the fields of `MetricVerdict`."""
        return pd.DataFrame([asdict(one) for one in self.verdicts])


class _Paired(NamedTuple):
    """A metric of one task, measured in both runs on the groups that both have."""

    label: str
    unit: str
    direction: int
    baseline: float
    candidate: float
    n: int
    change: stats.OrientedChange


def gate(
    baseline: Items | Path | str,
    candidate: Items | Path | str,
    policy: Policy | Path | str,
    *,
    allow_mismatch: bool = False,
) -> GateResult:
    """Judge `candidate` against `baseline`: run folders, or frozen baselines, under a policy or its file or name.

    Raises InputError for a run that is incomplete, damaged, not valid or not interpretable in a task that the policy
    judges, for runs that must not be compared (unless allowed), and for a metric that does not exist.
    """
    rules = policy if isinstance(policy, Policy) else load_policy(policy)
    base, run = (one if isinstance(one, Items) else load_items(one) for one in (baseline, candidate))
    against = mismatches(base.fingerprint, run.fingerprint)
    if against and not allow_mismatch:
        raise InputError(
            "candidate", "; ".join(against), "these runs must not be compared; --allow-mismatch does it and says so"
        )
    judged = [(rule, task) for rule in rules.metric for task in _tasks(rule, base, run)]
    for side in (base, run):
        for task in dict.fromkeys(task for _, task in judged):
            if task in side.tasks and (reasons := side.tasks[task].refused):
                raise InputError(f"run {side.label}", one_line(task), f"its numbers say nothing: {'; '.join(reasons)}")
    measured = [_paired(rule, base.tasks.get(task), run.tasks.get(task)) for rule, task in judged]
    verdicts = _judge(rules, judged, measured)
    return GateResult(
        baseline=base.label,
        candidate=run.label,
        policy=rules,
        verdicts=tuple(verdicts),
        warnings=(*against, *remarks(base.fingerprint, run.fingerprint), *_lost(base, run, judged)),
    )


def _tasks(rule: MetricRule, base: Items, run: Items) -> list[str]:
    """The tasks that a rule judges: its own, or every one of the baseline that has the metric.

    Raises InputError for a metric that neither run has and that is none of the probes'.
    """
    if rule.task is not None:
        return [rule.task]
    found = [task for task, items in base.tasks.items() if _values(rule.name, items) is not None]
    if not found and rule.name not in METRICS:
        scores = {name for side in (base, run) for items in side.tasks.values() for name in items.scores}
        raise InputError(
            "policy metric", rule.name, f"no such metric; there are {', '.join([*METRICS, *sorted(scores)])}"
        )
    return found or [next(iter(base.tasks), "")]


def _values(name: str, items: TaskItems) -> tuple[pd.DataFrame, str, str, int, float] | None:
    """Numerators and denominators by item, with label, unit, direction and span; None where it is not measured."""
    if name in items.scores:
        scores = items.scores[name]
        unit = SHARE if scores.between(0, 1).all() else SCORE
        span = 1.0 if unit == SHARE else float(scores.max() - scores.min()) or 1.0
        frame = pd.DataFrame({"num": scores, "den": 1.0})
        return frame, name, unit, items.directions[name], span
    metric = METRICS.get(name)
    if metric is None or items.outcomes is None or not metric.applies_to(items.outcomes):
        return None
    numerator, denominator = metric.counts(items.outcomes)
    frame = pd.DataFrame({"num": numerator, "den": denominator}, index=items.outcomes.index)
    return frame, metric.label, SHARE, metric.direction, 2.0 if metric.signed else 1.0


def _paired(rule: MetricRule, base: TaskItems | None, run: TaskItems | None) -> _Paired | str:
    """The paired change, or why there is none."""
    sides = [None if items is None else _values(rule.name, items) for items in (base, run)]
    for side, of in zip(sides, ("baseline", "candidate"), strict=True):
        if side is None:
            return f"not measured in the {of}"
    (of_base, label, unit, direction, span), (of_run, _, unit_of_run, _, span_of_run) = sides  # type: ignore[misc]
    if rule.direction is not None:
        direction = {"higher": 1, "lower": -1}[rule.direction]
    if direction == 0:
        raise InputError(
            "policy metric", rule.name, 'neither direction is better by itself: set direction to "higher" or "lower"'
        )
    unit = SHARE if unit == unit_of_run == SHARE else SCORE
    if unit == SHARE and rule.margin >= 1:
        raise InputError("policy margin", rule.margin, f"{rule.name} is a share: 5 points are 0.05")
    both = of_base.join(of_run, how="inner", lsuffix="_a", rsuffix="_b")
    counting = both[(both["den_a"] > 0) | (both["den_b"] > 0)]
    if len(counting) < 2 or min(counting["den_a"].sum(), counting["den_b"].sum()) == 0:
        return f"{len(counting)} groups in both runs count for it"
    base_side, run_side = ((counting[f"num_{x}"], counting[f"den_{x}"]) for x in "ab")
    try:
        change = stats.oriented_change(base_side, run_side, direction, span=max(span, span_of_run))
    except InputError as error:
        return error.way_out
    value_of_base, value_of_run = (float(num.sum() / den.sum()) for num, den in (base_side, run_side))
    return _Paired(label, unit, direction, value_of_base, value_of_run, int(run_side[1].sum()), change)


def _judge(
    policy: Policy, judged: Sequence[tuple[MetricRule, str]], measured: Sequence[_Paired | str]
) -> list[MetricVerdict]:
    """The verdicts, with bounds at the levels of Holm's procedure over all metrics that were measured."""
    pairs = [(rule, one) for (rule, _), one in zip(judged, measured, strict=True) if isinstance(one, _Paired)]
    p_pass = [one.change.p_of_excess_loss(rule.margin) for rule, one in pairs]
    p_fail = [one.change.p_of_loss for _, one in pairs]
    columns = [stats.holm_levels(p_pass, policy.alpha), stats.holm_levels(p_fail, policy.alpha)]
    columns += [stats.holm(p_pass).tolist(), stats.holm(p_fail).tolist()]
    found = iter(zip(*columns, strict=True))
    return [
        _verdict(policy, rule, task, one, *next(found)) if isinstance(one, _Paired) else _unmeasured(rule, task, one)
        for (rule, task), one in zip(judged, measured, strict=True)
    ]


def _verdict(
    policy: Policy, rule: MetricRule, task: str, one: _Paired, level_pass: float, level_fail: float,
    p_pass: float, p_fail: float,
) -> MetricVerdict:  # fmt: skip
    change, unit = one.change, one.unit
    lower, upper = change.lower(level_pass), change.upper(level_fail)
    margin = with_unit(rule.margin, unit)
    at_most = f"{with_unit(lower.value, unit, signed=True)} ({lower.source})"
    at_best = with_unit(upper.value, unit, signed=True)
    if change.clusters < policy.min_groups:
        verdict = INCONCLUSIVE
        reason = f"{change.clusters} groups, the policy asks for {policy.min_groups}"
    elif p_pass <= policy.alpha:
        verdict, reason = PASS, f"lower bound {at_most}, above -{margin}"
    elif p_fail <= policy.alpha and change.value <= -rule.margin + stats.ROUNDING:
        verdict, reason = FAIL, f"worse by the margin of {margin} or more; upper bound {at_best}, below 0"
    elif p_fail <= policy.alpha:
        verdict = INCONCLUSIVE
        reason = (
            f"a loss (upper bound {at_best}) that is smaller than {margin}; lower bound {at_most}, not above -{margin}"
        )
    else:
        verdict = INCONCLUSIVE
        reason = f"lower bound {at_most}, not above -{margin}; no loss is shown either (upper bound {at_best})"
        if upper.value < 0:
            reason += ", not confirmed by the exact test"
    return MetricVerdict(
        task=task,
        metric=rule.name,
        label=one.label,
        unit=unit,
        better="higher" if one.direction > 0 else "lower",
        margin=rule.margin,
        verdict=verdict,
        reason=reason,
        baseline=one.baseline,
        candidate=one.candidate,
        delta=change.value,
        lower=lower.value,
        upper=upper.value,
        level_pass=level_pass,
        level_fail=level_fail,
        p_pass=p_pass,
        p_fail=p_fail,
        mcnemar=stats.mcnemar_exact(change.losses, change.gains) if change.binary else NAN,
        mde=change.mde(level_fail),
        n=one.n,
        clusters=change.clusters,
        losses=change.losses,
        gains=change.gains,
        bound=lower.source,
    )


def _unmeasured(rule: MetricRule, task: str, reason: str) -> MetricVerdict:
    label = METRICS[rule.name].label if rule.name in METRICS else rule.name
    return MetricVerdict(task, rule.name, label, SHARE, rule.direction or "", rule.margin, INCONCLUSIVE, reason)


def _lost(base: Items, run: Items, judged: Sequence[tuple[MetricRule, str]]) -> list[str]:
    """Groups of one run that the other does not have."""
    found = []
    for task in dict.fromkeys(task for _, task in judged):
        sides = [side.tasks[task].outcomes if task in side.tasks else None for side in (base, run)]
        if any(one is None for one in sides):
            continue
        unpaired = len(sides[0].index.symmetric_difference(sides[1].index))  # type: ignore[union-attr]
        if unpaired:
            found.append(f"{one_line(task)}: {unpaired} groups are in one run only and were not compared")
    return found
