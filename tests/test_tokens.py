"""Labels of prompt tokens: boilerplate against a brute-force count, segments, images, errors."""

from __future__ import annotations

import numpy as np
import pytest
from adapter_models import IMAGE
from hypothesis import given, settings
from hypothesis import strategies as st
from models import expanded, tokenizer

from lmms_keyspace.errors import InputError
from lmms_keyspace.tokens import Labeler, Prompt
from lmms_keyspace.tokens.boilerplate import BOILERPLATE_SHARE, MIN_CLUSTERS

TOKENIZER = tokenizer()


def prompt(number, text, cluster=None, **fields):
    return Prompt("toy", number, f"c{number}" if cluster is None else cluster, "default", text, **fields)


def labeled(labeler, document, image_tokens=4, grids=None):
    """[(word, modality, segment)] with images as one entry."""
    ids = TOKENIZER(document.text)["input_ids"]
    labels = labeler.label(document, expanded(ids, image_tokens), grids)
    words = TOKENIZER.convert_ids_to_tokens(expanded(ids, image_tokens))
    table = list(zip(words, labels.modality.tolist(), labels.segment.tolist(), strict=True))
    return [entry for number, entry in enumerate(table) if entry[0] != "<image>" or table[number - 1][0] != "<image>"]


def words_by(table, modality):
    return [word for word, label, _ in table if label == modality]


def instructed(count, words=3):
    """Documents with a chat template, one image, free words and a fixed instruction."""
    made = []
    for number in range(count):
        question = " ".join(f"w{(5 * number + step * step) % 34}" for step in range(words + number % 3))
        made.append(
            prompt(
                number,
                f"USER: <image> \n {question} ? \n Answer in one word . ASSISTANT:",
                content=(f"{question} ? \n Answer in one word .",),
            )
        )
    return made


def test_template_and_fixed_instructions_are_boilerplate():
    documents = instructed(12)
    labeler = Labeler(TOKENIZER, IMAGE).fit(documents)
    for document in documents:
        table = labeled(labeler, document)
        question = document.content[0].split(" ?")[0].split()
        assert words_by(table, "text") == question
        assert words_by(table, "visual") == ["<image>"]
        assert words_by(table, "bos") == ["<s>"]
        fixed = ["USER:", "\n", "?", "\n", "Answer", "in", "one", "word", ".", "ASSISTANT:"]
        assert words_by(table, "boilerplate") == fixed
        assert {segment for word, label, segment in table if label == "text"} == {"question"}
        assert {segment for word, label, segment in table if label == "boilerplate"} == {"boilerplate"}
    assert labeler.notes == {}


def test_instruction_between_free_words_is_found_from_segment_edges():
    documents = []
    for number in range(10):
        hint = " ".join(f"w{(number + step) % 10}" for step in range(1 + number % 4))
        question = " ".join(f"w{20 + (3 * number + step) % 10}" for step in range(1 + number % 3))
        text = f"USER: {hint} . Answer in one word . {question} it ? ASSISTANT:"
        documents.append(prompt(number, text, segments={"hint": hint, "question": question}))
    labeler = Labeler(TOKENIZER, IMAGE).fit(documents)
    for document in documents:
        table = labeled(labeler, document)
        assert words_by(table, "text") == document.segments["hint"].split() + document.segments["question"].split()
        assert [w for w, _, segment in table if segment == "hint"] == document.segments["hint"].split()
        assert [w for w, _, segment in table if segment == "question"] == document.segments["question"].split()


def test_instruction_after_the_last_of_several_images_is_found():
    documents = []
    for number in range(12):
        shown = " ".join(f"w{(number + step) % 7} <image>" for step in range(1 + number % 3))
        words = " ".join(f"w{10 + (number * step) % 13}" for step in range(1, 2 + number % 4))
        documents.append(prompt(number, f"USER: {shown} Answer in one word . {words} ASSISTANT:"))
    labeler = Labeler(TOKENIZER, IMAGE).fit(documents)
    for document in documents:
        assert {"Answer", "in", "one", "word", "."} <= set(words_by(labeled(labeler, document), "boilerplate"))


def test_fixed_words_inside_a_segment_keep_their_segment():
    documents = [
        prompt(
            number,
            f"USER: Hint says w{number} . w{33 - number} ? ASSISTANT:",
            segments={"hint": f"Hint says w{number} ."},
        )
        for number in range(10)
    ]
    table = labeled(Labeler(TOKENIZER, IMAGE).fit(documents), documents[0])
    assert [entry for entry in table if entry[0] in ("Hint", "says")] == [
        ("Hint", "boilerplate", "hint"),
        ("says", "boilerplate", "hint"),
    ]


