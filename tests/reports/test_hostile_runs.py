"""Runs that nobody should have written: shown as text or refused by file and line, the others still reported."""

from __future__ import annotations

import io
import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fake_runs
import numpy as np
import pandas as pd
import pytest
from fake_runs import BASE, LORA, MALORA, TASK
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from lmms_keyspace.cli import app
from lmms_keyspace.errors import InputError
from lmms_keyspace.reports import compare, gate, leaderboard, load_runs, render_comparison
from lmms_keyspace.reports.leaderboard_output import leaderboard_markdown
from lmms_keyspace.reports.text import LONGEST_NAME, one_line

DATE = "20260101_000000"
HOSTILE = "../../etc/<script>alert(1)</script>\x1b[31m\u202e\u0000🙂é\udcff" + "A" * 1_000_000


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return fake_runs.write(replace(BASE, capture=False), tmp_path_factory.mktemp("base"))


def stock(folder: Path, rows: list[object], results: object) -> Path:
    """A run folder with these samples lines and results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{DATE}_results.json").write_text(json.dumps(results))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"{DATE}_samples_t.jsonl").write_text("\n".join(lines), errors="surrogatepass")
    return folder


def plain_results(**changed: object) -> dict[str, object]:
    return {"results": {"t": {"acc,none": 0.5}}, "configs": {"t": {}}, "versions": {"t": 1}} | changed


def terminal(paths: list[Path]) -> str:
    out = io.StringIO()
    render_comparison(compare(load_runs(paths)), Console(file=out))
    return out.getvalue()


@settings(max_examples=200)
@given(text=st.text(), longest=st.integers(2, 100))
@example(text=HOSTILE, longest=80)
@example(text="👨‍👩‍👧 אבג नमस्ते", longest=80)
def test_names_become_one_short_line_without_controls(text, longest):
    shown = one_line(text, longest)
    assert len(shown) <= longest
    assert not set(shown) & set("\n\r\t\x00\x1b\x9b\u202e\u2066\u200f")
    shown.encode()
    assert one_line(shown, longest) == shown


def test_an_error_shows_the_start_of_a_value():
    message = str(InputError("model", HOSTILE, "name another"))
    assert len(message) < 1100
    assert message.endswith("…: name another")
    assert not set(message) & set("\x00\x1b\u202e")


def test_hostile_names_are_shown_as_text(tmp_path):
    name = HOSTILE.replace("\udcff", "")  # which no file of ours can hold
    record = {"pretrained": name, "adapter": name}
    runs = [
        fake_runs.write(replace(BASE, answers={0: HOSTILE}), tmp_path),
        fake_runs.write(replace(LORA, record=record), tmp_path),
    ]
    comparison = compare(load_runs(runs))
    assert all(len(run) <= LONGEST_NAME for run in comparison.runs)
    for text in (terminal(runs), leaderboard_markdown(leaderboard(runs))):
        assert len(text) < 60_000
        assert not set(text) & set("\x00\x1b\u202e")
    json.loads(comparison.to_json())


def test_hostile_tasks_and_metrics_are_shown_as_text(tmp_path):
    results = plain_results(results={HOSTILE: {f"{HOSTILE},none": 0.5}}, configs={HOSTILE: {}}, versions={HOSTILE: 1})
    paths = [stock(tmp_path / name, [], results) for name in "ab"]
    for text in (terminal(paths), leaderboard_markdown(leaderboard(paths))):
        assert len(text) < 60_000
        assert not set(text) & set("\x00\x1b\u202e")


def test_invalid_utf8_is_read(tmp_path):
    folder = stock(
        tmp_path / "run", [{"doc_id": index, "acc": index % 2, "x": "?"} for index in range(20)], plain_results()
    )
    samples = next(folder.glob("*.jsonl"))
    samples.write_bytes(samples.read_bytes().replace(b"?", b"\xff\xfe\xed\xa0\x80"))
    (run,) = load_runs([folder]).runs
    assert run.loaded.samples["t"]["x"].str.contains("\ufffd").all()
    assert "acc" in terminal([folder])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda lines: [*lines[:5], lines[5][:40]], "line 6"),
        (lambda lines: [*lines[:5], *lines[4:]], "line 6, doc_id"),
        (lambda lines: [lines[0].replace('"outcome": "gold"', '"outcome": "golden"'), *lines[1:]], "line 1, outcome"),
        (
            lambda lines: [lines[0], lines[1].replace('"clean"', '"match"').replace('"match"', '"clean"')],
            "line 2, group_id",
        ),
        (lambda lines: [lines[0], "[1, 2]"], "line 2"),
        (lambda lines: [lines[0], "[" * 100_000], "line 2"),
        (lambda lines: [lines[0], '{"doc_id": ' + "9" * 5000 + "}"], "line 2"),
        (lambda lines: [lines[0], '{"doc_id": null}'], "line 2, doc_id"),
    ],
    ids=["truncated", "twice", "outcome", "condition twice", "list", "deep", "large number", "no document"],
)
def test_spoilt_samples_are_refused_by_file_and_line(base, tmp_path, spoil, reason):
    good = fake_runs.write(replace(LORA, capture=False), tmp_path)
    bad = fake_runs.write(replace(MALORA, name="bad", capture=False), tmp_path)
    samples = next(bad.glob("*.jsonl"))
    samples.write_text("\n".join(spoil(samples.read_text().splitlines())))
    runs = load_runs([base, bad, good])
    assert len(runs.runs) == 2
    (left_out,) = runs.left_out
    assert samples.name in left_out
    assert reason in left_out
    assert len(left_out) < 1000
    done = CliRunner().invoke(app, ["compare", str(base), str(bad), str(good)])
    assert done.exit_code == 1
    assert "Text flip rate" in done.output
    assert samples.name in done.output
    with pytest.raises(InputError, match=samples.name):
        load_runs([bad, base])


def test_a_score_that_is_no_number_is_named(tmp_path):
    rows = [{"doc_id": index, "acc": float(index % 2)} for index in range(20)]
    rows[6]["acc"] = math.nan
    comparison = compare(
        load_runs([stock(tmp_path / "run", rows, plain_results(results={"t": {"acc,none": math.nan}}))])
    )
    (row,) = comparison.table.itertuples()
    assert f"1 documents have no number, the first in {DATE}_samples_t.jsonl, line 7" in row.note
    assert np.isnan(row.value)
    json.loads(comparison.to_json())


def test_a_folder_that_is_a_link_outward_is_not_entered(base, tmp_path):
    outside = fake_runs.write(replace(LORA, capture=False), tmp_path / "outside")
    root = tmp_path / "runs"
    shutil.copytree(base, root / "base")
    (root / "link").symlink_to(outside, target_is_directory=True)
    assert len(load_runs([root]).runs) == 1
    (root / "only").mkdir()
    (root / "only" / "link").symlink_to(outside, target_is_directory=True)
    with pytest.raises(InputError, match="there is no run here"):
        load_runs([root / "only"])


def test_a_table_with_other_columns_is_refused(base, tmp_path):
    good = fake_runs.write(LORA, tmp_path)
    bad = fake_runs.write(MALORA, tmp_path)
    table = next(bad.glob("*_attention.parquet"))
    pd.DataFrame({"a": [1]}).to_parquet(table)
    runs = load_runs([fake_runs.write(BASE, tmp_path), bad, good])
    assert len(runs.runs) == 2
    assert table.name in runs.left_out[0]


def test_nothing_is_written_outside_the_folder(base, tmp_path):
    """Task and adapter are paths upward; the report's own files have their test beside the report."""
    runs = [base]
    for name, adapter in (("one", "../../../evil"), ("two", "/etc/passwd")):
        runs.append(
            fake_runs.write(replace(LORA, name=name, record={"adapter": adapter}, capture=True), tmp_path / "in")
        )
    for folder in runs[1:]:
        for results in folder.glob("*_results.json"):
            content = json.loads(results.read_text())
            for key in ("results", "configs", "versions"):
                content[key]["../../../evil"] = content[key][TASK]
            results.write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    runner = CliRunner()
    done = runner.invoke(app, ["leaderboard", *map(str, runs[1:]), "--out", str(out / "leaderboard")])
    assert done.exit_code == 0, done.output
    done = runner.invoke(
        app, ["gate", "--baseline", str(runs[1]), "--candidate", str(runs[2]), "--out", str(out / "gate")]
    )
    assert done.exit_code in (0, 1, 2), done.output
    written = set(tmp_path.rglob("*")) - set(before)
    assert len(written) == 2 + 3 + 3 + 1
    assert all(path.is_relative_to(out) for path in written)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.integers(0, 3)
    | st.floats()
    | st.sampled_from(["", "t", "clean", "gold", "lure", "acc,none", "\x00", "1"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["t", "acc", "acc,none", "metadata", "acc_stderr,none", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
rows = st.lists(
    st.fixed_dictionaries(
        {}, optional={key: values for key in ("doc_id", "acc", "group_id", "condition", "outcome", "response")}
    )
    | st.builds(lambda number, score: {"doc_id": number, "acc": score}, st.integers(0, 40), st.floats() | st.just("")),
    max_size=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    rows=rows,
    results=values | st.fixed_dictionaries({"t": values | st.dictionaries(st.just("acc,none"), values)}),
    other=st.dictionaries(st.sampled_from(["configs", "versions", "config", "higher_is_better"]), values, max_size=2),
)
def test_whatever_is_read_is_reported_or_refused(tmp_path, rows, results, other):
    folder = stock(tmp_path / "run", rows, plain_results(results=results, **other))
    for use in (
        lambda: compare(load_runs([folder])).to_json(),
        lambda: terminal([folder, stock(tmp_path / "b", rows[:1], plain_results())]),
        lambda: leaderboard_markdown(leaderboard([folder])),
        lambda: gate(folder, folder, "visual-reliance"),
    ):
        with suppress(InputError):
            use()
