"""The gate: right verdicts on known changes, honest when it cannot tell, closed to what must not be compared."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import fake_runs
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fake_runs import BASE, MALORA, TASK
from typer.testing import CliRunner

from lmms_keyspace.cli import app
from lmms_keyspace.errors import InputError
from lmms_keyspace.reports import gate
from lmms_keyspace.reports.gate_output import gate_json, gate_junit, gate_markdown, printed_verdicts
from lmms_keyspace.reports.items import load_items, read_baseline, write_baseline
from lmms_keyspace.reports.policy import MetricRule, Policy, load_policy, shipped_policies
from lmms_keyspace.reports.wording import number

_FILE = Path(__file__).parents[2] / "benchmarks" / "gate.py"
_SPEC = importlib.util.spec_from_file_location("benchmark_gate", _FILE)
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)

FLIPS = Policy(name="flips", metric=(MetricRule(name="text_flip_rate", margin=0.05),))
SMALL = replace(BASE, groups=60, flips=20, record={"capture": False}, capture=False)


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> dict[str, Path]:
    """Runs of 60 groups with 20 flips, the same again, and with 40."""
    root = tmp_path_factory.mktemp("gate")
    runs = {"base": SMALL, "same": replace(SMALL, name="same"), "worse": replace(SMALL, name="worse", flips=40)}
    return {name: fake_runs.write(replace(run, name=name), root) for name, run in runs.items()}


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["gate", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("case", "verdict", "at_least", "at_most"),
    [
        ("no change", "fail", 0, 10),
        ("true drop of the margin", "pass", 0, 10),
        ("true drop of twice the margin", "fail", 90, 100),
        ("equal runs", "pass", 100, 100),
        ("no change, 20 groups", "inconclusive", 100, 100),
        ("equal runs, 20 groups", "inconclusive", 100, 100),
    ],
)
def test_simulated_pairs(case, verdict, at_least, at_most):
    """100 of the benchmark's 1,000 simulations."""
    assert at_least <= benchmark.verdicts(100, *benchmark.CASES[case])[verdict] <= at_most


def test_the_arguments_are_not_symmetric(sides):
    forth, back = gate(sides["base"], sides["worse"], FLIPS), gate(sides["worse"], sides["base"], FLIPS)
    assert (forth.verdict, back.verdict) == ("fail", "pass")
    assert (forth.exit_code, back.exit_code) == (1, 0)
    (lost,), (won,) = forth.verdicts, back.verdicts
    assert lost.delta == -won.delta < 0  # lower is better, so more flips are a negative change
    assert (lost.losses, lost.gains) == (won.gains, won.losses) == (20, 0)
    assert lost.baseline == won.candidate == pytest.approx(20 / 58)


def test_equal_runs_get_an_exact_bound_and_its_source(sides):
    (found,) = gate(sides["base"], sides["same"], FLIPS).verdicts
    assert found.delta == 0
    assert found.lower == pytest.approx(-(1 - 0.05 ** (1 / 58)))
    assert "no group differs" in found.reason
    assert found.upper > 0
    assert found.verdict == "inconclusive"  # 58 groups cannot exclude 5 points: the bound is 5.03


def test_below_min_groups_equal_runs_are_inconclusive(sides):
    policy = FLIPS.model_copy(update={"min_groups": 59})
    result = gate(sides["base"], sides["base"], policy)
    assert result.verdict == "inconclusive"
    assert result.verdicts[0].reason == "58 groups, the policy asks for 59"
    assert result.exit_code == 2
    assert gate(sides["base"], sides["base"], policy.model_copy(update={"inconclusive": "pass"})).exit_code == 0
    assert gate(sides["base"], sides["base"], policy.model_copy(update={"inconclusive": "fail"})).exit_code == 1


def test_a_loss_below_the_margin_is_inconclusive(tmp_path):
    runs = [replace(SMALL, name=name, groups=400, flips=flips) for name, flips in (("a", 40), ("b", 54))]
    (found,) = gate(*(fake_runs.write(run, tmp_path) for run in runs), FLIPS).verdicts
    assert found.p_fail < 0.05
    assert -0.05 < found.delta < 0
    assert found.verdict == "inconclusive"
    assert "smaller than 5.0 points" in found.reason


def test_more_metrics_are_paid_for(sides):
    many = Policy(
        name="many",
        metric=tuple(MetricRule(name=name, margin=0.05) for name in ("text_flip_rate", "clean_acc", "vis_gain")),
    )
    one, several = gate(sides["base"], sides["same"], FLIPS), gate(sides["base"], sides["same"], many)
    assert several.verdicts[0].lower < one.verdicts[0].lower
    assert several.verdicts[0].p_pass > one.verdicts[0].p_pass
    assert several.verdicts[2].lower == pytest.approx(2 * several.verdicts[1].lower)  # a gain of two rates spans 2


