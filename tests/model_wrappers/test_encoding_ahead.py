"""The next batch is encoded while the model answers: the same inputs, and errors where they belong."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from lmms_eval.protocol import ChatMessages
from models import family_processor
from PIL import Image

from lmms_keyspace.model_wrappers.encoding import encode
from lmms_keyspace.model_wrappers.encoding_ahead import EncodingAhead
from lmms_keyspace.model_wrappers.pictures import Pictures


class Asked(SimpleNamespace):
    """A request that counts how often its image is asked for, and by which thread."""

    def images(self):
        self.readers.append(threading.current_thread().name)
        if self.broken:
            raise OSError("cannot identify image file")
        return list(self.messages.extract_media()[0])


def asked(numbers: list[int], broken: bool = False) -> list[Asked]:
    pictures, made = Pictures(), []
    for number in numbers:
        image = {"type": "image", "url": Image.new("RGB", (9, 9), (number, 0, 0))}
        messages = ChatMessages(messages=[{"role": "user", "content": [image]}])
        shown, _ = pictures.read(messages)
        text = "<image> USER: What is it ?" + " red" * number
        made.append(Asked(messages=messages, text=text, shown=shown, pictures=pictures, readers=[], broken=broken))
    return made


@pytest.fixture
def processor():
    made = family_processor("llava")
    made.tokenizer.padding_side = "left"
    return made


def assert_same(found, processor, requests):
    assert [len(row) for row in found.images] == [1] * len(requests)
    expected = encode(processor, [one.text for one in requests], [one.images() for one in requests])
    assert set(found.inputs) == set(expected)
    assert all(torch.equal(found.inputs[name], values) for name, values in expected.items())


def test_batches_are_those_of_the_processor_begun_or_not(processor):
    requests = asked([1, 2, 1, 3, 2, 1])
    batches, encoding = [requests[:2], requests[2:4], requests[4:]], EncodingAhead(processor)
    for number, batch in enumerate(batches):
        found = encoding.take(batch)
        if number + 1 < len(batches):
            encoding.begin(batches[number + 1])
        assert_same(found, processor, batch)
    assert requests[0].readers[0] == "MainThread"  # nothing was begun before
    assert all(one.readers[0].startswith("encoding") for one in requests[2:])


def test_parts_of_a_batch_that_was_begun_whole_are_encoded_again(processor):
    requests, encoding = asked([1, 2, 1, 2]), EncodingAhead(processor)
    encoding.begin(requests)
    assert_same(encoding.take(requests[:2]), processor, requests[:2])
    encoding.begin(requests[2:])
    assert_same(encoding.take(requests[2:]), processor, requests[2:])


def test_what_was_begun_twice_is_encoded_once(processor):
    requests, encoding = asked([1, 2]), EncodingAhead(processor)
    encoding.begin(requests)
    encoding.begin(requests)
    encoding.take(requests)
    assert [len(one.readers) for one in requests] == [1, 1]


def test_an_error_is_raised_where_its_batch_is_taken(processor):
    good, bad, encoding = asked([1]), asked([2], broken=True), EncodingAhead(processor)
    encoding.begin(bad)
    assert_same(encoding.take(good), processor, good)
    with pytest.raises(OSError, match="cannot identify image file"):
        encoding.take(bad)
    assert_same(encoding.take(good), processor, good)
