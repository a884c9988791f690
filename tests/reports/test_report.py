"""The report: what it says, that text from a run stays text, and that the page asks the network for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import fake_runs
import pandas as pd
import pytest
from fake_runs import BASE, LORA, MALORA, TASK

from lmms_keyspace.errors import InputError
from lmms_keyspace.reports import compare, load_runs, write_report
from lmms_keyspace.reports.verdict import same_change, verdicts
from lmms_keyspace.reports.wording import printed

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e$\\frac{1}$ \ud800 |`" + "A" * 1_000_000


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def folder(three_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    written = write_report(load_runs(three_runs), out)
    assert written[0].name == "report.html"
    assert set(written) == set(out.iterdir())
    return out


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text())


def assert_self_contained(page: Page) -> None:
    assert not {"script", "link", "iframe", "img", "object", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src", "xlink:href", "srcset", "action"):
            assert (value or "").startswith("#"), (name, value)


def test_the_page_is_self_contained(folder, page):
    assert_self_contained(page)
    source = (folder / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", source)


def test_every_section_and_figure_is_there(page):
    headings = (
        "Verdict",
        "What was run",
        "What it answered",
        "How far apart the keys of image and text are",
        "Where it looks",
        "Where it looked when fooled",
        "Keys of layer 2 in the plane",
        "By family of questions",
        "Examples in which",
        "Methods and versions",
    )
    assert all(heading in page.text for heading in headings)
    assert (
        page.tags.count("svg") == 2 + 2 + 1 + 3 + 3
    )  # answers, divergence, attention, fooled and t-SNE for three runs
    assert "ln 2" in page.text
    assert "model that comes with the package" in page.text
    assert "72 image and 72 text tokens; PCA to 16 dimensions keeps 100.0 %" in page.text


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value.removeprefix("#") for name, value in page.attributes if name == "href"}
    assert links <= set(ids)


def test_page_markdown_and_csv_agree_to_the_last_digit(folder, page):
    table = pd.read_csv(folder / "comparison.csv", keep_default_na=False, na_values=["", "nan"])
    numbers = table[[column for column in table if not column.startswith("printed ")]].copy()
    numbers["note"] = numbers["note"].fillna("")
    expected = printed(numbers)
    markdown = (folder / "report.md").read_text().replace("\\", "")
    for column in ("Value [95 %]", "Change [95 %]", "p (Holm)"):
        assert expected[column].tolist() == table[f"printed {column}"].tolist()
        for cell in expected[column]:
            assert cell in page.text
            assert cell in markdown


def test_the_verdict_separates_divergence_from_reliance(page, three_runs):
    malora, lora = verdicts(compare(load_runs(three_runs)).table)
    assert (malora.divergence.answer, malora.reliance.answer) == ("fell", "no change detected")
    assert "the answers did not follow" in malora.conclusion
    assert "11.0 points or more would be found 4 times in 5" in malora.reliance.evidence[0]
    assert lora.reliance.answer == "improved"
    assert malora.harm.answer == "no change detected"
    assert malora.conclusion in page.text
    (shared,) = same_change(malora, [malora, lora])
    assert "in lora" in shared
    assert "not specific to malora" in shared


def test_a_change_that_only_a_control_shows_is_said_of_the_control():
    table = pd.DataFrame(
        [
            {"metric": "mmd2", "run": run, "value": 0.4 + delta, "delta": delta, "p_adjusted": p, "unit": "MMD^2"}
            for run, delta, p in (("malora", -0.1, 0.001), ("lora", 0.0, 0.9))
        ]
    ).assign(task="t", label="MMD^2", direction=0, delta_low=-0.2, delta_high=0.1, mde=0.05, note="")
    malora, lora = verdicts(table)
    assert malora.reliance.answer == "not measured"
    assert lora.divergence.answer == "no change detected"
    assert same_change(malora, [malora, lora]) == [
        "The divergence in the other runs: lora: no change detected (MMD^2 0.0000, +0.0 %)."
    ]
    assert malora.divergence.change == "MMD^2 -0.1000, -25.0 %"


def test_a_difference_that_may_not_be_taken_is_not_judged(tmp_path):
    paths = [fake_runs.write(run, tmp_path) for run in (BASE, replace(MALORA, bandwidth=20.0))]
    (verdict,) = verdicts(compare(load_runs(paths)).table)
    assert verdict.divergence.answer == "not compared"
    assert "not comparable across runs" in verdict.divergence.evidence[0]
    assert verdict.reliance.answer == "no change detected"


def test_hostile_text_is_escaped_and_shortened(tmp_path):
    run = replace(BASE, answers={0: HOSTILE}, record={"pretrained": "x/<b>$model$</b>"})
    other = replace(LORA, answers={0: "fine"}, record={"adapter": "a/<svg onload=x>", "pretrained": "x/<b>$model$</b>"})
    runs = load_runs([fake_runs.write(one, tmp_path / "in") for one in (run, other)])
    source = write_report(runs, tmp_path / "out")[0]
    text = source.read_text()
    page = Page(text)
    assert_self_contained(page)
    assert "b" not in page.tags
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "$model$" in page.text
    assert len(text) < 2_000_000
    assert "<script" not in (source.parent / "report.md").read_text()


def test_stock_runs_show_accuracy_only_and_say_so(tmp_path):
    paths = [fake_runs.write(replace(run, capture=False), tmp_path) for run in (BASE, LORA)]
    page = Page(write_report(load_runs(paths), tmp_path / "out")[0].read_text())
    assert "no keys were captured" in page.text
    assert "What it answered" in page.text
    assert "How far apart" not in page.text
    assert "Not measured" in page.text
    assert "(not measured)" not in page.text


def test_a_benchmark_that_the_model_cannot_read_is_marked(tmp_path):
    run = fake_runs.write(replace(BASE, task_record={"interpretable": False}), tmp_path)
    page = Page(write_report(load_runs([run]), tmp_path / "out")[0].read_text())
    assert "Not interpretable for: bundled base" in page.text
    assert "nothing to compare" in page.text


def test_equal_input_gives_an_equal_report(folder, three_runs, tmp_path):
    again = write_report(load_runs(three_runs), tmp_path)
    for path in again:
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_runs_keep_their_order(three_runs, tmp_path):
    page = Page(write_report(load_runs([three_runs[1], three_runs[2], three_runs[0]]), tmp_path)[0].read_text())
    assert "malora (base) and 2 more runs" in page.text


def test_refused_input_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="there is no run here"):
        write_report(load_runs([tmp_path]), tmp_path / "out")
    run = fake_runs.write(MALORA, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name a folder"):
        write_report(load_runs([run]), tmp_path / "file")
    next(run.glob("*_tokens.parquet")).unlink()
    with pytest.raises(InputError, match="incomplete"):
        write_report(load_runs([run]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine; the HTML is checked above")
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_does_not_scroll_sideways(folder, tmp_path, width):
    """Chromium prints the laid-out width; a frame is used because its own windows are at least 500 pixels wide."""
    probe = tmp_path / "probe.html"
    source = (folder / "report.html").read_text()
    probe.write_text(
        f'<iframe id="f" style="width:{width}px;height:900px;border:0"></iframe><p id="out"></p><script>'
        "f.onload=()=>{out.textContent='width='+f.contentDocument.documentElement.scrollWidth};"
        f"f.srcdoc={_as_script_string(source)}</script>"
    )
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    done = subprocess.run(
        [
            "chromium",
            *flags.split(),
            "--virtual-time-budget=5000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (found,) = re.findall(r'<p id="out">width=(\d+)</p>', done.stdout)
    assert int(found) <= width


def _as_script_string(text: str) -> str:
    return json.dumps(text).replace("</", "<\\/")


def test_task_names_cannot_leave_the_folder(tmp_path):
    folder = fake_runs.write(replace(BASE, capture=False), tmp_path / "in")
    for path in list(folder.iterdir()):
        path.write_text(path.read_text().replace(TASK, "..weird task"))
        path.rename(path.with_name(path.name.replace(TASK, "..weird task")))
    written = write_report(load_runs([folder]), tmp_path / "out")
    assert {path.parent for path in written} == {tmp_path / "out"}
    assert all(not path.name.startswith(".") for path in written)