def test_a_metric_that_is_not_there(sides):
    rule = MetricRule(name="read_acc", margin=0.05)
    result = gate(sides["base"], sides["same"], Policy(name="p", metric=(rule,)))
    assert result.verdicts[0].reason == "not measured in the baseline"
    assert result.exit_code == 2
    with pytest.raises(InputError, match=r"no such metric; there are clean_acc"):
        gate(sides["base"], sides["same"], Policy(name="p", metric=(MetricRule(name="readacc", margin=0.05),)))


def test_attention_needs_a_direction(tmp_path):
    paths = [fake_runs.write(run, tmp_path) for run in (BASE, MALORA)]
    rule = MetricRule(name="image_mass_all", margin=0.01)
    with pytest.raises(InputError, match="set direction"):
        gate(*paths, Policy(name="p", min_groups=10, metric=(rule,)))
    up = Policy(name="p", min_groups=10, metric=(rule.model_copy(update={"direction": "higher"}),))
    (found,) = gate(*paths, up).verdicts
    assert found.delta == pytest.approx(0.06, abs=1e-6)
    assert found.verdict == "pass"
    assert found.clusters == 48


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"clean_wrong": 20}, "its numbers say nothing: Accuracy, clean is 66.7 %"),
        ({"capture": True, "task_record": {"interpretable": False}}, "not interpretable"),
        ({"capture": True, "record": {"complete": False}}, "did not end"),
        ({"batch_size": 1}, "batch size is "),
    ],
)
@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_runs_that_cannot_be_judged_are_refused(sides, tmp_path, change, reason, side):
    other = fake_runs.write(replace(SMALL, name="other", **({"record": {}} | change)), tmp_path)
    paths = {"baseline": sides["base"], "candidate": sides["base"]} | {side: other}
    with pytest.raises(InputError, match=reason.replace(".", r"\.")):
        gate(paths["baseline"], paths["candidate"], FLIPS)
    code, output = command("--baseline", paths["baseline"], "--candidate", paths["candidate"])
    assert code == 3
    assert reason in output


def test_a_difference_may_be_allowed_and_is_said(sides, tmp_path):
    other = fake_runs.write(replace(SMALL, name="other", batch_size=1), tmp_path)
    result = gate(sides["base"], other, FLIPS, allow_mismatch=True)
    assert result.warnings == ("batch size is 1, the base has 8",)
    assert "batch size is 1" in gate_markdown(result)


def test_a_frozen_baseline_says_what_its_run_says(sides, tmp_path):
    file = tmp_path / "baseline.parquet"
    assert command("--freeze", sides["base"], "--out", file)[0] == 0
    of_run, of_file = gate(sides["base"], sides["worse"], FLIPS), gate(file, sides["worse"], FLIPS)
    assert gate_json(of_file) == gate_json(of_run)
    again = tmp_path / "again.parquet"
    write_baseline(read_baseline(file), again)
    assert again.read_bytes() == file.read_bytes()
    assert file.stat().st_size < 20_000


def test_a_frozen_baseline_keeps_what_comparability_needs(tmp_path):
    file = tmp_path / "baseline.parquet"
    write_baseline(load_items(fake_runs.write(replace(BASE, groups=60), tmp_path)), file)
    for number_, (change, reason) in enumerate(
        [
            ({"generator": "2.0:def"}, "generator is 2.0:def"),
            ({"task_record": {"prompt_hash": "0" * 64}}, "prompt hash"),
            ({"task_record": {"image_tokens": {"64": 288}}}, "image tokens"),
        ]
    ):
        run = fake_runs.write(replace(BASE, name=f"run{number_}", groups=60, **change), tmp_path)
        with pytest.raises(InputError, match=reason):
            gate(file, run, FLIPS)


