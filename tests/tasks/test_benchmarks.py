"""MMMU and MMBench-CN under the probes' conditions, on made-up files of their shape."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from itertools import groupby
from typing import Any, ClassVar

import benchmark_files
import pytest
from benchmark_files import _picture as picture
from benchmark_files import write_mmbench_cn, write_mmmu
from fake_model import Fake, expect, run
from lmms_eval.tasks.mmmu import utils as stock_mmmu

from lmms_keyspace.errors import InputError
from lmms_keyspace.tasks import benchmarks, metrics, reported

FULL = reported.PROBES["benchmark_full"].conditions
KWARGS = {"prompt_type": "format", "multiple_choice_prompt": "One letter.", "open_ended_prompt": "One word."}
# Plain rows 0, 2 and 4; of the awkward ones all but the one whose second picture is missing.
MMMU_ROWS = ["Accounting_0", "Accounting_2", "Accounting_4", "Music_10", "Music_12", "Music_14", "Art_Theory_16",
             "Art_Theory_18", "Math_20"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("benchmarks")
    write_mmmu(root, awkward=True)
    write_mmbench_cn(root)
    return root


@pytest.fixture(autouse=True)
def local(data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(benchmarks.DATA, str(data))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def groups_of(benchmark: str) -> list[dict[str, dict[str, Any]]]:
    docs = benchmarks.documents(benchmark, FULL)
    return [{doc["condition"]: doc for doc in group} for _, group in groupby(docs, key=lambda doc: doc["group_id"])]


def content(doc: dict[str, Any]) -> list[Any]:
    """Texts and pictures' bytes of the user turn."""
    (turn,) = benchmarks.doc_to_messages(doc, KWARGS | {"post_prompt": "请回答。"})
    return [part["text"] if part["type"] == "text" else part["url"].tobytes() for part in turn["content"]]


def test_multiple_choice_rows_whose_pictures_are_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        groups = groups_of("mmmu_val")
    assert [group["clean"]["group_id"] for group in groups] == [f"validation_{row}" for row in MMMU_ROWS]
    assert "9 of 13 rows are asked" in caplog.text
    assert {group["clean"]["family"] for group in groups} == {"Accounting", "Music", "Art_Theory", "Math"}
    assert [group["clean"]["group_id"] for group in groups_of("mmbench_cn_dev")] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("benchmark", benchmarks.BENCHMARKS)
def test_conditions_differ_in_what_they_say(benchmark: str) -> None:
    for group in groups_of(benchmark):
        assert tuple(group) == FULL
        gold, lure = group["clean"]["gold"], group["clean"]["lure"]
        assert gold != lure
        assert {gold, lure} <= set(group["clean"]["pool"])
        texts = {name: "".join(part for part in content(doc) if isinstance(part, str)) for name, doc in group.items()}
        pixels = {name: [part for part in content(doc) if isinstance(part, bytes)] for name, doc in group.items()}
        assert texts["clean"] == texts["blank"] == texts["mismatch"]
        for name, letter in (("match", gold), ("conflict", lure), ("irrelevant", None)):
            hint = group[name]["context"]
            assert re.findall("(?<![A-Za-z])[A-Z](?![A-Za-z])", hint) == ([letter] if letter else [])
            assert texts[name].replace(hint, "").replace(" ", "") == texts["clean"].replace(" ", "")
        assert pixels["clean"] == pixels["match"] == pixels["conflict"] == pixels["irrelevant"] != pixels["blank"]
        assert [len(picture) for picture in pixels["blank"]] == [len(picture) for picture in pixels["clean"]]
        assert len(pixels["mismatch"]) == len(pixels["clean"])
        assert pixels["mismatch"] != pixels["clean"]
        assert set(b"".join(pixels["blank"])) == {128}
        assert pixels["none"] == []
        assert "<image" not in "".join(texts.values())
        assert {picture.mode for doc in group.values() for picture in benchmarks.doc_to_visual(doc)} == {"RGB"}


