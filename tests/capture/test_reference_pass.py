"""The second pass, with the base model."""

from __future__ import annotations

import pytest
import torch
from toy_captures import LAYERS, llava_inputs, of_all_heads, run

from lmms_keyspace.capture import Capture, CaptureError
from lmms_keyspace.errors import InputError
from lmms_keyspace.families import decoder_sites


def test_reference_is_the_base_model_at_the_same_tokens(llava, adapted, rows):
    base, _ = run(llava, rows)
    capture, _ = run(adapted, rows)
    for part in (rows[6:], rows[2:6], rows[:2]):  # another cut and order than the first pass
        with capture.reference_batch(part), torch.inference_mode():
            adapted(**llava_inputs(part))
    for layer in capture.layers:
        reference, clusters = capture.keys("toy", layer=layer, reference=True)
        torch.testing.assert_close(reference, base.keys("toy", layer=layer)[0], atol=1e-5, rtol=0)
        assert clusters == capture.keys("toy", layer=layer)[1]
        assert (capture.keys("toy", layer=layer)[0] - reference).abs().max() > 0.1
    assert len(of_all_heads(capture)) == len(rows) * len(LAYERS)


def test_incomplete_reference_is_an_error(adapted, rows):
    capture, _ = run(adapted, rows)
    with capture.reference_batch(rows[:4]), torch.inference_mode():
        adapted(**llava_inputs(rows[:4]))
    with pytest.raises(CaptureError, match="missed"):
        capture.keys("toy", reference=True)


def test_reference_needs_an_adapter(llava, rows):
    capture = Capture(llava, decoder_sites(llava))
    with pytest.raises(InputError, match="reference='self'"), capture.reference_batch(rows):
        pass
