"""The rich families: what their pictures show is found again in the pixels, and their texts are paired and balanced."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import lru_cache
from itertools import groupby, permutations

import numpy as np
import pytest
from fake_model import expect, run, said
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, stats

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import CONDITIONS
from lmms_keyspace.tasks import documents
from lmms_keyspace.tasks.rich import drawing
from lmms_keyspace.tasks.rich.groups import build_groups

N = 324
DOCS = documents.build_documents(N, probe="textbias_rich")
GROUPS = [{doc["condition"]: doc for doc in group} for _, group in groupby(DOCS, key=lambda doc: doc["group_id"])]
NUMERALS = {word: str(number) for number, word in enumerate(drawing.NUMBERS, start=1)}


def of(family: str, n: int = 18) -> list[tuple[dict, np.ndarray]]:
    """The first groups of a family: the clean document, and its picture as [y, x, channel]."""
    found = [group["clean"] for group in GROUPS if group["clean"]["family"] == family][:n]
    return [(doc, np.asarray(documents.doc_to_visual(doc)[0]).astype(int)) for doc in found]


def like(pixels: np.ndarray, color: tuple[int, ...] | list[int], tolerance: int = 30) -> np.ndarray:
    """Mask of the pixels of a color."""
    return np.abs(pixels - np.array(color)).max(axis=2) <= tolerance


@lru_cache(maxsize=64)
def glyph(text: str) -> np.ndarray:
    """The ink of a text, drawn here on its own, as a picture of 32 x 32."""
    sheet = Image.new("L", (400, 200))
    ImageDraw.Draw(sheet).text((40, 40), text, font=ImageFont.load_default(100), fill=255)
    return shrunk(np.asarray(sheet) > 127)


def shrunk(ink: np.ndarray) -> np.ndarray:
    """The box around the ink, scaled to 32 x 32."""
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(Image.fromarray((box * 255).astype(np.uint8)).resize((32, 32))).astype(float)


def read(ink: np.ndarray, candidates: tuple[str, ...] | list[str]) -> str:
    """The text whose own drawing is most like the ink."""
    seen = shrunk(ink)
    return min(candidates, key=lambda text: float(np.abs(glyph(text) - seen).mean()))


@pytest.mark.parametrize("family", ["digit", "letter"])
def test_the_glyph_is_the_answer(family: str) -> None:
    pool = drawing.POOLS[family]
    shown = [NUMERALS[word] if family == "digit" else word for word in pool]
    for doc, pixels in of(family):
        ink = like(pixels, json.loads(doc["spec"])["ink"], 90)
        assert pool[shown.index(read(ink, shown))] == doc["gold"]


def test_the_tallest_bar_is_the_answer() -> None:
    for doc, pixels in of("bar"):
        spec = json.loads(doc["spec"])
        bars, n = ndimage.label(like(pixels, scenes.PALETTE[spec["fill"]]))
        assert n == 4
        tallest = max(ndimage.find_objects(bars), key=lambda box: box[0].stop - box[0].start)[1]
        middle = (tallest.start + tallest.stop) // 2
        under = like(pixels, spec["ink"], 110)[296:, max(0, middle - 37) : middle + 37]
        assert read(under, drawing.FRUITS) == doc["gold"]
        assert {doc["gold"], doc["lure"]} <= set(spec["labels"])


def test_the_highest_point_is_the_answer() -> None:
    for doc, pixels in of("line"):
        spec = json.loads(doc["spec"])
        ink = like(pixels, spec["ink"], 110)
        x = int(np.flatnonzero(ink[np.flatnonzero(ink.any(axis=1))[0]]).mean())
        under = ink[296:, max(0, x - 36) : x + 36]
        assert read(under, drawing.MONTHS) == doc["gold"]
        assert spec["labels"] == sorted(spec["labels"], key=drawing.MONTHS.index)


def test_the_largest_slice_is_the_answer() -> None:
    for doc, pixels in of("pie"):
        areas = Counter({name: int(like(pixels, rgb, 12).sum()) for name, rgb in scenes.PALETTE.items()})
        (largest, first), (_, second) = areas.most_common(2)
        assert largest == doc["gold"]
        assert first > 1.4 * second
        assert areas[doc["lure"]] == second


def test_the_thick_hand_points_at_the_answer() -> None:
    for doc, pixels in of("clock", 24):
        dark = like(pixels, json.loads(doc["spec"])["ink"], 60)
        thick = ndimage.binary_erosion(dark, iterations=3)
        y, x = np.nonzero(thick)
        middle = (scenes.CANVAS - 1) / 2
        far = np.hypot(y - middle, x - middle) > 14  # beyond the hub
        angle = math.atan2(float(np.mean(x[far] - middle)), float(np.mean(middle - y[far])))
        hour = round(math.degrees(angle) / 30) % 12 or 12
        assert drawing.NUMBERS[hour - 1] == doc["gold"]


def cells(ink: np.ndarray) -> list[list[np.ndarray]]:
    """The inside of every cell of a table, by row and column."""
    top = (scenes.CANVAS - 5 * 54) // 2
    across = [(20, 136), (136, 226), (226, 316)]
    return [[ink[y + 5 : y + 49, left + 5 : right - 5] for left, right in across] for y in range(top, top + 270, 54)]


def test_the_cell_that_is_asked_for_holds_the_answer() -> None:
    for doc, pixels in of("table"):
        (_, *header), *lines = cells(like(pixels, json.loads(doc["spec"])["ink"], 110))
        row, column = re.fullmatch(r"Which number stands in row (\w+), column (\w+)\?", doc["question"]).groups()
        (line,) = [numbers for name, *numbers in lines if read(name, drawing.FRUITS) == row]
        place = [read(name, drawing.COLUMNS) for name in header].index(column)
        assert read(line[place], "123456789") == NUMERALS[doc["gold"]]
        assert read(line[1 - place], "123456789") == NUMERALS[doc["lure"]]


def test_the_head_of_the_arrow_points_at_the_answer() -> None:
    for doc, pixels in of("arrow"):
        y, x = np.nonzero(like(pixels, json.loads(doc["spec"])["ink"]))
        # The head is heavy: the center of mass lies towards it from the middle of the box.
        across, down = x.mean() - (x.min() + x.max()) / 2, y.mean() - (y.min() + y.max()) / 2
        if abs(across) > abs(down):
            assert doc["gold"] == ("right" if across > 0 else "left")
        else:
            assert doc["gold"] == ("down" if down > 0 else "up")


def test_the_dots_are_counted() -> None:
    for doc, pixels in of("dice"):
        dark = ndimage.binary_opening(like(pixels, json.loads(doc["spec"])["ink"], 60), iterations=4)
        assert drawing.NUMBERS[ndimage.label(dark)[1] - 1] == doc["gold"]


def test_nothing_is_cut_off_and_every_picture_has_the_canvas() -> None:
    for family in drawing.RICH_FAMILIES:
        for doc, pixels in of(family, 36):
            assert pixels.shape == (scenes.CANVAS, scenes.CANVAS, 3)
            paper = json.loads(doc["spec"])["background"]
            edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert (edge == paper).all()


def test_groups_are_paired_and_say_what_they_should() -> None:
    assert len(GROUPS) == N
    for group in GROUPS:
        assert tuple(group) == CONDITIONS
        clean = group["clean"]
        shown, pool = clean["prompt"], {word.lower() for word in clean["pool"]}
        for doc in group.values():
            assert doc["prompt"] == (f"{doc['context']} " if doc["context"] else "") + shown
            assert (doc["gold"], doc["lure"], doc["question"]) == (clean["gold"], clean["lure"], clean["question"])
        asked = set(re.findall(r"\w+", clean["question"].lower())) & pool  # a table's row
        named = {name: set(re.findall(r"\w+", doc["context"].lower())) & pool - asked for name, doc in group.items()}
        gold, lure = clean["gold"].lower(), clean["lure"].lower()
        assert not {gold, lure} & asked
        assert named == {
            "clean": set(), "match": {gold}, "conflict": {lure}, "irrelevant": set(), "text_only_conflict": {lure},
            "blank": set(),
        }  # fmt: skip
        lengths = [len(group[name]["context"].split()) for name in ("match", "conflict", "irrelevant")]
        assert max(lengths) - min(lengths) <= 2


def test_answers_letters_and_wordings_are_balanced() -> None:
    letters = documents.build_documents(N, "letter", probe="textbias_rich")[:: len(CONDITIONS)]
    for family, pool in drawing.POOLS.items():
        mine = [doc for doc in letters if doc["family"] == family]
        assert len(mine) == 36
        for answer in ("gold", "lure"):
            counts = Counter(doc[answer] for doc in mine)
            assert stats.chisquare([counts[word] for word in pool]).pvalue > 0.05
        places = [(doc["options"].index(doc["gold"]), doc["options"].index(doc["lure"])) for doc in mine]
        assert Counter(places) == dict.fromkeys(permutations(range(4), 2), 3)
        assert Counter(doc["template"] for doc in mine) == dict.fromkeys(range(6), 6)


def test_six_paraphrases_in_both_languages() -> None:
    for lang in documents.LANGUAGES:
        docs = documents.build_documents(N, probe="textbias_rich", lang=lang)
        for family in drawing.RICH_FAMILIES:
            said_of = {
                re.sub(
                    rf"row \w+, column \w+|[a-z]+行[a-z]+列|(?<![A-Za-z]){doc['lure']}(?![A-Za-z])", "X", doc["context"]
                )
                for doc in docs
                if (doc["family"], doc["condition"]) == (family, "conflict")
            }
            assert len(said_of) == 6, (lang, family, said_of)


def test_the_chinese_twin_shows_the_same_pictures() -> None:
    for english, twin in zip(DOCS, documents.build_documents(N, probe="textbias_rich", lang="zh"), strict=True):
        assert (english["item_id"], english["image_sha"]) == (twin["item_id"], twin["image_sha"])
        assert len(set(twin["pool"])) == len(twin["pool"])
        assert twin["gold"] == twin["pool"][english["pool"].index(english["gold"])]
        named = {
            word for word in twin["pool"] if re.search(rf"(?<![A-Za-z一-十]){word}(?![A-Za-z一])", twin["context"])
        }
        if twin["condition"] in ("clean", "blank"):
            assert named == set()
        elif twin["condition"] != "irrelevant":
            assert twin["gold" if twin["condition"] == "match" else "lure"] in named


def test_seed_spaces_do_not_meet() -> None:
    probe, heldout = (
        {group.item.spec["rich"] + json.dumps(group.item.spec) for group in build_groups(54, space)}
        for space in ("probe", "heldout")
    )
    assert not probe & heldout
    with pytest.raises(InputError, match="groups=0"):
        build_groups(0)


def told(doc: dict) -> str:
    return {"match": doc["gold"], "conflict": doc["lure"], "text_only_conflict": doc["lure"]}.get(doc["condition"], "")


def test_a_text_follower_through_the_harness() -> None:
    results, _, _ = run(
        lambda doc: told(doc) or (doc["gold"] if doc["image"] == "scene" else "no idea"), "textbias_rich_quick"
    )
    expect(
        results,
        clean_acc=1, conflict_acc=0, text_flip_rate=1, text_flip_rate_n=54, text_only_lure=1, benefit=0, vis_gain=1,
        parse_fail=1 / 6, valid=1, not_valid_for="none", clean_acc_clock=1, clean_acc_clock_n=6, valid_table=1,
        chance=sum(1 / len(pool) for pool in drawing.POOLS.values()) / 9, groups=54,
    )  # fmt: skip
    assert "clean_acc_color" not in results


@pytest.mark.parametrize("task", ["textbias_rich_letter", "textbias_rich_zh"])
def test_a_blind_model_through_the_harness(task: str) -> None:
    """The first answer of its list whatever it is shown, in letters or in Chinese."""
    results, samples, _ = run(lambda doc: (told(doc) and said(doc, told(doc))) or said(doc, doc["pool"][0]), task, 108)
    lucky = sum(s["gold"] == s["doc"]["pool"][0] for s in samples if s["condition"] == "clean") / 18
    expect(results, clean_acc=lucky, vis_gain=0, conflict_acc=0, match_acc=1, text_only_lure=1, parse_fail=0, valid=0)
