"""A document that names an image which it does not hold is asked without it."""

from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from lmms_eval.tasks.mmmu.utils import mmmu_doc_to_messages
from PIL import Image

from lmms_keyspace.model_wrappers.absent_images import messages_of

FEATURES = datasets.Features(
    {
        **dict.fromkeys(("question", "options", "question_type"), datasets.Value("string")),
        **dict.fromkeys(("image_1", "image_2"), datasets.Image()),
    }
)
DATASET = SimpleNamespace(features=FEATURES)
PROMPTS = {"multiple_choice_prompt": "", "open_ended_prompt": "", "prompt_type": "format"}


def row(**images: Image.Image) -> dict[str, Any]:
    question = "Compare <image 1> with <image 2>."
    absent = {"image_1": None, "image_2": None}
    return {"question": question, "options": "[]", "question_type": "open"} | absent | images


def ask(document: Any) -> Any:
    return mmmu_doc_to_messages(document, PROMPTS)


def picture(color: str) -> Image.Image:
    return Image.new("RGB", (4, 4), color)


def test_the_stock_task_is_asked_with_the_images_that_are_there():
    second = picture("blue")
    messages, absent = messages_of(row(image_2=second), DATASET, ask)
    assert absent == 1
    assert [image.getpixel((0, 0)) for image in messages.extract_media()[0]] == [(0, 0, 255)]
    words = [part.text for part in messages.messages[0].content if part.type == "text"]
    assert words == ["Compare", "with", "."]


def test_a_whole_document_is_read_as_the_task_writes_it():
    document = row(image_1=picture("red"), image_2=picture("blue"))
    messages, absent = messages_of(document, DATASET, ask)
    assert absent == 0
    assert [part.type for part in messages.messages[0].content] == ["text", "image", "text", "image", "text"]


@pytest.mark.parametrize("dataset", [[], SimpleNamespace(features=None), DATASET])
def test_any_other_error_of_the_tasks_code_is_its_own(dataset):
    def broken(document: Any) -> Any:
        return document["question"].no_such_method()

    with pytest.raises(AttributeError, match="no_such_method"):
        messages_of(row(image_1=picture("red")), dataset, broken)


def test_a_column_of_words_that_is_empty_stands_for_no_image():
    def broken(document: Any) -> Any:
        return document["options"].convert("RGB")

    whole = row(image_1=picture("red"), image_2=picture("blue")) | {"options": None}
    with pytest.raises(AttributeError, match="convert"):
        messages_of(whole, DATASET, broken)
    with pytest.raises(AttributeError, match="convert"):  # an empty image beside it does not hide it
        messages_of(whole | {"image_1": None}, DATASET, broken)
