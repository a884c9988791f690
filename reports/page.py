"""Puts a report together once, and renders it as a page and as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lmms_keyspace import __version__
from lmms_keyspace.reports import wording
from lmms_keyspace.reports.compare import Comparison
from lmms_keyspace.reports.labels import BUNDLED
from lmms_keyspace.reports.load import Run, Runs
from lmms_keyspace.reports.sections import Section
from lmms_keyspace.reports.verdict import NOT_COMPARED, NOT_MEASURED, Finding, Verdict, same_change

_BUNDLED_NOTICE = (
    "Some of these runs are of the model that comes with the package: about one million parameters, trained on "
    "procedural pictures so that everything can be tried without a download. What it does says how the instruments "
    "behave, not how large models do."
)
_METHODS = (
    "Accuracy and flip rates: Wilson 95 % intervals; differences of rates within a run by bootstrap over groups. A "
    "group is one scene and question under all conditions.",
    "Changes between runs are paired by group: percentile interval of the cluster bootstrap, p of the cluster "
    "sign-flip permutation; adjusted by Holm over all tests of the comparison. Where no group differs, the interval is "
    "the exact binomial bound on how often one could.",
    "Minimum detectable effect: the change that a two-sided test at 5 % finds with 80 % probability.",
    "MMD²: cluster U-statistic with five Gaussian bandwidths around the median distance of the base model, pairs of "
    "tokens from one document left out; delete-one-cluster jackknife intervals, paired between runs (Gretton et al., "
    "2012; Arvesen, 1969).",
    "JS: lower bound on the Jensen-Shannon divergence in nats from a classifier tested on held-out clusters. Intervals "
    "of its mean over layers and of its change are conservative: layers count as one, runs as independent.",
    "Attention: share of the last prompt token's attention, mean over query heads, from the captured forward pass.",
    "A divergence between modalities is expected in any model and is no fault by itself; only its change is tested.",
)


@dataclass(frozen=True)
class Report:
    """All that a report says, before it has a form."""

    runs: Runs
    comparison: Comparison
    verdicts: tuple[Verdict, ...]
    sections: tuple[Section, ...]

    @property
    def summary(self) -> str:
        """One line: which runs, which tasks."""
        others = len(self.runs.runs) - 1
        against = f" and {others} more run{'s' if others > 1 else ''} compared with it" if others else ""
        return (
            f"{self.runs.base.label} (base){against}; tasks: {', '.join(self.runs.tasks)}; lmms-keyspace {__version__}"
        )

    @property
    def notices(self) -> list[str]:
        """What a reader must know before anything else."""
        bundled = any(run.record and run.record.pretrained == BUNDLED for run in self.runs.runs)
        return [_BUNDLED_NOTICE] if bundled else []


def html(report: Report) -> str:
    """The page: one file, no script, no request; everything from a run is escaped."""
    environment = Environment(
        loader=PackageLoader("lmms_keyspace.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        title="Key space and reliance on the image",
        summary=report.summary,
        notices=report.notices,
        warnings=report.comparison.warnings,
        base=report.runs.base.label,
        run_names=[run.label for run in report.runs.runs],
        overview={"columns": _VERDICT_COLUMNS, "rows": _verdict_rows(report)},
        verdicts=[{"verdict": one, "controls": same_change(one, report.verdicts)} for one in report.verdicts],
        runs={"columns": _RUN_COLUMNS, "rows": [_run_row(run) for run in report.runs.runs]},
        comparison=list(_comparison_tables(report.comparison)),
        tasks=[_task(one) for one in report.sections],
        methods=_METHODS,
        versions=[{"name": run.label, "rows": _settings(run)} for run in report.runs.runs],
    )


def markdown(report: Report) -> str:
    """The same without figures."""
    lines = ["# Key space and reliance on the image", "", _plain(report.summary), ""]
    lines += [f"> {_plain(notice)}\n" for notice in report.notices]
    lines += [f"- {_plain(warning)}" for warning in report.comparison.warnings]
    lines += ["", "## Verdict", ""]
    lines += [_markdown_table(_VERDICT_COLUMNS, _verdict_rows(report)), ""]
    for one in report.verdicts:
        lines += [f"### {_plain(one.run)} ({_plain(one.task)})", ""]
        for finding in (one.divergence, one.reliance, one.harm):
            lines += [f"**{finding.question}** {finding.answer}", ""]
            lines += [f"- {_plain(sentence)}" for sentence in finding.evidence]
            lines.append("")
        lines += [one.conclusion, "", *(f"{_plain(sentence)}\n" for sentence in same_change(one, report.verdicts))]
    lines += ["## What was run", "", _markdown_table(_RUN_COLUMNS, [_run_row(run) for run in report.runs.runs])]
    printed = wording.printed(report.comparison.table)
    lines += ["", "## Comparison", "", _markdown_table(list(printed.columns), printed.values.tolist())]
    for section in report.sections:
        if len(section.families):
            table = _markdown_table(list(section.families.columns), section.families.values.tolist())
            lines += ["", f"## By family of questions, {_plain(section.name)}", "", table]
    lines += ["", "## Methods", "", *(f"- {sentence}" for sentence in _METHODS)]
    return "\n".join(lines) + "\n"


_VERDICT_COLUMNS = ["Run", "Task", "Divergence", "Reliance on the image", "Plain questions"]


def _verdict_rows(report: Report) -> list[list[str]]:
    return [[one.run, one.task, *map(_answer, (one.divergence, one.reliance, one.harm))] for one in report.verdicts]


def _answer(finding: Finding) -> str:
    return finding.answer if finding.answer in (NOT_COMPARED, NOT_MEASURED) else f"{finding.answer} ({finding.change})"


_RUN_COLUMNS = ["Run", "Model", "Adapter", "Tasks", "Documents", "Captured", "Precision, device", "Date"]


def _run_row(run: Run) -> list[str]:
    record = run.record
    documents = ", ".join(str(len(run.loaded.samples.get(task, []))) for task in run.tasks)
    tasks = ", ".join(run.tasks)
    if record is None:
        model = f"{run.config.get('model', '?')}, {run.config.get('model_args', '')}"
        return [
            run.label,
            model,
            "-",
            tasks,
            documents,
            "nothing",
            str(run.config.get("device", "-")),
            run.loaded.files.date,
        ]
    sha = f", sha256 {record.adapter_sha256[:8]}" if record.adapter_sha256 else ""
    adapter = f"{_tail(record.adapter)} ({record.adapter_method}{sha})" if record.adapter else "none"
    if record.intervention:
        adapter += f"; intervention {record.intervention}"
    captured = ", ".join(
        f"{task.rows_captured} documents in {task.clusters_selected} clusters" for task in record.tasks.values()
    )
    return [
        run.label,
        f"{record.model}, {_tail(record.pretrained)} ({record.architecture}, {record.connector})",
        adapter,
        tasks,
        documents,
        captured if record.capture else "off",
        f"{record.dtype}, {record.device}, batch {record.batch_size}",
        record.date,
    ]


def _tail(path: str) -> str:
    """A hub id whole, the last two parts of a folder: pages are published, and nobody's home belongs on them."""
    return path if path.count("/") <= 1 else "/".join(path.rstrip("/").split("/")[-2:])