@pytest.mark.parametrize(("matching", "expected"), [(17, "text"), (18, "boilerplate")])
def test_ninety_percent_is_the_limit(matching, expected):
    documents = [
        prompt(number, f"USER: {'Answer' if number < matching else 'word'} w{number} ASSISTANT:")
        for number in range(20)
    ]
    labeler = Labeler(TOKENIZER, IMAGE).fit(documents)
    assert labeled(labeler, documents[0])[2][:2] == ("Answer", expected)
    assert labeled(labeler, documents[19])[2][:2] == ("word", "text")


def test_conditions_of_one_question_do_not_make_it_boilerplate():
    documents = []
    for group in range(9):
        copies = 100 if group == 0 else 1  # one question asked under a hundred conditions
        documents += [prompt(len(documents), f"USER: w{group} ASSISTANT:", f"c{group}") for _ in range(copies)]
    labeler = Labeler(TOKENIZER, IMAGE).fit(documents)
    assert words_by(labeled(labeler, documents[0]), "text") == ["w0"]


def test_few_clusters_leave_out_the_template_only_and_say_so():
    documents = instructed(MIN_CLUSTERS - 1)
    labeler = Labeler(TOKENIZER, IMAGE).fit(documents)
    table = labeled(labeler, documents[0])
    assert words_by(table, "text")[-5:] == ["Answer", "in", "one", "word", "."]
    assert words_by(table, "boilerplate") == ["USER:", "\n", "ASSISTANT:"]
    assert "only 7 clusters" in labeler.notes["toy"]


def test_one_text_for_all_documents_stays_text_and_is_noted():
    documents = [
        prompt(number, "USER: <image> \n What is it ? ASSISTANT:", content=("What is it ?",)) for number in range(20)
    ]
    labeler = Labeler(TOKENIZER, IMAGE).fit(documents)
    assert words_by(labeled(labeler, documents[3]), "text") == ["What", "is", "it", "?"]
    assert "the same in every document" in labeler.notes["toy"]


def test_a_task_without_words_is_noted():
    labeler = Labeler(TOKENIZER, IMAGE).fit([prompt(number, "<image>") for number in range(9)])
    assert "no prompt has a text token" in labeler.notes["toy"]


def test_words_that_the_template_rewrote_are_noted():
    documents = [prompt(number, f"USER: w{number} ASSISTANT:", content=(f"W{number}",)) for number in range(9)]
    labeler = Labeler(TOKENIZER, IMAGE).fit(documents)
    assert "not found in 9 prompts" in labeler.notes["toy"]


def brute_force_boilerplate(documents):
    """By definition: a set of token indices per document, from counting every anchor and offset."""
    sequences = [TOKENIZER(document.text)["input_ids"] for document in documents]
    clusters = [document.cluster for document in documents]
    weights = [1 / clusters.count(cluster) for cluster in clusters]

    def anchors(ids):
        images = [at for at, token in enumerate(ids) if token == IMAGE]
        found = {"start": 0, "end": len(ids)} | {f"image{number}": at for number, at in enumerate(images[:8])}
        return found | ({"last": images[-1]} if images else {})

    places = [anchors(ids) for ids in sequences]
    result = []
    for ids, own in zip(sequences, places, strict=True):
        fixed = set()
        for at, token in enumerate(ids):
            for name, position in own.items():
                holders = [number for number, there in enumerate(places) if name in there]
                total = sum(weights[number] for number in holders)
                hits = 0.0
                for number in holders:
                    there = places[number][name] + at - position
                    if 0 <= there < len(sequences[number]) and sequences[number][there] == token:
                        hits += weights[number]
                enough = len({clusters[number] for number in holders}) >= MIN_CLUSTERS
                if enough and hits >= BOILERPLATE_SHARE * total - 1e-9:
                    fixed.add(at)
        result.append(fixed)
    return result


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_boilerplate_is_what_brute_force_counts(data):
    word = st.sampled_from(["w0", "w0", "w0", "w0", "w0", "w1", "<image>"])
    texts = data.draw(st.lists(st.lists(word, min_size=1, max_size=6).map(_apart), min_size=8, max_size=14))
    documents = [prompt(n, "USER: " + " ".join(text) + " it", f"c{n % 11}") for n, text in enumerate(texts)]
    expected = brute_force_boilerplate(documents)
    shuffled = data.draw(st.permutations(documents))
    labeler = Labeler(TOKENIZER, IMAGE).fit(shuffled)
    if "toy" in labeler.notes:
        return
    for document, fixed in zip(documents, expected, strict=True):
        ids = TOKENIZER(document.text)["input_ids"]
        modality = labeler.label(document, np.array(ids)).modality
        free = [at for at, token in enumerate(ids) if token not in (IMAGE, *TOKENIZER.all_special_ids)]
        assert [at for at in free if modality[at] == "boilerplate"] == [at for at in free if at in fixed]


