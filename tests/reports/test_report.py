"""The report: what it says, that text from a run stays text, and that the page asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import fake_runs
import pandas as pd
import pytest
from fake_runs import BASE, LORA, MALORA, TASK
from PIL import Image

from lmms_keyspace.errors import InputError
from lmms_keyspace.reports import compare, load_runs, write_report
from lmms_keyspace.reports.scene_pictures import SIDE, data_uri
from lmms_keyspace.reports.verdict import same_change, verdicts
from lmms_keyspace.reports.wording import printed
from lmms_keyspace.scenes import PALETTE

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e$\\frac{1}$ \ud800 |`" + "A" * 1_000_000


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = self.script = ""
        self._in_script = False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._in_script = tag == "script"

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.script += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def page(report_folder) -> Page:
    return Page((report_folder / "report.html").read_text())


def assert_self_contained(page: Page) -> None:
    """One script, ours, whose hash the policy of the page names; pictures in the page itself; links within it."""
    assert not {"link", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.tags.count("script") == 1
    policy = next(
        value or "" for name, value in page.attributes if name == "content" and "default-src" in (value or "")
    )
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'")
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name == "src":
            assert (value or "").startswith("data:image/png;base64,")
        if name in ("href", "xlink:href", "srcset", "action"):
            assert (value or "").startswith("#"), (name, value)


def test_the_page_is_self_contained(report_folder, page):
    assert_self_contained(page)
    source = (report_folder / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", source)


def test_every_section_and_figure_is_there(page):
    headings = (
        "Does the model look at the image?",
        "Verdict",
        "What was run",
        "What it answered",
        "How far apart the keys of image and text are",
        "Where it looks",
        "Which heads hold the keys apart",
        "Where it looked when fooled",
        "Does looking at the image go with answering by it?",
        "Accuracy against divergence",
        "Keys of layer 2 in the plane",
        "By family of questions",
        "What the published protocol leaves unknown",
        "Examples",
        "Methods and versions",
    )
    assert all(heading in page.text for heading in headings)
    # Key, answers, divergence, heads, attention, fooled, functional link, relation, and two planes for each run.
    assert page.tags.count("svg") == 2 + 2 + 2 + 3 + 1 + 3 + 4 + 2 + 6
    assert "ln 2" in page.text
    assert "model that comes with the package" in page.text
    assert "72 image and 72 text tokens; PCA to 16 dimensions keeps 100.0 %" in page.text


def test_what_template_tokens_change_is_said_for_each_run(page, three_runs):
    found = re.findall(
        r"Template and special tokens counted as text, .*?: MMD² is ([\d.]+) instead of ([\d.]+),", page.text
    )
    assert len(found) == len(three_runs) == 3
    for included, left_out in found:
        assert float(included) == pytest.approx(float(left_out) * 2 / 3, abs=1e-3)


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value.removeprefix("#") for name, value in page.attributes if name == "href"}
    assert links <= set(ids)


def test_page_markdown_and_csv_agree_to_the_last_digit(report_folder, page):
    table = pd.read_csv(report_folder / "tables" / "comparison.csv", keep_default_na=False, na_values=["", "nan"])
    numbers = table[[column for column in table if not column.startswith("printed ")]].copy()
    numbers["note"] = numbers["note"].fillna("")
    expected = printed(numbers)
    markdown = (report_folder / "report.md").read_text().replace("\\", "")
    for column in ("Value [95 %]", "Change [95 %]", "p (Holm)"):
        assert expected[column].tolist() == table[f"printed {column}"].tolist()
        for cell in expected[column]:
            assert cell in page.text
            assert cell in markdown
    rows = json.loads((report_folder / "comparison.json").read_text())["rows"]
    for name in ("value", "low", "high", "delta", "p_adjusted", "mde"):
        read = pd.Series([row[name] for row in rows], dtype=float)
        pd.testing.assert_series_equal(read, table[name], check_names=False, rtol=1e-15)
    parquet = pd.read_parquet(report_folder / "tables" / "comparison.parquet")
    assert printed(parquet)["Value [95 %]"].tolist() == expected["Value [95 %]"].tolist()


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
        "The divergence in the other runs: lora: no change detected (MMD^2 0.0000, 0.0 %)."
    ]
    assert malora.divergence.change == "MMD^2 -0.1000, -25.0 %"
    assert malora.divergence.limits == "[-0.2000, +0.1000]; detectable: 0.0500"


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
    source = write_report(runs, tmp_path / "out", figure_files=False)[0]
    text = source.read_text()
    page = Page(text)
    assert_self_contained(page)
    assert "b" not in page.tags
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "$model$" in page.text
    assert len(text) < 2_000_000
    assert "alert" not in page.script
    assert "<script" not in (source.parent / "report.md").read_text()


def test_stock_runs_show_accuracy_only_and_say_so(tmp_path):
    paths = [fake_runs.write(replace(run, capture=False), tmp_path) for run in (BASE, LORA)]
    page = Page(write_report(load_runs(paths), tmp_path / "out", figure_files=False)[0].read_text())
    assert "no keys were captured" in page.text
    assert "What it answered" in page.text
    assert "How far apart" not in page.text
    assert "not measured" in page.text
    assert "(not measured)" not in page.text


def test_a_benchmark_that_the_model_cannot_read_is_marked(tmp_path):
    run = fake_runs.write(replace(BASE, task_record={"interpretable": False}), tmp_path)
    page = Page(write_report(load_runs([run]), tmp_path / "out", figure_files=False)[0].read_text())
    assert "bundled base: not interpretable" in page.text
    assert "nothing to compare" in page.text


def test_equal_input_gives_an_equal_report(report_folder, three_runs, tmp_path):
    again = write_report(load_runs(three_runs), tmp_path, figure_files=False)
    for path in again:
        assert path.read_bytes() == (report_folder / path.relative_to(tmp_path)).read_bytes(), path.name


def test_runs_keep_their_order(three_runs, tmp_path):
    page = Page(write_report(load_runs(three_runs[1::-1]), tmp_path, figure_files=False)[0].read_text())
    assert "malora (base) and 1 more run compared" in page.text


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


def test_task_names_cannot_leave_the_folder(tmp_path):
    folder = fake_runs.write(replace(BASE, capture=False), tmp_path / "in")
    for path in list(folder.iterdir()):
        path.write_text(path.read_text().replace(TASK, "..weird task"))
        path.rename(path.with_name(path.name.replace(TASK, "..weird task")))
    written = write_report(load_runs([folder]), tmp_path / "out")
    out = tmp_path / "out"
    assert {path.parent for path in written} == {out, out / "tables", out / "figures"}
    assert all(not path.name.startswith(".") for path in written)


def test_tables_lie_beside_the_page(report_folder):
    tables = {path.name for path in (report_folder / "tables").iterdir()}
    for name in ("comparison", f"{TASK}_answers", f"{TASK}_divergence", f"{TASK}_functional_link", f"{TASK}_planes"):
        assert {f"{name}.csv", f"{name}.parquet"} <= tables
    answers = f"{TASK}_answers"
    csv, parquet = (report_folder / "tables" / f"{answers}.{form}" for form in ("csv", "parquet"))
    pd.testing.assert_frame_equal(pd.read_csv(csv), pd.read_parquet(parquet), check_dtype=False)


def test_keys_are_drawn_of_as_many_runs_as_asked(three_runs, tmp_path):
    source = write_report(load_runs(three_runs[:2]), tmp_path, figure_files=False, tsne_runs=1)[0].read_text()
    assert source.count("<h4>t-SNE, ") == 1
    assert "The first 1 of 2 runs are drawn." in source


def test_figures_lie_beside_the_page(tmp_path):
    written = write_report(
        load_runs([fake_runs.write(replace(BASE, capture=False), tmp_path / "in")]), tmp_path / "out"
    )
    figures = {path.name for path in written if path.parent.name == "figures"}
    names = ("key_reliance", f"{TASK}_accuracy", f"{TASK}_text_preference")
    assert figures == {f"{name}.{form}" for name in names for form in ("svg", "png", "pdf")}
    page = written[0].read_text()
    assert page.count("<svg") == len(names)
    svg = (tmp_path / "out" / "figures" / f"{TASK}_accuracy.svg").read_text()
    assert "var(--" not in svg  # files carry their colors, the page has variables
    assert "var(--series-0)" in page


def test_pictures_are_drawn_again_and_only_from_recipes_of_the_generator(report_folder):
    source = (report_folder / "report.html").read_text()
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', source)
    assert len(pictures) == source.count('class="example"') > 5
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB")
    assert image.size == (SIDE, SIDE)
    assert image.getpixel((SIDE // 2, SIDE // 2)) in {PALETTE[color] for color in fake_runs.COLORS}
    assert image.getpixel((2, 2)) == (61, 61, 61)
    for kind, spec in (
        ("scene", '{"canvas": 100000, "objects": []}'),
        ("scene", "[]"),
        ("../etc", "{}"),
        ("scene", "{"),
    ):
        with pytest.raises(InputError, match="not a recipe"):
            data_uri(kind, spec)


@pytest.mark.parametrize(("sha", "said"), [("mmmu#12", "is not embedded"), ("0" * 64, "does not hold the recipe")])
def test_a_picture_that_cannot_be_shown_is_accounted_for(tmp_path, sha, said):
    folder = fake_runs.write(replace(BASE, capture=False), tmp_path / "in")
    (path,) = folder.glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in ("image", "spec")} | {"image_sha": sha} for row in rows]
    path.write_text("\n".join(map(json.dumps, rows)))
    page = Page(write_report(load_runs([folder]), tmp_path / "out", figure_files=False)[0].read_text())
    assert said in page.text
    assert "img" not in page.tags


def test_documents_asked_without_an_image_they_name_are_listed(tmp_path):
    run = fake_runs.write(replace(BASE, task_record={"images_absent": [3, 12]}), tmp_path)
    page = Page(write_report(load_runs([run]), tmp_path / "out", figure_files=False)[0].read_text())
    assert "bundled base: asked without an image that the question names" in page.text
    assert "document 3, 12" in page.text