def _settings(run: Run) -> list[list[str]]:
    """Everything needed to repeat the run, folders shortened."""
    if run.record is None:
        return [[str(key), _shortened(value)] for key, value in sorted(run.config.items())]
    left_out = {"tasks", "bandwidths", "complete", "versions"}
    rows = [[key, _shortened(value)] for key, value in run.record.model_dump().items() if key not in left_out]
    rows += [[f"version of {name}", version] for name, version in run.record.versions.items()]
    for name, task in run.record.tasks.items():
        rows += [[f"{name}: {key}", _shortened(value)] for key, value in task.model_dump().items()]
    return rows


def _shortened(value: object) -> str:
    if isinstance(value, str):
        return _tail(value) if value.startswith("/") else value
    return json.dumps(value, ensure_ascii=False, default=str)


def _comparison_tables(comparison: Comparison) -> Sequence[dict[str, Any]]:
    printed = wording.printed(comparison.table)
    columns = list(wording.COLUMNS[3:])
    return [
        {
            "name": task,
            "columns": columns,
            "metrics": [
                {"name": metric, "rows": of_metric[["Run", *columns]].values.tolist()}
                for metric, of_metric in of_task.groupby("Metric", sort=False)
            ],
        }
        for task, of_task in printed.groupby("Task", sort=False)
    ]


def _task(section: Section) -> dict[str, Any]:
    examples = [
        {
            "question": one.question,
            "context": one.context,
            "gold": one.gold,
            "family": one.family,
            "group": one.group,
            "rows": [[answer.run, answer.clean, answer.conflict, answer.outcome] for answer in one.answers],
        }
        for one in section.examples
    ]
    families = {"columns": list(section.families.columns), "rows": section.families.values.tolist()}
    return {
        "name": section.name,
        "anchor": section.anchor,
        "groups": section.groups,
        "not_interpretable": section.not_interpretable,
        "families": families,
        "examples": examples,
    }


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown and HTML leave alone, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", re.sub(r"\s+", " ", text)) if text != "---" else text