def test_stock_scores_are_judged_by_document(tmp_path):
    def stock(name: str, scores: list[float], versions: dict[str, float]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        results = {
            "results": {"mmmu_val": {"acc,none": sum(scores) / len(scores)}},
            "configs": {"mmmu_val": {"metadata": {"gpt_eval_model_name": "judge-1"}}},
            "versions": versions,
            "higher_is_better": {"mmmu_val": {"acc": True}},
        }
        (folder / "20260101_000000_results.json").write_text(json.dumps(results))
        lines = [json.dumps({"doc_id": index, "acc": score}) for index, score in enumerate(scores)]
        (folder / "20260101_000000_samples_mmmu_val.jsonl").write_text("\n".join(lines))
        return folder

    policy = Policy(name="p", metric=(MetricRule(name="acc", margin=0.02, task="mmmu_val"),))
    a = stock("a", [1.0] * 60 + [0.0] * 40, {"mmmu_val": 1.0})
    b = stock("b", [1.0] * 40 + [0.0] * 60, {"mmmu_val": 1.0})
    (found,) = gate(a, b, policy).verdicts
    assert (found.verdict, found.clusters, found.delta) == ("fail", 100, pytest.approx(-0.2))
    assert found.mcnemar < 0.001
    with pytest.raises(InputError, match="version is 2"):
        gate(a, stock("c", [1.0] * 100, {"mmmu_val": 2.0}), policy)


def test_every_output_agrees_to_the_last_digit(sides, tmp_path):
    junit, summary = tmp_path / "x" / "gate.xml", tmp_path / "summary.md"
    summary.write_text("earlier\n")
    arguments = ["--baseline", sides["base"], "--candidate", sides["worse"], "--junit", junit, "--summary", summary]
    code, terminal = command(*arguments, "--out", tmp_path / "out")
    assert code == 1
    as_json = json.loads(command(*arguments, "--json")[1])
    result = gate(sides["base"], sides["worse"], "visual-reliance")
    assert summary.read_text().startswith("earlier\n")
    assert json.loads((tmp_path / "out" / "gate.json").read_text()) == as_json
    markdown, xml = (tmp_path / "out" / "gate.md").read_text(), (tmp_path / "out" / "gate.xml").read_text()
    assert xml == junit.read_text() == gate_junit(result)
    for row, raw in zip(printed_verdicts(result).to_dict("records"), as_json["metrics"], strict=True):
        assert row["Baseline"] == number(raw["baseline"], raw["unit"])
        assert row["Change"] == number(raw["delta"], raw["unit"], signed=True)
        assert row["Detectable"] == number(raw["mde"], raw["unit"])
        for cell in row.values():
            assert escape(cell) in xml
            assert cell in terminal
            assert cell in markdown.replace("\\", "")
    suite = ElementTree.fromstring(xml)
    assert [len(case.findall("failure")) for case in suite.findall("testcase")] == [1, 0, 0]
    assert suite.attrib["failures"] == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left on device")])
def test_a_write_that_is_interrupted_leaves_the_old_files(sides, tmp_path, monkeypatch, error):
    def interrupted(handle):
        raise error

    arguments = ["--baseline", sides["base"], "--candidate", sides["worse"], "--junit", tmp_path / "junit.xml"]
    arguments += ["--summary", tmp_path / "summary.md", "--out", tmp_path / "out"]
    assert command(*arguments)[0] == 1
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 5
    monkeypatch.setattr("os.fsync", interrupted)
    code, output = command(*arguments)
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 3)
    assert "Traceback" not in output
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("option", ["--junit", "--summary"])
@pytest.mark.parametrize("kind", ["folder", "link", "device"])
def test_only_a_file_is_replaced(sides, tmp_path, option, kind):
    path = Path("/dev/null") if kind == "device" else tmp_path / "named"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    code, output = command("--baseline", sides["base"], "--candidate", sides["same"], option, path)
    assert code == 3
    assert f"{option}='{path}': name a file" in output
    assert not (tmp_path / "elsewhere").exists()


def test_a_summary_that_cannot_be_read_is_named_and_nothing_is_written(sides, tmp_path, monkeypatch):
    summary, junit = tmp_path / "summary.md", tmp_path / "gate.xml"
    summary.write_text("of another job\n")
    read = Path.read_bytes

    def refused(path):  # as for a file of another user; whoever runs the tests may read every file
        if path == summary:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    arguments = ["--baseline", sides["base"], "--candidate", sides["same"], "--junit", junit, "--summary", summary]
    code, output = command(*arguments)
    assert code == 3
    assert f"--summary='{summary}': name a file that can be read (Permission denied)" in output
    assert not junit.exists()
    assert summary.read_text() == "of another job\n"


def test_hostile_names_stay_text(sides, tmp_path):
    hostile = "</testcase><script>alert(1)</script>\x1b[31m\u202e|" + "A" * 1_000_000
    policy = Policy(name=hostile, metric=(MetricRule(name="text_flip_rate", margin=0.05, task=hostile),))
    result = gate(sides["base"], sides["same"], policy)
    suite = ElementTree.fromstring(gate_junit(result))
    assert len(suite.findall("testcase")) == 1
    for text in (gate_junit(result), gate_markdown(result)):
        assert "<script>" not in text.replace("\\<", "")
        assert "\x1b" not in text
        assert len(text) < 10_000


