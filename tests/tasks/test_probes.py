"""The documents of the other probes: paired, differing in exactly what their condition says, the same every time."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import ImageChops

import lmms_keyspace.tasks
from lmms_keyspace import outcomes, scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.tasks import documents, pictures, probes, reported

FOLDER = Path(lmms_keyspace.tasks.__file__).parent
SETTINGS = {path.stem: json.loads(path.read_text()) for name in probes.NAMES for path in FOLDER.glob(f"{name}/*.jsonl")}


def groups_of(probe: str, n: int = 60) -> list[dict[str, dict]]:
    docs = documents.build_documents(n, probe=probe)
    return [{doc["condition"]: doc for doc in group} for _, group in groupby(docs, key=lambda doc: doc["group_id"])]


def image(doc: dict):
    (picture,) = documents.doc_to_visual(doc)
    return picture


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("name", SETTINGS)
def test_every_task_makes_the_documents_it_was_published_with(name: str) -> None:
    settings = dict(SETTINGS[name])
    generator = settings.pop("generator")
    docs = documents.build_documents(settings.pop("groups"), **settings)
    assert documents.generator_tag(docs) == generator
    (path,) = FOLDER.glob(f"*/{name}.yaml")
    config = yaml.safe_load(path.read_text())
    declared = config["metadata"]["keyspace"]
    assert declared["generator"] == generator
    assert {declared["cluster"], declared["condition"], *declared["segments"].values()} <= set(docs[0])
    template = (path.parent / config["include"]).read_text()
    assert f"lmms_keyspace.tasks.scoring.{settings['probe']}\n" in template
    assert f"lmms_keyspace.tasks.aggregation.{settings['probe']}\n" in template


@pytest.mark.parametrize("probe", probes.NAMES)
def test_groups_are_whole_consecutive_and_ask_for_what_can_be_answered(probe: str) -> None:
    groups = groups_of(probe)
    assert len(groups) == 60
    for group in groups:
        assert tuple(group) == reported.PROBES[probe].conditions
        for doc in group.values():
            assert doc["gold"] != doc["lure"]
            assert {doc["gold"], doc["lure"]} <= set(doc["pool"])
            assert doc["prompt"].startswith(f"{doc['context']} {doc['question']}".strip())


def test_order_moves_and_reframes_one_false_claim() -> None:
    for group in groups_of("textbias_order"):
        clean, lure, item = group["clean"], group["clean"]["lure"], group["conflict"]
        assert {doc["image"] for name, doc in group.items() if name != "text_only_conflict"} == {"scene"}
        assert group["text_only_conflict"]["image"] == "none"
        assert len({doc["image_sha"] for doc in group.values()}) == 2
        assert clean["context"] == ""
        assert item["context"] == group["before"]["context"] == group["text_only_conflict"]["context"]
        for name in ("conflict", "opinion", "authority"):
            assert [word for word in words(group[name]["context"]) if word in clean["pool"]] == [lure]
        assert len({group[name]["context"] for name in ("conflict", "opinion", "authority", "filler")}) == 4
        assert not set(words(group["filler"]["context"])) & set(clean["pool"])
        assert len(words(group["filler"]["context"])) == len(words(item["context"]))
        kinds = {
            name: [part["type"] for part in documents.doc_to_messages(doc)[0]["content"]] for name, doc in group.items()
        }
        assert kinds.pop("before") == ["text", "image", "text"]
        assert kinds.pop("text_only_conflict") == ["text"]
        assert all(kind == ["image", "text"] for kind in kinds.values())
        before = documents.doc_to_messages(group["before"])[0]["content"]
        assert (before[0]["text"], before[2]["text"]) == (item["context"], clean["prompt"])
    assert {len(words(filler)) == size for size, fillers in probes.FILLERS.items() for filler in fillers} == {True}


def test_every_frame_has_six_paraphrases() -> None:
    for name in ("opinion", "authority", "conflict"):
        said = {re.sub(rf"\b{doc['lure']}\b", "X", doc["context"]) for group in groups_of("textbias_order", 300)
                for doc in [group[name]] if doc["family"] == "color"}  # fmt: skip
        assert len(said) == 6


def test_typography_adds_a_word_and_nothing_else() -> None:
    for group in groups_of("textbias_typographic", 40):
        clean = group["clean"]
        written = {name: json.loads(doc["spec"]).get("written") for name, doc in group.items()}
        control = written.pop("random_word")
        assert control in probes.RANDOM_WORDS
        assert not {control} & {word for pool in scenes.POOLS.values() for word in pool}
        assert written == {"clean": None, "lure_word": clean["lure"], "gold_word": clean["gold"], "read": clean["lure"]}
        assert (group["read"]["gold"], group["read"]["lure"]) == (clean["lure"], clean["gold"])
        assert group["read"]["image_sha"] == group["lure_word"]["image_sha"]
        assert {doc["prompt"] for name, doc in group.items() if name != "read"} == {clean["prompt"]}
        boxes = [
            ImageChops.difference(image(clean), image(group[name])).getbbox()
            for name in ("lure_word", "gold_word", "random_word")
        ]
        assert len(set(boxes)) == 1  # the same label at the same place
        left, top, right, bottom = boxes[0]
        assert (right - left, bottom - top) == (151, 45)
        inside = ImageChops.difference(image(group["lure_word"]), image(group["gold_word"])).getbbox()
        assert left + 2 <= inside[0] < inside[2] <= right - 2


def test_a_written_word_hides_little() -> None:
    shown = []
    for group in groups_of("textbias_typographic", 100):
        scene, label = (np.asarray(image(group[name])).astype(int) for name in ("clean", "lure_word"))
        objects = np.abs(scene - json.loads(group["clean"]["spec"])["background"]).max(axis=2) > 20
        hidden = objects & (np.abs(scene - label).max(axis=2) > 0)
        shown.append(1 - hidden.sum() / objects.sum())
    assert min(shown) > 0.85


def test_reliance_takes_the_picture_away() -> None:
    for group in groups_of("visreliance_probe", 40):
        clean = group["clean"]
        assert {doc["prompt"] for name, doc in group.items() if name != "caption_oracle"} == {clean["prompt"]}
        assert documents.doc_to_visual(group["none"]) == documents.doc_to_visual(group["caption_oracle"]) == []
        assert len({doc["image_sha"] for doc in group.values()}) == 6  # none and caption-oracle show nothing
        assert {image(doc).size for doc in group.values() if doc["image"] != "none"} == {(scenes.CANVAS,) * 2}
        assert image(group["blank"]).tobytes() == scenes.blank().tobytes()
        pixels = {name: np.asarray(image(group[name])).reshape(-1, 3) for name in ("clean", "shuffled", "noise")}
        assert not (pixels["clean"] == pixels["shuffled"]).all()
        assert (np.sort(pixels["clean"], axis=0) == np.sort(pixels["shuffled"], axis=0)).all()  # the same pixels
        assert abs(pixels["noise"].mean() - 127.5) < 1
        assert image(group["noise"]).tobytes() == image(dict(group["noise"])).tobytes()


def test_the_mismatched_picture_shows_the_lure() -> None:
    """The answer is found again from the objects of the picture that is shown, by what the question asks."""
    for group in groups_of("visreliance_probe", 100):
        doc = group["mismatched"]
        assert (doc["gold"], doc["lure"]) == (group["clean"]["gold"], group["clean"]["lure"])
        things = json.loads(doc["spec"])["objects"]
        largest = max(things, key=lambda thing: thing["radius"])
        side = scenes.CANVAS
        edges = {"left": largest["x"], "right": side - largest["x"], "top": largest["y"], "bottom": side - largest["y"]}
        answer = {
            "color": largest["color"],
            "size": largest["color"],
            "shape": largest["shape"],
            "count": scenes.COUNTS[len(things) - 1],
            "position": min(edges, key=edges.get),
        }[doc["family"]]
        assert answer == doc["lure"]
        for shape in scenes.SHAPES:  # a question that names a shape finds it
            if shape in doc["question"]:
                assert {thing["shape"] for thing in things} == {shape}


def test_the_caption_says_everything_the_picture_shows() -> None:
    for group in groups_of("visreliance_probe", 100):
        doc = group["caption_oracle"]
        things = json.loads(doc["spec"])["objects"]
        said = Counter(words(doc["context"]))
        assert said["near"] == len(things)
        for thing in things:
            assert said[thing["color"]] >= 1
            assert said[thing["shape"]] == len(things)
        if doc["family"] == "position":
            assert f"near the {doc['gold']} edge" in doc["context"]
        if doc["family"] == "size":
            assert f"a large {doc['gold']} " in doc["context"]


def test_pairs_are_right_of_one_picture_only() -> None:
    groups = groups_of("visreliance_pairs", 100)
    for group in groups:
        docs = [group[condition] for condition in outcomes.PAIR_CONDITIONS]
        for question in (0, 1):
            first, second = docs[question], docs[question + 2]
            assert first["prompt"] == second["prompt"]
            assert (first["gold"], first["lure"]) == (second["lure"], second["gold"])
        for picture in (0, 2):
            assert docs[picture]["image_sha"] == docs[picture + 1]["image_sha"]
            (thing,) = json.loads(docs[picture]["spec"])["objects"]
            assert docs[picture]["gold"] == thing["color"]
            assert docs[picture + 1]["family"] == "color_position" or docs[picture + 1]["gold"] == thing["shape"]
    assert Counter(group["image0_question0"]["family"] for group in groups) == {"color_shape": 50, "color_position": 50}


def test_held_out_pictures_are_held_out() -> None:
    for probe in set(probes.NAMES) - {probes.RICH}:  # the bundled model is not trained on those at all
        for doc in documents.build_documents(20, space="heldout", probe=probe):
            if doc["image"] in ("scene", "shuffled"):
                things = {(thing["color"], thing["shape"]) for thing in json.loads(doc["spec"])["objects"]}
                assert things <= scenes.HELD_OUT


def test_an_unknown_probe_is_refused() -> None:
    with pytest.raises(InputError, match="probe='essay'"):
        documents.build_documents(1, probe="essay")


def test_a_recipe_names_its_picture() -> None:
    spec = json.loads(groups_of("visreliance_probe", 1)[0]["noise"]["spec"])
    shas = [pictures.sha(kind, spec) for kind in pictures.KINDS]
    assert shas.pop() == ""
    assert len(set(shas)) == 4
    assert pictures.sha("noise", spec) != pictures.sha("noise", {**spec, "seed": 0})
    assert pictures.sha("blank", spec) == pictures.sha("blank", {**spec, "seed": 0})
