"""The gate's verdicts as text for a terminal, Markdown for a job summary, JUnit XML and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from xml.etree import ElementTree

import pandas as pd
from rich.console import Console
from rich.text import Text

from lmms_keyspace import __version__
from lmms_keyspace.reports.gate import FAIL, INCONCLUSIVE, PASS, GateResult
from lmms_keyspace.reports.markup import markdown_table, plain, xml_text
from lmms_keyspace.reports.rows import SHARE
from lmms_keyspace.reports.text import one_line
from lmms_keyspace.reports.wording import interval, number, p_value

_STYLES = {PASS: "green", FAIL: "red", INCONCLUSIVE: "yellow"}
_LEGEND = (
    "Change: candidate minus baseline, turned so that positive is better, with one-sided adjusted bounds; % rows in "
    "points. Groups: those that both runs have (worse, better). Detectable: the loss that would show with 80 % "
    "probability."
)


def printed_verdicts(result: GateResult) -> pd.DataFrame:
    """The verdicts as text; every output prints these cells."""
    rows = [
        {
            "Verdict": one.verdict,
            "Metric": f"{one.label}{' (%)' if one.unit == SHARE else ''}",
            "Task": one_line(one.task),
            "Baseline": number(one.baseline, one.unit),
            "Candidate": number(one.candidate, one.unit),
            "Change": number(one.delta, one.unit, signed=True),
            "Bounds": interval(one.lower, one.upper, one.unit, signed=True),
            "Margin": number(one.margin, one.unit),
            "n": str(one.n),
            "Groups": f"{one.clusters} ({one.losses}, {one.gains})",
            "McNemar p": p_value(one.mcnemar),
            "Detectable": number(one.mde, one.unit),
            "Reason": one.reason,
        }
        for one in result.verdicts
    ]
    return pd.DataFrame(rows)


def headline(result: GateResult) -> str:
    """One line: the verdict, the policy and the two runs."""
    return (
        f"{result.verdict.upper()}: {one_line(result.policy.name)} "
        f"({one_line(result.candidate)} against {one_line(result.baseline)})"
    )


def render_gate(result: GateResult, console: Console) -> None:
    """Print the verdicts, each with its reason."""
    console.print(Text(headline(result), style=f"bold {_STYLES[result.verdict]}"), soft_wrap=True)
    for row in printed_verdicts(result).to_dict("records"):
        console.print(Text(f"\n{row['Verdict']:<13}", style=_STYLES[row["Verdict"]]), end="")
        console.print(Text(f"{row['Metric']}, {row['Task']}: {row['Baseline']} -> {row['Candidate']}"), soft_wrap=True)
        for name in ("Change", "Bounds", "Margin", "n", "Groups", "McNemar p", "Detectable", "Reason"):
            console.print(Text(f"  {name:<11}{row[name]}"), soft_wrap=True)
    for warning in result.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    console.print(Text(f"\n{_LEGEND}", style="dim"), soft_wrap=True)


def gate_markdown(result: GateResult) -> str:
    """For a job summary."""
    table = printed_verdicts(result)
    lines = [f"## {plain(headline(result))}", ""]
    lines += [f"- warning: {plain(warning)}" for warning in result.warnings]
    lines += ["", markdown_table(list(table.columns), table.values.tolist()), "", _LEGEND, ""]
    return "\n".join(lines)


def gate_json(result: GateResult) -> str:
    """Everything, numbers unrounded; numbers that do not exist are null."""
    content = {
        "verdict": result.verdict,
        "exit_code": result.exit_code,
        "baseline": result.baseline,
        "candidate": result.candidate,
        "policy": result.policy.model_dump(),
        "warnings": result.warnings,
        "metrics": [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            for row in map(asdict, result.verdicts)
        ],
        "lmms_keyspace": __version__,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def gate_junit(result: GateResult) -> str:
    """JUnit XML, one test case per metric; an inconclusive one is an error, or skipped where the policy passes it."""
    cases = list(zip(result.verdicts, printed_verdicts(result).to_dict("records"), strict=True))
    inconclusive = {"report": "error", "fail": "failure", "pass": "skipped"}[result.policy.inconclusive]
    tags = [{PASS: None, FAIL: "failure", INCONCLUSIVE: inconclusive}[one.verdict] for one, _ in cases]
    counts = {
        f"{name}{'' if name == 'skipped' else 's'}": str(tags.count(name)) for name in ("failure", "error", "skipped")
    }
    suite = ElementTree.Element(
        "testsuite", {"name": xml_text(one_line(result.policy.name)), "tests": str(len(cases)), **counts}
    )
    for (one, row), tag in zip(cases, tags, strict=True):
        names = {"classname": xml_text(one_line(one.task)), "name": xml_text(one.metric)}
        case = ElementTree.SubElement(suite, "testcase", names)
        if tag:
            ElementTree.SubElement(case, tag, {"message": xml_text(one.reason)})
        said = "\n".join(f"{name}: {value}" for name, value in row.items())
        ElementTree.SubElement(case, "system-out").text = xml_text(said)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"