def _apart(words):
    """No two images side by side: their placeholders would be one run."""
    return [w for number, w in enumerate(words) if not (w == "<image>" and number and words[number - 1] == "<image>")]


def test_images_are_numbered_and_laid_out():
    document = prompt(0, "USER: w1 <image> w2 <image> ASSISTANT:", image_shas=("a", "b"))
    labeler = Labeler(TOKENIZER, IMAGE).fit([document])
    ids = np.array(TOKENIZER(document.text)["input_ids"])
    ids = np.repeat(ids, np.where(ids == IMAGE, np.cumsum(ids == IMAGE) * 2, 1))  # 2 and 4 tokens
    labels = labeler.label(document, ids, [(1, 2), (2, 2)])
    assert labels.image_index.tolist() == [-1, -1, -1, 0, 0, -1, 1, 1, 1, 1, -1]
    assert labels.grid_row.tolist() == [-1, -1, -1, 0, 0, -1, 0, 0, 1, 1, -1]
    assert labels.grid_column.tolist() == [-1, -1, -1, 0, 1, -1, 0, 1, 0, 1, -1]
    assert labels.counts() == {"bos": 1, "text": 4, "visual": 6}
    unknown = labeler.label(document, ids)
    assert unknown.image_index.tolist() == labels.image_index.tolist()
    assert (unknown.grid_row == -1).all()


def test_images_side_by_side():
    document = prompt(0, "USER: <image><image> w1", image_shas=("a", "b"))
    labeler = Labeler(TOKENIZER, IMAGE).fit([document])
    ids = expanded([1, 5, IMAGE, TOKENIZER.convert_tokens_to_ids("w1")], 6)
    labels = labeler.label(document, ids, [(1, 2), (2, 2)])
    assert labels.image_index.tolist() == [-1, -1, 0, 0, 1, 1, 1, 1, -1]
    assert labeler.label(document, ids).image_index.tolist() == [-1, -1, 0, 0, 0, 0, 0, 0, -1]
    with pytest.raises(InputError, match=r"toy document 0.*do not make the 6 image tokens"):
        labeler.label(document, ids, [(1, 2), (1, 2)])
    with pytest.raises(InputError, match="1 grids for 2 images"):
        labeler.label(document, ids, [(1, 2)])


def test_a_short_segment_is_not_taken_from_inside_a_longer_one():
    segments = {"question": "What color is it ?", "options": "it"}
    document = prompt(0, "USER: What color is it ? it ASSISTANT:", segments=segments)
    table = labeled(Labeler(TOKENIZER, IMAGE).fit([document]), document)
    assert [segment for _, _, segment in table[2:8]] == ["question"] * 5 + ["options"]


def test_an_empty_segment_is_absent():
    document = prompt(0, "USER: What ?", segments={"hint": "", "question": "What ?"})
    table = labeled(Labeler(TOKENIZER, IMAGE).fit([document]), document)
    assert {segment for _, _, segment in table} == {"special", "question"}


def test_special_tokens_are_not_text():
    document = prompt(0, "USER: w1 </s> w2")
    table = labeled(Labeler(TOKENIZER, IMAGE).fit([document]), document)
    assert table[3] == ("</s>", "special", "special")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segments": {"hint": "says red"}}, r"segments.hint='says red': .*toy document 7"),
        ({"segments": {"caption": "What"}}, "segments='caption'"),
        ({"image_shas": ("a",)}, "toy document 7.*1 images were named and the text has 0"),
    ],
)
def test_prompts_that_contradict_themselves_are_errors(fields, message):
    with pytest.raises(InputError, match=message):
        Labeler(TOKENIZER, IMAGE).fit([prompt(7, "USER: What ?", **fields)])