def test_the_policies_of_the_package_load():
    assert shipped_policies() == ["visual-reliance"]
    policy = load_policy("visual-reliance")
    assert policy.min_groups == 50
    assert {rule.name for rule in policy.metric} == {"text_flip_rate", "vis_gain", "clean_acc"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name = 'p'\n[[metric]]\nname = 'clean_acc'\nmargn = 0.05", r"metric\.0\.margin: Field required"),
        ("name = 'p'\nmin_group = 5\n[[metric]]\nname = 'a'\nmargin = 0.05", r"min_group: Extra inputs.*min_groups"),
        ("name = 'p'\n[[metric]]\nname = 'a'\nmargin = -1", r"metric\.0\.margin: .*greater than 0"),
        ("name = 'p'\n[[metric]]\nname = 'a'\nmargin = nan", r"metric\.0\.margin"),
        ("name = 'p'\n[[metric]]\nname = 'a'\nmargin = 1\ndirection = 'up'", "direction: .*higher"),
        ("name = 'p'", "metric: Field required"),
        ("name = 'p'\n\nmetric 3", "not TOML: .*line 3"),
        ("name = 'p'\n" + "[[metric]]\nname = 'a'\nmargin = 0.1\n" * 2, "two rules"),
    ],
)
def test_a_wrong_policy_names_its_key(tmp_path, text, reason):
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=reason):
        load_policy(file)


def test_a_margin_in_points_is_noticed(sides):
    with pytest.raises(InputError, match=r"5 points are 0\.05"):
        gate(sides["base"], sides["same"], Policy(name="p", metric=(MetricRule(name="clean_acc", margin=5),)))


def test_unknown_policies_name_the_known():
    with pytest.raises(InputError, match="visual-reliance"):
        load_policy("visual")


@pytest.mark.parametrize("kind", ["other columns", "no header", "not parquet", "newer", "unknown outcome"])
def test_a_wrong_baseline_is_refused(sides, tmp_path, kind):
    file = tmp_path / "baseline.parquet"
    write_baseline(load_items(sides["base"]), file)
    table = pq.read_table(file)
    metadata = dict(table.schema.metadata)
    if kind == "not parquet":
        file.write_text("PAR1")
    elif kind == "newer":
        header = metadata[b"lmms_keyspace_baseline"].replace(b'"schema_version":1', b'"schema_version":2')
        pq.write_table(table.replace_schema_metadata({b"lmms_keyspace_baseline": header}), file)
    elif kind == "no header":
        pq.write_table(table.replace_schema_metadata({}), file)
    elif kind == "other columns":
        pq.write_table(table.drop_columns(["condition"]).replace_schema_metadata(metadata), file)
    else:
        frame = table.to_pandas().assign(outcome=pd.Categorical(["golden"] * table.num_rows))
        pq.write_table(pa.Table.from_pandas(frame, schema=table.schema).replace_schema_metadata(metadata), file)
    with pytest.raises(InputError, match=r"baseline\.parquet"):
        gate(file, sides["base"], FLIPS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--candidate", "x"], "--baseline"),
        (["--freeze", "x"], "*.parquet"),
        (["--freeze", "x", "--baseline", "y", "--out", "z.parquet"], "not both"),
        (["--baseline", "nowhere.parquet", "--candidate", "x"], "no such file"),
    ],
)
def test_wrong_arguments_exit_3(arguments, reason):
    code, output = command(*arguments)
    assert code == 3
    assert reason in output


def test_several_runs_in_one_folder_are_refused(tmp_path):
    for run in (BASE, MALORA):
        fake_runs.write(run, tmp_path)
    with pytest.raises(InputError, match="name the folder of one"):
        gate(tmp_path, tmp_path, FLIPS)
    assert TASK in load_items(tmp_path / "base").tasks


def test_the_guide_and_its_workflow_are_true():
    docs = _FILE.parents[1] / "docs"
    (policy,) = re.findall(r"```toml\n(.*?)```", (docs / "gate.md").read_text(), re.DOTALL)
    assert Policy.model_validate(tomllib.loads(policy)).min_groups == 50
    workflow = yaml.safe_load((docs / "examples" / "visual-reliance.yml").read_text())
    (call,) = (step["run"] for step in workflow["jobs"]["gate"]["steps"] if step.get("name") == "Gate")
    options = CliRunner().invoke(app, ["gate", "--help"], env={"COLUMNS": "200"}).output
    assert all(option in options for option in re.findall(r"--\w+", call))


def test_a_baseline_file_is_as_readable_as_any_output(sides, tmp_path):
    file, plain = tmp_path / "new" / "baseline.parquet", tmp_path / "plain"
    write_baseline(load_items(sides["base"]), file)
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode
