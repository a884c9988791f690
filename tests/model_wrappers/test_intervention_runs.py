"""`intervene=` through lmms-eval: what the run says of itself, and which saved runs it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation import answers, evaluate, run_of
from transformers import AutoConfig

from lmms_keyspace import embedded
from lmms_keyspace.errors import InputError
from lmms_keyspace.intervene.install import prepare
from lmms_keyspace.intervene.spec import Spec
from lmms_keyspace.model_wrappers.arguments import parse
from lmms_keyspace.records import RunData

LIMIT = 12


def run(out: Path, arguments: str, task: str = "textbias_probe_quick") -> tuple[dict[str, Any], RunData]:
    out.mkdir(parents=True)
    results = evaluate(
        "keyspace_llava", tasks=[task], limit=LIMIT, batch_size=8, model_args=f"keys_dir={out},{arguments}"
    )
    return results, run_of(out)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the base model on other pictures, with its keys."""
    folder = tmp_path_factory.mktemp("runs") / "reference"
    run(folder, "keep_keys=on", "textbias_probe_heldout")
    return folder


def test_a_shift_is_recorded_and_measured_against_the_base(reference: Path, tmp_path: Path) -> None:
    results, data = run(tmp_path / "shifted", f"keep_keys=on,intervene=mean_shift:{reference}")
    assert data.record.intervention == f"mean_shift from {run_of(reference).record.date}"
    assert data.record.reference == "self"
    table = data.divergence
    chosen = (table["contrast"] == "visual-text") & (table["estimator"] == "mmd2")
    assert set(table[chosen]["bandwidth_source"]) == {"base model, intervention off"}
    assert len(answers(results)) == LIMIT
    # The unchanged keys lie beside the changed ones: visual keys have moved by the means of the other run, text not.
    tokens, keys = data.tokens, data.keys["textbias_probe_quick"]
    visual = (tokens["modality"] == "visual").to_numpy()
    rows = tokens["keys_row"].to_numpy()
    moved = keys["k_pre/0"][rows] - keys["k_pre/0/base"][rows]
    assert abs(moved[~visual]).max() < 1e-5
    other = run_of(reference)
    sides = [
        other.keys["textbias_probe_heldout"]["k_pre/0"][other.tokens["keys_row"][other.tokens["modality"] == side]]
        for side in ("visual", "text")
    ]
    shift = sides[1].mean(0) - sides[0].mean(0)
    assert abs(moved[visual] - shift).max() < 1e-4


def test_statistics_from_the_evaluated_pictures(reference: Path, tmp_path: Path) -> None:
    """Refused; allowed when asked for, and then the run says so."""
    task = "textbias_probe_heldout"
    with pytest.raises(InputError, match="images that are evaluated"):
        run(tmp_path / "refused", f"intervene=mean_shift:{reference},capture=off", task)
    _, data = run(tmp_path / "any", f"intervene=mean_shift:{reference},intervene_documents=any,capture=off", task)
    assert data.record.intervention is not None
    assert "of its images evaluated" in data.record.intervention


def test_a_boost_runs_without_a_saved_run(tmp_path: Path) -> None:
    _, data = run(tmp_path / "boost", "intervene=visual_boost:0.5,capture=off")
    assert data.record.intervention == "visual_boost:0.5"


@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("keep_keys=on", {"capture_settings": {"keep_keys": False}}),
        ("is of another, not of bundled", {"pretrained": "another"}),
        ("other layers or KV heads", {"n_kv_heads": {"0": 99}}),
        ("no keys of the base model", {"adapter": "x", "reference": "none"}),
        ("no keys of the layers", {"layers": [0]}),
    ],
)
def test_runs_that_do_not_fit(reference: Path, tmp_path: Path, says: str, changes: dict[str, Any]) -> None:
    """The record of a good run, changed in one place; found from the model's config alone."""
    folder = tmp_path / "changed"
    shutil.copytree(reference, folder)
    record = next(folder.glob("*_keyspace.json"))
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    config = AutoConfig.from_pretrained(embedded.base_path())
    assert prepare(Spec("mean_shift", str(reference), None), config, "bundled") is not None
    with pytest.raises(InputError, match=says):
        prepare(Spec("mean_shift", str(folder), None), config, "bundled")


def test_a_place_without_a_run(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(embedded.base_path())
    with pytest.raises(InputError, match="no run lies there"):
        prepare(Spec("mean_shift", str(tmp_path / "nowhere"), None), config, "bundled")


@pytest.mark.parametrize(
    ("model", "adapter", "given", "says"),
    [
        ("malora_llava", True, {"intervene": "visual_boost"}, "without an adapter"),
        ("keyspace_llava", False, {"intervene": "visual_boost", "peft": "."}, "without an adapter"),
        ("keyspace_llava", False, {"intervene": "visual_boost", "option_logprobs": "on"}, "token being generated"),
        ("keyspace_llava", False, {"intervene": "boost"}, "choose one of mean_shift:RUN"),
        ("keyspace_llava", False, {"intervene_documents": "some"}, "held_out, any"),
    ],
)
def test_arguments_that_do_not_go_together(model: str, adapter: bool, given: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse(given, model=model, needs_adapter=adapter, has_bundled=True)
