"""Log-probabilities of continuations against the model's logits of one row at a time, and through the wrapper."""

import math

import pytest
import torch
from evaluation import evaluate, run_of
from lmms_eval.api.instance import Instance
from models import family_model, family_processor, picture, placeholder, save_checkpoint

from lmms_keyspace.model_wrappers.encoding import encode
from lmms_keyspace.model_wrappers.keyspace_vlm import KeyspaceVLM
from lmms_keyspace.model_wrappers.likelihood import Scored, first_distinguishing, joined, score
from lmms_keyspace.records import OPTION_COLUMNS


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "idefics3", "instructblip", "qwen3_5"])
def test_scores_are_sums_of_the_models_log_softmax(family):
    model, processor = family_model(family), family_processor(family)
    image = "" if family == "instructblip" else placeholder(family) + " "
    texts = [f"{image}What is it ?", f"{image}USER: What color is w1 w2 ?", f"{image}w1 is"]
    images = [[picture(number)] for number in range(3)]
    continuations = ["red", "blue circle w4", "\nw5 w6"]
    inputs = encode(processor, list(map(joined, texts, continuations)), images)
    found = score(model, processor.tokenizer, texts, continuations, inputs)
    for text, shown, continuation, scored in zip(texts, images, continuations, found, strict=True):
        words = processor.tokenizer(continuation.strip(), add_special_tokens=False)["input_ids"]
        inputs = processor(text=[f"{text} {continuation.strip()}"], images=[shown], return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -len(words) - 1 : -1].double()
        expected = logits.log_softmax(-1)[range(len(words)), words]
        assert scored.token_ids == tuple(words)
        assert scored.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert scored.logprob == pytest.approx(expected.sum().item(), abs=1e-4)
        assert scored.greedy == (logits.argmax(-1).tolist() == words)


def scored(*pairs):
    return Scored(tuple(token for token, _ in pairs), tuple(value for _, value in pairs), False)


def test_the_first_distinguishing_token_is_the_first_that_not_all_options_share():
    letters = [scored((5, -1.0)), scored((6, -2.0))]
    assert first_distinguishing(letters) == [-1.0, -2.0]
    phrases = [scored((5, -1.0), (7, -3.0), (9, -4.0)), scored((5, -1.0), (8, -0.5))]
    assert first_distinguishing(phrases) == [-3.0, -0.5]
    ends_early = first_distinguishing([scored((5, -1.0)), scored((5, -1.0), (8, -0.5))])
    assert math.isnan(ends_early[0])
    assert ends_early[1] == -0.5
    assert first_distinguishing([scored((5, -1.0))]) == [-1.0]
    assert first_distinguishing([]) == []


@pytest.fixture(scope="module")
def wrapper():
    lm = KeyspaceVLM(capture="off", batch_size=3)
    docs = [{"words": f"What color is the {shape}?", "image": picture(number)} for number, shape in enumerate("abcd")]
    lm.task_dict = {"toy": {"test": docs}}
    return lm


def as_messages(doc):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["words"]}]
    return [{"role": "user", "content": content}]


def instance(kind, *arguments):
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata={"task": "toy", "doc_id": 0, "repeats": 1})


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_a_picture_of_several_continuations_passes_the_vision_tower_once(monkeypatch, tmp_path, family):
    """And they score as with pixels. Those of Idefics3 are not taken apart: its pixels pass each time."""
    lm = KeyspaceVLM(
        pretrained=str(save_checkpoint(family, tmp_path)), capture="off", batch_size=3, dtype="float32", device="cpu"
    )
    lm.task_dict = {"toy": {"test": [{"words": "What is it ?", "image": picture(number)} for number in (1, 2)]}}
    asked = [
        instance("loglikelihood", "", words, as_messages, n, "toy", "test")
        for n in range(2)
        for words in ("red", "blue", "w4 w5", "square")
    ]
    found = lm.loglikelihood(asked)
    encode_images, passed = lm._features._encode, []

    def counting(**kwargs):
        passed.append(len(kwargs["pixel_values"]) if "image_grid_thw" not in kwargs else len(kwargs["image_grid_thw"]))
        return encode_images(**kwargs)

    monkeypatch.setattr(lm._features, "_encode", counting)
    assert lm.loglikelihood(asked) == found
    takes_features = family != "idefics3" and lm._features._needs  # older transformers: none does
    assert sum(passed) == (2 if takes_features else 0)
    monkeypatch.setattr(lm._features, "_needs", set())
    for (value, _), (by_pixels, _) in zip(found, lm.loglikelihood(asked), strict=True):
        assert value == pytest.approx(by_pixels, abs=1e-4)


