"""Settings that are refused, and the memory that is forecast."""

from __future__ import annotations

import pytest
import torch
from toy_captures import LAYERS, llava_inputs, run, tiny_llava

from lmms_keyspace.capture import Capture
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import decoder_sites


def test_memory_estimate_is_what_is_held(adapted, rows):
    spaces = ("k_pre", "q")
    full = [row for row in rows if row.positions.size == 9]  # visual, text and template
    assert len(full) >= 4
    capture, _ = run(adapted, full, spaces=spaces)
    with capture.reference_batch(full), torch.inference_mode():
        adapted(**llava_inputs(full))
    held = sum(
        capture.keys("toy", space=space, layer=layer, reference=reference)[0].nbytes
        for space in spaces
        for layer in capture.layers
        for reference in (False, True)
    )
    documents = len(full)
    tables = [capture.token_table(), capture.attention_table()]
    held += sum(int(table.memory_usage(deep=True).sum()) for table in tables)
    estimate = capture.memory_estimate(9 * documents, selected=documents, documents=documents, reference=True)
    assert held < estimate < 3 * held  # tables take up to twice as much while they are made
    more = capture.memory_estimate(9 * documents, selected=documents, documents=100 + documents, reference=True)
    assert 100 * len(LAYERS) * 150 < more - estimate < 100 * len(LAYERS) * 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spaces": ("k_pre", "keys")}, "spaces='keys'"),
        ({"layers": [0, 9]}, "layers=9"),
        ({"layers": []}, r"layers=\[\]"),
    ],
)
def test_unknown_settings_are_refused(llava, settings, message):
    with pytest.raises(InputError, match=message):
        Capture(llava, decoder_sites(llava), **settings)


def test_compiled_models_and_unreadable_attention_are_refused():
    model = tiny_llava()
    decoder = decoder_sites(model)
    model.compile()
    with pytest.raises(InputError, match="compiled"):
        Capture(model, decoder)
    flex = tiny_llava("flex_attention")
    with pytest.raises(InputError, match="attn_implementation='flex_attention'"):
        Capture(flex, decoder_sites(flex))
