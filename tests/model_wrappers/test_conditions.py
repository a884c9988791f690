"""Conditions that a chat template makes one prompt of are found; those that differ in picture or words are not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from lmms_keyspace.model_wrappers.conditions import same_prompts
from lmms_keyspace.model_wrappers.prompts import read_requests
from lmms_keyspace.tasks import documents

# As LLaVA-1.5's and as the bundled model's: pictures first, or where the message has them.
PICTURES_FIRST = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
IN_PLACE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


class Processor:
    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages, **kwargs) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template([messages], chat_template=self.chat_template)[0][0]


def requests(template: str, probe: str):
    docs = documents.build_documents(3, probe=probe)
    instance = SimpleNamespace(metadata={"keyspace": {"cluster": "group_id", "condition": "condition"}})
    instances = [
        SimpleNamespace(
            args=("", documents.doc_to_messages, {}, place, "task", "test"), metadata=instance.metadata, doc_id=place
        )
        for place in range(len(docs))
    ]
    return read_requests(instances, {"task": {"test": docs}}, Processor(template))


def test_a_template_that_puts_pictures_first_makes_one_prompt_of_before_and_conflict() -> None:
    assert same_prompts(requests(PICTURES_FIRST, "textbias_order")) == [["before", "conflict"]]
    assert same_prompts(requests(IN_PLACE, "textbias_order")) == []


def test_other_probes_have_no_such_conditions() -> None:
    for probe in ("textbias_probe", "textbias_typographic", "visreliance_probe", "visreliance_pairs", "textbias_rich"):
        assert same_prompts(requests(PICTURES_FIRST, probe)) == []


def test_it_must_hold_in_every_cluster() -> None:
    found = requests(PICTURES_FIRST, "textbias_order")
    changed = [
        replace(request, text="other")
        if (request.cluster, request.condition) == (found[0].cluster, "before")
        else request
        for request in found
    ]
    assert same_prompts(changed) == []