def test_ids_of_another_text_are_an_error():
    document = prompt(7, "USER: What <image> ?")
    labeler = Labeler(TOKENIZER, IMAGE).fit([document])
    ids = expanded(TOKENIZER(document.text)["input_ids"], 3)
    with pytest.raises(InputError, match=r"toy document 7.*token 9, not 7"):
        labeler.label(document, np.where(ids == 7, 9, ids))
    with pytest.raises(InputError, match=r"toy document 7.*2 tokens, not 3"):
        labeler.label(document, ids[:-1])
    with pytest.raises(InputError, match="were not fitted"):
        labeler.label(Prompt("other", 0, "c", "default", "What"), ids)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="tokenizer='Slow'"):
        Labeler(Slow(), IMAGE)


def expanded_as(document, replaced):
    """Ids of a prompt as a processor makes them that writes these tokens for an image."""
    ids = TOKENIZER(document.text)["input_ids"]
    return np.concatenate([replaced if token == IMAGE else [token] for token in ids])


START, END, BREAK, LINE = 2, 4, 0, TOKENIZER.convert_tokens_to_ids("\n")  # special tokens and a line break


@pytest.mark.parametrize(
    ("replaced", "visual"),
    [
        ([START, IMAGE, IMAGE, END], 2),
        ([LINE, LINE, START, IMAGE, IMAGE, IMAGE, END, LINE], 3),  # white space around it
        ([IMAGE, IMAGE, BREAK, IMAGE, IMAGE, END], 4),  # a break after each row
        ([START, BREAK, IMAGE, START, BREAK, IMAGE, LINE, LINE, START, IMAGE, START], 3),  # tiles
    ],
)
@pytest.mark.parametrize(
    "text", ["USER: \n <image> \n w1", "<image> w1", "USER: w1 <image>", "w1 <image> \n w2 <image> w3"]
)
def test_what_a_processor_writes_around_an_image_is_special(text, replaced, visual):
    document = prompt(0, text)
    labeler = Labeler(TOKENIZER, IMAGE).fit([document])
    ids = expanded_as(document, replaced)
    plain = labeler.label(document, expanded(TOKENIZER(text)["input_ids"], 1))
    labels = labeler.label(document, ids)
    images = text.count("<image>")
    counts = labels.counts()
    assert counts["visual"] == visual * images
    assert (labels.modality[ids == IMAGE] == "visual").all()
    words = np.isin(ids, [IMAGE, START, END, BREAK, LINE], invert=True)
    assert (labels.modality[words] != "special").all()
    assert counts["text"] <= plain.counts()["text"]
    assert counts["text"] >= plain.counts()["text"] - text.count("\n")
    assert set(labels.image_index[ids == IMAGE]) == set(range(images))


def test_another_placeholder_in_the_text():
    document = prompt(0, "USER: </s> w1")
    labeler = Labeler(TOKENIZER, IMAGE, placeholder_id=START).fit([document])
    word = TOKENIZER.convert_tokens_to_ids("w1")
    labels = labeler.label(document, np.array([1, 5, LINE, START, IMAGE, IMAGE, END, word]))
    assert labels.modality.tolist() == ["bos", "text", "special", "special", "visual", "visual", "special", "text"]


def test_an_image_that_the_processor_puts_in_front():
    document = prompt(0, "USER: w1", image_shas=())
    labeler = Labeler(TOKENIZER, IMAGE).fit([document])
    labels = labeler.label(document, np.array([IMAGE, IMAGE, 1, 5, TOKENIZER.convert_tokens_to_ids("w1")]))
    assert labels.modality.tolist() == ["visual", "visual", "bos", "text", "text"]
    assert labels.image_index.tolist() == [0, 0, -1, -1, -1]


@pytest.mark.parametrize("ids", [[1, 5, IMAGE, 53], [1, 5, 53], [1, 5, LINE, LINE, 53]])
def test_an_image_or_a_line_break_too_many_or_too_few_is_an_error(ids):
    document = prompt(7, "USER: \n w1" if IMAGE in ids or LINE in ids else "USER: <image> w1")
    ids = [TOKENIZER.convert_tokens_to_ids("w1") if token == 53 else token for token in ids]
    labeler = Labeler(TOKENIZER, IMAGE).fit([document])
    with pytest.raises(InputError, match="toy document 7"):
        labeler.label(document, np.array(ids))
