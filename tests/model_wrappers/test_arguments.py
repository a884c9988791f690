"""Bad model arguments are one clear error, before anything heavy is imported."""

import subprocess
import sys

import pytest

from lmms_keyspace import embedded
from lmms_keyspace.errors import InputError
from lmms_keyspace.model_wrappers.arguments import parse


def keyspace(**given):
    return parse(given, model="keyspace_vlm", needs_adapter=False, has_bundled=True)


def malora(**given):
    return parse(given, model="malora_llava", needs_adapter=True, has_bundled=True)


def test_no_arguments_take_the_bundled_model():
    assert keyspace().pretrained == str(embedded.base_path())
    assert keyspace().peft is None
    assert malora().peft == str(embedded.adapter_path("malora"))


def test_the_bundled_model_takes_another_adapter(tmp_path):
    assert malora(peft=str(tmp_path)).peft == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pretrained": "/no/such/folder"}, "neither a folder nor a hub id"),
        ({"pretrained": "a b"}, "neither a folder nor a hub id"),
        ({"capture_cluster": 5}, "did you mean capture_clusters?"),
        ({"zzz": 5}, "known arguments are pretrained, peft"),
        ({"capture_clusters": -1}, "at least 4"),
        ({"capture_tokens": "many"}, "at least 1"),
        ({"batch_size": "some"}, "at least 1, or auto"),
        ({"batch_size": 0}, "at least 1, or auto"),
        ({"device_map": "cuda:0"}, "choose one of auto"),
        ({"max_pixels": 0}, "at least 1"),
        ({"option_logprobs": "maybe"}, "on or off"),
        ({"capture": "maybe"}, "on or off"),
        ({"spaces": "k_pre+x"}, "join names of k_pre, k_post, q, v"),
        ({"layers": "0+x"}, "join layer numbers"),
        ({"layers": "-1"}, "join layer numbers"),
        ({"dtype": "int8"}, "choose one of float32"),
        ({"attn_implementation": "magic"}, "choose one of sdpa"),
        ({"reference": "other"}, "choose one of self"),
        ({"keys_dir": "/dev/null/x"}, "cannot be written"),
    ],
)
def test_bad_values_name_argument_value_and_way_out(given, says):
    ((name, value),) = given.items()
    with pytest.raises(InputError) as error:
        keyspace(**given)
    assert error.value.argument == name
    assert repr(value) in str(error.value)
    assert says in str(error.value)


def test_a_device_and_a_device_map_exclude_each_other():
    with pytest.raises(InputError, match=r"device='cpu'.*device_map=auto"):
        keyspace(device="cpu", device_map="auto")


def test_malora_with_a_model_needs_an_adapter():
    with pytest.raises(InputError, match="keyspace_vlm"):
        malora(pretrained="llava-hf/llava-1.5-7b-hf")


def test_a_name_without_a_bundled_model_needs_one():
    with pytest.raises(InputError, match="needs a model"):
        parse({}, model="keyspace_qwen2_5_vl", needs_adapter=False, has_bundled=False)


def test_values_as_the_harness_passes_them(tmp_path):
    arguments = keyspace(
        capture="off", spaces="q", layers="2+0+2", batch_size="8", max_batch_size=None, keys_dir=str(tmp_path), seed=3
    )
    assert arguments.capture is False
    assert arguments.spaces == ("k_pre", "q")
    assert arguments.layers == (0, 2)
    assert arguments.batch_size == 8
    assert keyspace(batch_size="auto").batch_size is None
    assert keyspace(option_logprobs="on").option_logprobs is True
    assert keyspace(device_map="auto", min_pixels="64").min_pixels == 64
    assert keyspace(layers="all").layers is None
    assert keyspace(layers=1).layers == (1,)


def test_arguments_are_checked_without_torch():
    code = (
        "import sys; from lmms_keyspace.model_wrappers import arguments; "
        "sys.exit(any(m.split('.')[0] in ('torch', 'transformers') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