def test_what_the_model_says_is_its_greedy_continuation(wrapper):
    asked = [instance("generate_until", "", as_messages, {"max_new_tokens": 3}, n, "toy", "test") for n in range(4)]
    said = [result.text for result in wrapper.generate_until(asked)]
    assert all(said)

    def chat(target):
        return [instance("loglikelihood", "", target(n), as_messages, n, "toy", "test") for n in range(4)]

    own = wrapper.loglikelihood(chat(lambda n: said[n]))
    assert all(greedy for _, greedy in own)
    other = wrapper.loglikelihood(chat(lambda n: f"not {said[n]}"))
    assert not any(greedy for _, greedy in other)
    assert all(better > worse for (better, _), (worse, _) in zip(own, other, strict=True))
    assert all(value < 0 for value, _ in own)


def test_simple_requests_ask_the_same(wrapper):
    chat = [instance("loglikelihood", "", "red", as_messages, n, "toy", "test") for n in range(4)]
    simple = [
        instance(
            "loglikelihood",
            wrapper.task_dict["toy"]["test"][n]["words"],
            lambda doc: " red",
            lambda doc: [doc["image"]],
            n,
            "toy",
            "test",
        )
        for n in range(4)
    ]
    assert wrapper.loglikelihood(chat) == wrapper.loglikelihood(simple)
    ((alone, _),) = wrapper.loglikelihood([instance("loglikelihood", "What color is the a?", "red")])
    assert alone != pytest.approx(wrapper.loglikelihood(chat[:1])[0][0])


WITH_OPTIONS = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
task: with_options
test_split: test
output_type: generate_until
doc_to_messages: !function utils.messages
doc_to_visual: !function utils.visual
doc_to_text: words
doc_to_target: gold
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 4, temperature: 0}}
metadata: {{keyspace: {{options: answers}}}}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
OPTION_UTILS = """
def messages(doc, lmms_eval_specific_kwargs=None):
    return [{"role": "user", "content": [{"type": "text", "text": doc["words"]}]}]

def visual(doc):
    return []

def results(doc, results):
    return {"acc": float(results[0] == doc["gold"])}
"""


def test_option_log_probabilities_are_saved(tmp_path):
    documents = [f'{{"words": "What color is w{n}?", "gold": "red", "answers": ["red", "blue"]}}' for n in range(5)]
    (tmp_path / "docs.jsonl").write_text("\n".join(documents))
    (tmp_path / "with_options.yaml").write_text(WITH_OPTIONS.format(folder=tmp_path))
    (tmp_path / "utils.py").write_text(OPTION_UTILS)
    arguments = {"tasks": ["with_options"], "include_path": tmp_path, "batch_size": 2}
    out = tmp_path / "out"
    given = f"capture=off,option_logprobs=on,keys_dir={out}"
    evaluate("keyspace_llava", model_args=given, **arguments)
    table = run_of(out).options
    assert list(table.columns) == list(OPTION_COLUMNS)
    assert table["option"].tolist() == ["red", "blue"] * 5
    assert table["doc_id"].tolist() == [n for n in range(5) for _ in range(2)]
    lm = KeyspaceVLM(capture="off")
    lm.task_dict = {"toy": {"test": [{}]}}
    ((expected, _),) = lm.loglikelihood([instance("loglikelihood", "What color is w3?", "blue")])
    assert table["logprob"][7] == pytest.approx(expected, abs=1e-4)
    assert (table["logprob_first"] >= table["logprob"] - 1e-9).all()


def test_without_the_argument_there_is_no_table(tmp_path):
    evaluate("keyspace_llava", limit=6, batch_size=6, model_args=f"capture=off,keys_dir={tmp_path}")
    assert run_of(tmp_path).options is None
