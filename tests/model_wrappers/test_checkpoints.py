"""The wrapper on checkpoints of several architectures in a folder: tiny random ones, with their own processors."""

import numpy as np
import pytest
from evaluation import answers, evaluate, run_of
from models import save_checkpoint

from lmms_keyspace.records import TEMPLATE

TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
task: toy
test_split: test
output_type: generate_until
doc_to_messages: !function utils.messages
doc_to_visual: !function utils.visual
doc_to_text: words
doc_to_target: gold
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 5, temperature: 0}}
metadata: {{keyspace: {{cluster: group, segments: {{question: words}}}}}}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
import numpy as np
from PIL import Image

def visual(doc):
    pixels = np.random.default_rng(doc["seed"]).integers(0, 255, (doc["height"], 12, 3), dtype=np.uint8)
    return [Image.fromarray(pixels)]

def messages(doc, lmms_eval_specific_kwargs=None):
    image = [{"type": "image", "url": picture} for picture in visual(doc)]
    return [{"role": "user", "content": image + [{"type": "text", "text": doc["words"]}]}]

def results(doc, results):
    return {"acc": float(results[0] == doc["gold"])}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    lines = [
        f'{{"words": "{" ".join(f"w{(5 * n + 7 * step) % 34}" for step in range(3 + n % 3))} ?", "gold": "red", '
        f'"group": "g{n // 2}", "seed": {n}, "height": {8 if n % 2 else 16}}}'
        for n in range(16)
    ]
    (folder / "docs.jsonl").write_text("\n".join(lines))
    (folder / "toy.yaml").write_text(TASK.format(folder=folder))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "idefics3", "instructblip"])
def test_any_cut_gives_the_same_answers_sample_and_keys(family, task, tmp_path):
    save_checkpoint(family, tmp_path / "model")
    runs = {}
    for size in (1, 5):
        out = tmp_path / f"batch{size}"
        given = f"pretrained={tmp_path / 'model'},keep_keys=on,keys_dir={out}"
        results = evaluate(
            "keyspace_vlm", tasks=["toy"], include_path=task, batch_size=size, device="cpu", model_args=given
        )
        runs[size] = answers(results, "toy"), run_of(out)
    (said_1, run_1), (said_5, run_5) = runs.values()
    assert said_1 == said_5
    assert run_1.record.complete
    assert run_1.record.architecture == family
    assert run_1.record.tasks == run_5.record.tasks
    assert {"visual", "text"} < set(run_1.tokens["modality"]) <= {"visual", "text", *TEMPLATE}
    assert run_1.tokens.drop(columns="key_norm").equals(run_5.tokens.drop(columns="key_norm"))
    for name, keys in run_1.keys["toy"].items():
        assert np.abs(keys - run_5.keys["toy"][name]).max() < 1e-4
