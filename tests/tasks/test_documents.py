"""The documents: paired to the byte, balanced, the same in every process, and guarded against a changed generator."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import groupby, permutations

import pytest
import yaml
from scipy import stats

from lmms_keyspace import scenes
from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import CONDITIONS
from lmms_keyspace.tasks import documents, reported
from lmms_keyspace.tasks.groups import LETTERS

FOLDER = documents.__file__.rsplit("/", 1)[0] + "/textbias_probe"
TASKS = {
    "textbias_probe": (300, "word"),
    "textbias_probe_quick": (48, "word"),
    "textbias_probe_letter": (300, "letter"),
}
WORD_DOCS = documents.build_documents(300)
LETTER_DOCS = documents.build_documents(300, "letter")
FORMS = pytest.mark.parametrize("docs", [WORD_DOCS, LETTER_DOCS], ids=["word", "letter"])


def groups_of(docs: list[dict]) -> list[dict[str, dict]]:
    return [{doc["condition"]: doc for doc in group} for _, group in groupby(docs, key=lambda doc: doc["group_id"])]


@FORMS
def test_a_group_is_six_consecutive_documents_that_differ_in_what_they_say(docs: list[dict]) -> None:
    groups = groups_of(docs)
    assert len(groups) == len({doc["group_id"] for doc in docs}) == 300
    assert len({doc["item_id"] for doc in docs}) == len(docs)
    may_differ = {"item_id", "condition", "image", "image_sha", "context", "prompt"}
    for group in groups:
        assert tuple(group) == CONDITIONS
        clean = group["clean"]
        for doc in group.values():
            assert {k: v for k, v in doc.items() if k not in may_differ} == {
                k: v for k, v in clean.items() if k not in may_differ
            }
            # The prompt is the context, then what is common to all conditions.
            assert doc["prompt"] == (f"{doc['context']} " if doc["context"] else "") + clean["prompt"]
        assert group["conflict"]["prompt"] == group["text_only_conflict"]["prompt"]
        assert group["blank"]["prompt"] == clean["prompt"]
        assert [group[c]["image"] for c in CONDITIONS] == ["scene"] * 4 + ["none", "blank"]
        shas = [group[c]["image_sha"] for c in CONDITIONS]
        assert shas == [scenes.spec_sha(json.loads(clean["spec"]))] * 4 + ["", shas[5]]
        assert shas[5] not in shas[:5]


@FORMS
def test_sentences_name_what_they_should_and_nothing_else(docs: list[dict]) -> None:
    for group in groups_of(docs):
        pool = scenes.POOLS[group["clean"]["family"]]
        named = {c: [w for w in re.findall(r"\w+", doc["context"].lower()) if w in pool] for c, doc in group.items()}
        gold, lure = group["clean"]["gold"], group["clean"]["lure"]
        assert gold != lure
        assert {gold, lure} <= set(pool)
        assert named["clean"] == named["blank"] == []
        assert (named["match"], named["conflict"], named["text_only_conflict"]) == ([gold], [lure], [lure])
        assert not {gold, lure, *group["clean"]["options"]} & set(named["irrelevant"])
        if group["clean"]["family"] != "count":  # a number changes its noun and verb
            assert group["conflict"]["context"].replace(f" {lure}", f" {gold}") == group["match"]["context"]
        lengths = [len(group[c]["context"].split()) for c in ("match", "conflict", "irrelevant")]
        assert max(lengths) - min(lengths) <= 2


def test_families_take_turns_and_are_equal_in_number() -> None:
    families = [group["clean"]["family"] for group in groups_of(WORD_DOCS)]
    assert families == list(scenes.CORE_FAMILIES) * 60
    assert len(set(families[:8])) == 5  # what --limit 48 leaves


def test_gold_lure_and_template_are_balanced() -> None:
    groups = [group["clean"] for group in groups_of(WORD_DOCS)]
    for family, pool in scenes.POOLS.items():
        mine = [doc for doc in groups if doc["family"] == family]
        gold = Counter(doc["gold"] for doc in mine)
        assert max(gold.values()) - min(gold[word] for word in pool) <= 1
        lure = Counter(doc["lure"] for doc in mine)
        assert stats.chisquare([lure[word] for word in pool]).pvalue > 0.05, (family, lure)
        assert set(Counter(doc["template"] for doc in mine).values()) == {60 // scenes.N_TEMPLATES}
        if family != "size":  # there the lure is given by the picture
            pairs = Counter((doc["gold"], doc["lure"]) for doc in mine)
            every = list(permutations(pool, 2))
            assert max(pairs.values()) - min(pairs[pair] for pair in every) <= 1
    # No template goes with an answer.
    table = Counter((doc["template"], doc["gold"]) for doc in groups if doc["family"] == "shape")
    counts = [[table[template, word] for word in scenes.POOLS["shape"]] for template in range(scenes.N_TEMPLATES)]
    assert stats.chi2_contingency(counts).pvalue > 0.05


def test_the_lure_of_size_is_the_smaller_object() -> None:
    for group in groups_of(WORD_DOCS):
        doc = group["clean"]
        if doc["family"] == "size":
            larger, smaller = sorted(json.loads(doc["spec"])["objects"], key=lambda thing: -thing["radius"])
            assert (doc["gold"], doc["lure"]) == (larger["color"], smaller["color"])


def test_letters_are_balanced() -> None:
    for family in scenes.CORE_FAMILIES:
        mine = [group["clean"] for group in groups_of(LETTER_DOCS) if group["clean"]["family"] == family]
        places = [(doc["options"].index(doc["gold"]), doc["options"].index(doc["lure"])) for doc in mine]
        assert Counter(places) == dict.fromkeys(permutations(range(4), 2), 5)
        for doc in mine:
            assert len(set(doc["options"])) == 4
            assert doc["pool"] == doc["options"]
            assert doc["target"] == LETTERS[doc["options"].index(doc["gold"])]
            assert doc["options_text"] in doc["prompt"]


def test_letters_ask_of_the_same_scenes_and_quick_is_a_prefix() -> None:
    shared = ("group_id", "spec", "question", "gold", "lure", "context", "image_sha")
    assert [[doc[field] for field in shared] for doc in WORD_DOCS] == [
        [doc[field] for field in shared] for doc in LETTER_DOCS
    ]
    assert documents.build_documents(48) == WORD_DOCS[: 48 * len(CONDITIONS)]


@pytest.mark.parametrize("space", scenes.SPACES)
def test_every_seed_space_can_be_used_and_none_meets_another(space: str) -> None:
    docs = documents.build_documents(20, space=space)
    shas = {doc["image_sha"] for doc in docs if doc["image"] == "scene"}
    assert len(shas) == 20
    if space != "probe":
        assert not shas & {doc["image_sha"] for doc in WORD_DOCS if doc["image"] == "scene"}


@pytest.mark.parametrize("name", TASKS)
def test_published_tags(name: str) -> None:
    """The tag of settings file and YAML is that of the documents that this installation makes."""
    n, answer = TASKS[name]
    docs = {"word": WORD_DOCS, "letter": LETTER_DOCS}[answer][: n * len(CONDITIONS)]
    with open(f"{FOLDER}/{name}.jsonl") as file:
        settings = json.loads(file.read())
    assert settings == {
        "probe": "textbias_probe",
        "groups": n,
        "answer": answer,
        "space": "probe",
        "lang": "en",
        "generator": documents.generator_tag(docs),
    }
    with open(f"{FOLDER}/{name}.yaml") as file:
        config = yaml.safe_load(file)
    assert config["metadata"]["keyspace"]["generator"] == settings["generator"]
    fields = config["metadata"]["keyspace"]
    assert {fields["cluster"], fields["condition"], *fields["segments"].values()} <= set(docs[0])


def test_a_new_process_makes_the_same_documents() -> None:
    code = "from lmms_keyspace.tasks import documents as d; print(d.generator_tag(d.build_documents(300)))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert out.stdout.strip() == documents.generator_tag(WORD_DOCS)


def test_a_changed_generator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    with open(f"{FOLDER}/textbias_probe_quick.jsonl") as file:
        settings = datasets.Dataset.from_list([json.loads(file.read())])
    assert documents.process_docs(settings).num_rows == 288
    monkeypatch.setitem(scenes.PLURALS, "circle", "discs")
    with pytest.raises(InputError, match="the generator changed"):
        documents.process_docs(settings)


def test_pictures() -> None:
    group = groups_of(WORD_DOCS)[3]
    pictures = {name: documents.doc_to_visual(doc) for name, doc in group.items()}
    assert pictures["text_only_conflict"] == []
    assert {(picture.size, picture.mode) for (picture, *_) in filter(None, pictures.values())} == {
        ((scenes.CANVAS, scenes.CANVAS), "RGB")
    }
    pictures["clean"][0].putpixel((0, 0), (1, 2, 3))  # a model that draws on its input spoils no other document
    assert documents.doc_to_visual(group["conflict"])[0].tobytes() == pictures["match"][0].tobytes()


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"n_groups": 0}, "groups"),
        ({"n_groups": 1, "answer": "essay"}, "answer"),
        ({"n_groups": 1, "space": "x"}, "space"),
    ],
)
def test_bad_input(arguments: dict, argument: str) -> None:
    with pytest.raises(InputError, match=f"^{argument}="):
        documents.build_documents(**arguments)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, lmms_keyspace.tasks.aggregation, lmms_keyspace.tasks.scoring, lmms_keyspace.tasks.documents;"
        "print({'torch', 'lmms_eval', 'datasets'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_guide_shows_a_real_group_and_names_every_metric() -> None:
    with open(os.path.join(os.path.dirname(__file__), "..", "..", "docs", "probes.md")) as file:
        guide = file.read()
    (group,) = [group for group in groups_of(WORD_DOCS) if group["clean"]["group_id"] == "size-000"]
    for condition, doc in group.items():
        (line,) = [
            line for line in guide.split("## The other probes")[0].splitlines() if line.startswith(f"| `{condition}` |")
        ]
        assert line.endswith(f"| {doc['prompt'].splitlines()[0]} |")
        assert {"scene": "the scene", "none": "none", "blank": "plain gray"}[doc["image"]] in line
    named = set(re.findall(r"`(\w+)`", guide))
    for probe in reported.PROBES.values():
        families = {f"{name}_{family}" for name in ("clean_acc", "valid") for family in probe.families}
        assert {*probe.intervals, *probe.facts, reported.NOT_VALID_FOR} - families <= named