def test_clean_is_the_stock_prompt() -> None:
    for group in groups_of("mmmu_val"):
        row = benchmarks._row("mmmu_val", group["clean"]["row"])
        (turn,) = stock_mmmu.mmmu_doc_to_messages(row, KWARGS)
        assert content(group["clean"]) == [
            part["text"] if part["type"] == "text" else part["url"].tobytes() for part in turn["content"]
        ]


def test_without_an_image_nothing_of_the_question_is_lost() -> None:
    (group,) = (group for group in groups_of("mmmu_val") if group["clean"]["group_id"].endswith("Art_Theory_18"))
    assert content(group["none"])[0].startswith("Which of [image] fits [image]?\nA. one")


def test_several_images_keep_their_number_and_order() -> None:
    (group,) = (group for group in groups_of("mmmu_val") if group["clean"]["group_id"].endswith("Math_20"))
    kinds = [isinstance(part, bytes) for part in content(group["mismatch"])]
    assert kinds == [isinstance(part, bytes) for part in content(group["clean"])] == [False, True, False, True, False]


def told(doc: dict[str, Any]) -> str:
    return {"match": doc["gold"], "conflict": doc["lure"]}.get(doc["condition"], doc["gold"])


@pytest.mark.parametrize(("task", "n", "pictures"), [("mmmu_val_keyspace", 9, 9), ("mmbench_cn_dev_keyspace", 5, 4)])
def test_a_hint_follower(task: str, n: int, pictures: int) -> None:
    results, samples, _ = run(lambda doc: f"({told(doc)})" if doc["condition"] != "blank" else "??", task, fake=Asked)
    expect(
        results,
        clean_acc=1, conflict_acc=0, blind_acc=0, text_flip_rate=1, text_flip_rate_n=n, conflict_lure=1, tpr_label=1,
        conflict_drop=1, vis_gain=1, stock_acc=1, stock_acc_n=n, parse_fail=1 / 3, groups=n, groups_dropped=0,
        clean_acc_ci_lo=pictures / (pictures + 1.959964**2),
    )  # fmt: skip
    assert "valid" not in results  # of a benchmark nobody expects .8
    assert {"group_id", "family", "condition", "outcome", "answer", "stock_correct", "response"} <= set(samples[0])
    rebuilt = metrics.summarize([json.loads(json.dumps(_line(sample), default=str)) for sample in samples], "benchmark")
    assert rebuilt["stock_acc"].value == 1
    assert rebuilt["text_flip_rate"].value == 1


def _line(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sample.items() if key not in ("doc", "arguments")}


class Asked(Fake):
    """Asked with the settings of a benchmark, which are the stock tasks'."""

    settings: ClassVar[dict[str, Any]] = {}


def test_all_seven_conditions_and_each_by_itself() -> None:
    full, _, _ = run(lambda doc: told(doc), "mmmu_val_keyspace_full", fake=Asked)
    expect(full, clean_acc=1, match_acc=1, conflict_acc=0, irrelevant_acc=1, blind_acc=1, mismatch_acc=1, none_acc=1,
           mismatch_drop=0, none_drop=0, benefit=0, spurious_flip=0, excess_flip=1, groups=9)  # fmt: skip
    assert "follow_shown" not in full  # the other row's question is not known
    for name, key, value in (
        ("clean", "clean_acc", 1),
        ("hint_wrong", "conflict_acc", 0),
        ("hint_right", "match_acc", 1),
        ("irrelevant", "irrelevant_acc", 1),
        ("blank", "blind_acc", 1),
        ("mismatch", "mismatch_acc", 1),
        ("none", "none_acc", 1),
    ):
        alone, samples, _ = run(lambda doc: told(doc), f"mmmu_val_keyspace_{name}", fake=Asked)
        expect(alone, **{key: value}, parse_fail=0, stock_acc=value, groups=9)
        assert [sample["answer"] for sample in samples if sample["outcome"] == "gold"] == [
            sample["gold"] for sample in samples if sample["outcome"] == "gold"
        ]


