"""What training reads: rows of the known forms, images that do not open, and which tokens are learned."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from models import family_model, family_processor, placeholder
from PIL import Image, ImageFile
from transformers import AutoProcessor

from lmms_keyspace import embedded, scenes
from lmms_keyspace.embedded.architecture import EOS_ID, IMAGE_ID, IMAGE_TOKENS
from lmms_keyspace.errors import InputError
from lmms_keyspace.malora import visual_token_ids
from lmms_keyspace.training.config import DataSettings, SceneSettings
from lmms_keyspace.training.encoding import IGNORED, Collator, EncodedExamples
from lmms_keyspace.training.examples import Example, Turn, read_examples
from lmms_keyspace.training.scene_examples import scene_examples


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(embedded.base_path())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        scenes.blank().save(tmp_path / f"{name}.png")
    return tmp_path


def picture() -> Image.Image:
    return scenes.blank()


def learned(item: dict[str, torch.Tensor], processor) -> str:
    return processor.tokenizer.decode(item["labels"][item["labels"] != IGNORED])


LLAVA = {
    "id": "7",
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat color is it?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "What shape is it?"},
        {"from": "gpt", "value": "a circle"},
    ],
}


def test_llava_json_is_read_as_it_is(folder: Path) -> None:
    (folder / "rows.json").write_text(json.dumps([LLAVA, LLAVA | {"image": "b.png"}]))
    first, _ = read_examples(DataSettings(path=folder / "rows.json"))
    assert [turn.role for turn in first.turns] == ["user", "assistant", "user", "assistant"]
    assert first.images[0]().size == (scenes.CANVAS, scenes.CANVAS)


def test_columns_of_json_lines_and_of_a_data_set(folder: Path) -> None:
    rows = [{"picture": "a.png", "question": "What?", "reply": "red"}, {"question": "Who?", "reply": "me"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = {"image_column": "picture", "answer_column": "reply"}
    shown, plain = read_examples(DataSettings(path=folder / "rows.jsonl", **names))
    assert shown.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "red"))
    assert plain.images == ()
    table = datasets.Dataset.from_dict(
        {"picture": [str(folder / "b.png")], "question": ["What?"], "reply": ["red"]}
    ).cast_column("picture", datasets.Image())
    table.save_to_disk(str(folder / "set"))
    (loaded,) = read_examples(DataSettings(dataset=str(folder / "set"), **names))
    assert loaded.turns == shown.turns
    assert loaded.images[0]().size == (scenes.CANVAS, scenes.CANVAS)


def test_an_image_that_does_not_open_is_named_and_skipped_only_when_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as it is once lmms-eval was imported
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    rows = [LLAVA, LLAVA | {"image": "broken.png"}, LLAVA | {"image": "absent.png"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"rows\.json row 1"):
        read_examples(DataSettings(path=folder / "rows.json"))
    kept = read_examples(DataSettings(path=folder / "rows.json", bad_images="skip"))
    assert [example.name for example in kept] == ["rows.json row 0"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.png", "text": "?"}, "conversations"),
        ({"question": "What? <image>", "answer": "red"}, "one mark for every image"),
        ({"conversations": [{"from": "human", "value": "What?"}]}, "end with an answer"),
        ({"conversations": [{"from": "robot", "value": "What?"}]}, "a turn needs 'from'"),
        ("What?", "an object with names"),
    ],
)
def test_rows_of_no_known_form(folder: Path, row: object, message: str) -> None:
    (folder / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=message) as caught:
        read_examples(DataSettings(path=folder / "rows.jsonl"))
    assert "line 1" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[{]")
    for name in ("rows.json", "absent.json"):
        with pytest.raises(InputError, match=r"data\.path"):
            read_examples(DataSettings(path=tmp_path / name))


def test_only_answers_are_learned(processor) -> None:
    turns = tuple(
        Turn(role, text)
        for role, text in (
            ("user", "<image>\nWhat color is the object?"),
            ("assistant", "red"),
            ("user", "What shape is the object?"),
            ("assistant", "a circle"),
        )
    )
    item = EncodedExamples([Example("one", (picture,), turns)], processor, [IMAGE_ID])[0]
    assert learned(item, processor) == " red a circle</s>"
    assert item["input_ids"][-1] == EOS_ID
    assert (item["labels"][item["labels"] != IGNORED] == item["input_ids"][item["labels"] != IGNORED]).all()


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "gemma3", "idefics3"])
def test_other_architectures(family: str) -> None:
    """Processors that add tokens around images, cut them into tiles, or return one entry per patch."""
    model, processor = family_model(family), family_processor(family)
    processor.chat_template = TEMPLATE.replace("IMAGE", placeholder(family))
    answered = (Turn("assistant", "red"), Turn("user", "What"), Turn("assistant", "circle"))
    pictures = (lambda: scenes.blank().resize((64, 64)),)
    asked = [Turn("user", "<image> What color" + " ?" * i) for i in range(3)]
    examples = [Example("row", pictures, (turn, *answered)) for turn in asked]
    encoded = EncodedExamples(examples, processor, visual_token_ids(model.config))
    rows = [encoded[i] for i in range(3)]
    for row in rows:
        assert learned(row, processor).split()[:2] == ["red", "circle"]
    batch = Collator(processor.tokenizer.pad_token_id)(rows)
    del batch["example_id"]
    together = model(**batch).loss
    alone = [model(**{k: v for k, v in Collator(0)([row]).items() if k != "example_id"}).loss for row in rows]
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("family", "template", "message"),
    [
        # The processor counts for itself from a later transformers on; before, this package does.
        ("qwen2_5_vl", TEMPLATE.replace("IMAGE", ""), "(number of images passed|writes no placeholder)"),
        ("qwen2_5_vl", "{{ raise_exception('no such role') }}", "refuses the row: no such role"),
        ("idefics3", TEMPLATE.replace("IMAGE", ""), "refuses the row"),
        ("gemma3", TEMPLATE.replace("IMAGE", ""), "refuses the row"),
    ],
)
def test_a_row_that_the_processor_or_its_template_refuses_is_named(family: str, template: str, message: str) -> None:
    processor = family_processor(family)
    processor.chat_template = template
    example = Example("row 7", (picture,), (Turn("user", "<image> What color ?"), Turn("assistant", "red")))
    encoded = EncodedExamples([example], processor, visual_token_ids(family_model(family).config))
    with pytest.raises(InputError, match=rf"row 7='1 images.*{message}"):
        encoded[0]


def test_answers_before_a_later_image_are_found(processor) -> None:
    turns = (
        Turn("user", "<image>What color is the object?"),
        Turn("assistant", "red"),
        Turn("user", "And here? <image>"),
        Turn("assistant", "blue"),
    )
    item = EncodedExamples([Example("two", (picture, picture), turns)], processor, [IMAGE_ID])[0]
    assert (item["input_ids"] == IMAGE_ID).sum() == 2 * IMAGE_TOKENS
    assert item["pixel_values"].shape[0] == 2
    assert learned(item, processor) == " red blue</s>"


def test_training_prompts_are_the_prompts_of_evaluation(processor) -> None:
    """Everything before the answer equals what the wrappers feed the model at the same question."""
    example = scene_examples(SceneSettings(n=5, hint=1.0, irrelevant=0.0), 0)[3]
    item = EncodedExamples([example], processor, [IMAGE_ID])[0]
    text = example.turns[0].text.removeprefix("<image>\n")
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked = processor(text=[prompt], images=[[example.images[0]()]], return_tensors="pt")
    start = int((item["labels"] == IGNORED).sum())
    assert item["input_ids"][:start].tolist() == asked["input_ids"][0].tolist()
    assert torch.equal(item["pixel_values"], asked["pixel_values"])


def test_batches_are_padded_on_the_right(processor) -> None:
    examples = scene_examples(SceneSettings(n=10, hint=0.5), 0)
    rows = [EncodedExamples(examples, processor, [IMAGE_ID])[i] for i in range(10)]
    batch = Collator(0)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(set(lengths)) > 1
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["pixel_values"].shape == (10, 3, 48, 48)
    assert batch["example_id"].tolist() == list(range(10))
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_shares_of_hints_change_nothing_else() -> None:
    def texts(**shares: float) -> list[str]:
        return [example.turns[0].text for example in scene_examples(SceneSettings(n=400, **shares), 3)]

    none, true, false = texts(hint=0.0), texts(hint=0.5), texts(hint=0.5, misleading=0.5)
    hinted = [a != b for a, b in zip(none, true, strict=True)]
    assert 150 < sum(hinted) < 250
    changed = [a != b for a, b in zip(true, false, strict=True)]
    assert 60 < sum(changed) < 140
    assert all(h for h, c in zip(hinted, changed, strict=True) if c)
