"""The leaderboard: rows, ranks with ties, what does not enter, and its page."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser

import fake_runs
import pytest
from browser import CHROMIUM, browser
from fake_runs import BASE, LORA, MALORA, TASK
from typer.testing import CliRunner

from lmms_keyspace.cli import app
from lmms_keyspace.errors import InputError
from lmms_keyspace.reports import leaderboard
from lmms_keyspace.reports.leaderboard_output import leaderboard_html, leaderboard_markdown, printed_leaderboard

HOSTILE = "x/<script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m|" + "A" * 1_000_000


@pytest.fixture(scope="module")
def board(three_runs):
    return leaderboard(three_runs)


def ranks(board, metric: str) -> dict[str, int | None]:
    table = board.table
    return dict(table[table["metric"] == metric][["adapter", "rank"]].itertuples(index=False))


def test_one_row_per_model_and_adapter(board):
    assert [entry.adapter for entry in board.entries].count("malora") == 1
    assert {(entry.model, entry.connector) for entry in board.entries} == {("bundled base", "mlp")}
    assert len(board.entries) == 3
    assert board.left_out == ()


def test_ranks_tie_where_intervals_overlap(three_runs, board, tmp_path):
    # 8, 20 and 20 of 46: [9.1, 30.7] and [30.2, 57.8] overlap
    assert ranks(board, "text_flip_rate") == {"lora": 1, "": 1, "malora": 1}
    best = fake_runs.write(replace(LORA, name="best", flips=2, record={"adapter": "x/best"}), tmp_path)
    assert ranks(leaderboard([*three_runs, best]), "text_flip_rate") == {"best": 1, "lora": 1, "": 2, "malora": 2}
    assert ranks(board, "clean_acc") == {"lora": 1, "": 1, "malora": 1}
    assert board.table.loc[board.table["metric"] == "mmd2", "rank"].isna().all()


def test_columns_are_chosen_and_lead_in_their_order(three_runs):
    board = leaderboard(three_runs, ["text_flip_rate", f"{TASK}:tpr_label", "js"])
    assert [column.metric for column in board.columns] == ["text_flip_rate", "tpr_label", "js"]
    assert [column.direction for column in board.columns] == [-1, -1, 0]
    assert board.entries[0].adapter == "lora"
    with pytest.raises(InputError, match="no run that enters has this metric"):
        leaderboard(three_runs, ["flips"])


def test_the_newest_run_of_a_model_counts(tmp_path):
    old = fake_runs.write(replace(BASE, name="old", date="20250101_000000", flips=0), tmp_path)
    new = fake_runs.write(BASE, tmp_path)
    for paths in ([old, new], [new, old], [tmp_path]):
        board = leaderboard(paths, ["text_flip_rate"])
        assert board.cells[0][0].value == pytest.approx(20 / 46)
        assert "newer run" in board.left_out[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"clean_wrong": 20}, "not valid: Accuracy, clean is 58.3 %"),
        ({"task_record": {"interpretable": False}}, "not interpretable"),
        ({"record": {"complete": False}}, "did not end"),
        ({"generator": "2.0:def"}, "generator is 2.0:def, most have 1.0:abc"),
        ({"groups": 40}, "documents is 240, most have 288"),
    ],
)
def test_what_does_not_enter_is_named(three_runs, tmp_path, change, reason):
    adapter = {"adapter": "x/other"} | change.pop("record", {})
    other = fake_runs.write(replace(BASE, name="other", record=adapter, **change), tmp_path)
    board = leaderboard([*three_runs, other])
    assert len(board.entries) == 3
    assert len(board.left_out) == 1
    assert reason in board.left_out[0]
    assert reason.split(":")[0] in leaderboard_markdown(board).replace("\\", "")
    # A run that was asked something else than most is fine alone.
    with nullcontext() if "most" in reason else pytest.raises(InputError, match="no run can enter"):
        leaderboard([other])


def test_stock_runs_and_probes_share_a_board(three_runs, tmp_path):
    folder = tmp_path / "stock"
    folder.mkdir()
    results = {
        "results": {"mmmu_val": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
        "configs": {"mmmu_val": {}},
        "versions": {"mmmu_val": 1.0},
        "config": {"model": "llava_hf", "model_args": "pretrained=llava-hf/llava-1.5-7b-hf,dtype=float16"},
    }
    (folder / "20260101_000000_results.json").write_text(json.dumps(results))
    lines = [json.dumps({"doc_id": index, "acc": float(index % 2)}) for index in range(100)]
    (folder / "20260101_000000_samples_mmmu_val.jsonl").write_text("\n".join(lines))
    board = leaderboard([*three_runs, folder])
    table = printed_leaderboard(board)
    assert "acc (%) ↑, mmmu_val" in table
    (row,) = table[table["Model"] == "llava-1.5-7b-hf"].to_dict("records")
    assert row["Connector"] == "unknown"
    assert row["acc (%) ↑, mmmu_val"].startswith("50.0 [")
    assert row[f"Accuracy, clean (%) ↑, {TASK}"] == ""


def test_outputs_hold_the_same_cells(three_runs, board, tmp_path):
    done = CliRunner().invoke(app, ["leaderboard", *map(str, three_runs), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "leaderboard.csv", "leaderboard.html", "leaderboard.md",
    ]  # fmt: skip
    html, markdown = ((tmp_path / "out" / f"leaderboard.{kind}").read_text() for kind in ("html", "md"))
    assert markdown == CliRunner().invoke(app, ["leaderboard", *map(str, three_runs)]).output
    with (tmp_path / "out" / "leaderboard.csv").open() as file:
        printed = [row["printed"] for row in csv.DictReader(file)]
    cells = [cell for row in printed_leaderboard(board).iloc[:, 3:].itertuples(index=False) for cell in row if cell]
    assert sorted(cells) == sorted(printed)
    for cell in cells:
        assert cell in html
        assert cell in markdown.replace("\\", "")


class Tags(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.names, self.attributes = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def hostile_page(three_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    run = fake_runs.write(replace(LORA, name="hostile", record={"adapter": HOSTILE, "intervention": HOSTILE}), folder)
    broken = fake_runs.write(replace(MALORA, name="<b>broken</b>"), folder)
    next(broken.glob("*.jsonl")).write_text('{"doc_id": 0\n')
    page = folder / "page.html"
    page.write_text(leaderboard_html(leaderboard([*three_runs, run, broken])))
    return page


def test_hostile_names_are_escaped(hostile_page):
    source = hostile_page.read_text()
    tags = Tags(source)
    assert tags.names.count("script") == 1
    assert not {"img", "link", "iframe", "b"} & set(tags.names)
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert not {"src", "href"} & {name for name, _ in tags.attributes}
    assert "\u202e" not in source
    assert "\x1b" not in source
    assert "line 1" in source  # of the broken samples
    assert len(source) < 60_000


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; the HTML is checked above")
def test_the_page_sorts_by_keyboard_and_fits_a_phone(hostile_page, tmp_path):
    first = "document.querySelector('tbody tr').textContent"
    with browser(tmp_path / "profile") as page:
        for width, dark in ((1280, False), (400, False), (400, True)):
            page.open(hostile_page, width=width, dark=dark)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            button = "[...document.querySelectorAll('th button')].find(b => b.textContent.startsWith('Text flip'))"
            page.evaluate(f"{button}.focus()")
            seen = []
            for direction in ("ascending", "descending"):
                for kind in ("rawKeyDown", "char", "keyUp"):
                    text = {"text": "\r"} if kind == "char" else {}
                    page.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, **text)
                assert page.evaluate(f"{button}.closest('th').ariaSort") == direction
                seen.append(page.evaluate(first))
            assert "17.4 [" in seen[0]
            assert "43.5 [" in seen[1]
            assert page.complaints == []
            assert len(page.requests) == 1
