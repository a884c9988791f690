"""Weights in 8 and 4 bits by bitsandbytes, which is an extra: the tests that need it say so where it is missing."""

import pytest
import torch
from evaluation import evaluate, run_of
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_bitsandbytes_available

from lmms_keyspace import embedded
from lmms_keyspace.errors import InputError
from lmms_keyspace.model_wrappers import loading

needs_bitsandbytes = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="bitsandbytes is not installed: pip install 'lmms-keyspace[quantization]'"
)


def test_without_bitsandbytes_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match=r"quantization='4bit'.*pip install 'lmms-keyspace\[quantization\]'"):
        evaluate("keyspace_llava", limit=6, model_args="quantization=4bit")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A random model of the bundled one's kind: on the CPU, 4 bits need widths that are multiples of 64."""
    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.from_pretrained(embedded.base_path())
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = 128, 256, 2
        part.num_attention_heads = 4
    config.text_config.num_key_value_heads, config.text_config.head_dim = 2, 32
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(embedded.base_path()).save_pretrained(folder)
    return folder


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_model_is_captured_and_recorded(wide, tmp_path, quantization):
    given = f"pretrained={wide},quantization={quantization},keys_dir={tmp_path},capture_clusters=4"
    evaluate("keyspace_llava", limit=12, batch_size=4, model_args=given, gen_kwargs="max_new_tokens=2")
    run = run_of(tmp_path)
    assert run.record.complete
    assert (run.record.quantization, run.record.dtype) == (quantization, "float32")
    assert (run.tokens["key_norm"] > 0).all()


@needs_bitsandbytes
def test_a_checkpoint_that_is_quantized_is_not_quantized_again(wide, tmp_path):
    from transformers import BitsAndBytesConfig

    stored = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForImageTextToText.from_pretrained(wide, quantization_config=stored).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="quantized already"):
        evaluate("keyspace_llava", limit=6, model_args=f"pretrained={tmp_path},quantization=8bit")