def test_what_cannot_be_read_is_counted_and_never_guessed() -> None:
    random.seed(1)
    results, samples, _ = run(lambda doc: "it depends", "mmmu_val_keyspace_clean", fake=Asked)
    expect(results, clean_acc=0, parse_fail=1)
    drawn = sum(sample["stock_correct"] for sample in samples) / 9
    expect(results, stock_acc=drawn)  # the stock scoring draws an option
    results, _, _ = run(lambda doc: "我不知道", "mmbench_cn_dev_keyspace_clean", fake=Asked)
    expect(results, clean_acc=0, parse_fail=1, stock_acc=0)


def test_the_static_task_counts_circular_copies_together() -> None:
    """Always A: right of questions 1 and 5 and of the copy of 2; of 1's copy it is wrong, so only 5 counts."""
    results, samples, _ = run(lambda doc: "A", "mmbench_cn_dev_static", fake=Asked)
    expect(results, static_acc=1 / 5)
    assert len(samples) == 7
    right, _, _ = run(lambda doc: f"答案是 {doc['answer']}", "mmbench_cn_dev_static", fake=Asked)
    expect(right, static_acc=1)
    unread, _, _ = run(lambda doc: "不知道", "mmbench_cn_dev_static", fake=Asked)
    expect(unread, static_acc=0)


def test_lures_are_stable_and_spread() -> None:
    first, again = (
        [(doc["group_id"], doc["lure"], doc["context"]) for doc in benchmarks.documents("mmmu_val", FULL)]
        for _ in range(2)
    )
    assert first == again
    letters = Counter(benchmarks_lure(number) for number in range(400))
    assert set(letters) == {"B", "C", "D"}
    assert min(letters.values()) > 100


def benchmarks_lure(number: int) -> str:
    row = {"id": f"validation_Math_{number}", "answer": "A", "question": "?"}
    about = benchmarks.BENCHMARKS["mmmu_val"]
    (doc,) = benchmarks._row_documents("mmmu_val", about, 0, row, dict.fromkeys("ABCD", "x"), 0, ["clean"])
    return doc["lure"]


def test_rows_that_share_a_picture_are_one_cluster() -> None:
    clusters = [group["clean"]["cluster"] for group in groups_of("mmbench_cn_dev")]
    assert clusters[0] == clusters[4]
    assert len(set(clusters)) == 4
    assert len({group["clean"]["cluster"] for group in groups_of("mmmu_val")}) == 9
    # Right of the first picture's two questions alone: two of five rows, but one of four pictures.
    results, samples, _ = run(
        lambda doc: doc["gold"] if doc["group_id"] in "15" else "?", "mmbench_cn_dev_keyspace_clean", fake=Asked
    )
    expect(results, clean_acc=2 / 5, stock_acc=2 / 5, parse_fail=3 / 5)
    assert [sample["cluster"] for sample in samples] == clusters
    assert results["clean_acc_stderr_clustered"] > 1.2 * results["clean_acc_stderr_clt"]  # the harness's own
    assert results["clean_acc_ci_hi"] > 0.7


def test_the_stock_task_stops_where_a_named_picture_is_missing_and_ours_does_not() -> None:
    (row,) = (row for row in benchmarks._rows("mmmu_val") if row["id"].endswith("Math_22"))
    with pytest.raises(AttributeError, match="convert"):
        stock_mmmu.mmmu_doc_to_visual(row)
    assert not [doc for doc in benchmarks.documents("mmmu_val", FULL) if doc["group_id"] == row["id"]]


def test_another_copy_of_the_data_is_read_and_not_the_cache_of_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    first = [row["image"].tobytes() for row in benchmarks._rows("mmbench_cn_dev")]
    monkeypatch.setattr(benchmark_files, "_picture", lambda seed, *rest: picture(seed + 100, *rest))
    write_mmbench_cn(tmp_path)
    monkeypatch.setenv(benchmarks.DATA, str(tmp_path))
    other = [row["image"].tobytes() for row in benchmarks._rows("mmbench_cn_dev")]
    assert len(first) == len(other)
    assert not set(first) & set(other)


def test_missing_data_name_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(benchmarks.DATA, str(tmp_path))
    with pytest.raises(InputError, match=r"^LMMS_KEYSPACE_DATA=.*lmms-lab-encoder/MMMU"):
        list(benchmarks.documents("mmmu_val", FULL))
