"""The post-processor: turns run folders into what a person reads. No torch, no lmms-eval: it works on files alone."""

from lmms_keyspace.reports.compare import Comparison, compare
from lmms_keyspace.reports.gate import GateResult, MetricVerdict, gate
from lmms_keyspace.reports.leaderboard import Leaderboard, leaderboard
from lmms_keyspace.reports.load import Run, Runs, load_runs
from lmms_keyspace.reports.policy import MetricRule, Policy, load_policy
from lmms_keyspace.reports.report import write_report
from lmms_keyspace.reports.terminal import render_comparison

__all__ = [
    "Comparison",
    "GateResult",
    "Leaderboard",
    "MetricRule",
    "MetricVerdict",
    "Policy",
    "Run",
    "Runs",
    "compare",
    "gate",
    "leaderboard",
    "load_policy",
    "load_runs",
    "render_comparison",
    "write_report",
]
