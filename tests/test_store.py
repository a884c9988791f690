"""The store: what is written is read back, and whatever cannot be read is refused by name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lmms_keyspace import records
from lmms_keyspace.errors import InputError
from lmms_keyspace.records import GramKey, HeldOutLoss, KernelSums, RunData, RunRecord, TaskRecord
from lmms_keyspace.store import find_runs, load_run, read_run, read_samples, write_run
from lmms_keyspace.store.files import UNFINISHED, remove_unfinished, require_writable, write

DATE = "20260102_030405"
TASK = "odd/task name"


def frame(columns: dict[str, str], rows: int) -> pd.DataFrame:
    """Rows of distinct values that a column of each declared type can hold."""
    values = {
        "string": [f"text {row} é\u202e" for row in range(rows)],
        "bool": [row % 2 == 0 for row in range(rows)],
        "int32": np.arange(rows, dtype=np.int32),
        "int64": np.arange(rows, dtype=np.int64),
        "float32": np.linspace(0, 1, rows, dtype=np.float32),
        "float64": np.r_[np.linspace(0, 1, rows - 1), np.nan] if rows else np.empty(0),
    }
    return pd.DataFrame({column: values[kind] for column, kind in columns.items()})


def run_record(*, complete: bool = True) -> RunRecord:
    task = TaskRecord(
        documents=4,
        clusters=2,
        clusters_selected=2,
        rows_selected=4,
        rows_captured=4,
        conditions=["clean"],
        cluster_field="group_id",
        generator="1.0:abc",
        token_counts={"visual": 8},
        image_tokens={"16": 4},
        prompt_hash="f" * 64,
    )
    return RunRecord(
        date=DATE,
        model="keyspace_vlm",
        pretrained="some/model",
        revision=None,
        architecture="LlavaForConditionalGeneration",
        connector="mlp",
        adapter=None,
        adapter_method=None,
        adapter_sha256=None,
        intervention=None,
        reference="none",
        capture=True,
        capture_settings={"clusters": 128},
        seed=0,
        versions={"torch": "2"},
        device="cpu",
        dtype="float32",
        attn_implementation="sdpa",
        quantization=None,
        batch_size=8,
        processor_hash="0",
        layers=[0, 1],
        n_kv_heads={0: 2, 1: 2},
        bandwidths={TASK: {"k_pre": {0: [1.5, 2.5]}}},
        tasks={TASK: task},
        complete=complete,
    )


def run_data(*, complete: bool = True, options: bool = True) -> RunData:
    rng = np.random.default_rng(0)
    sums = {
        GramKey(TASK, condition, "k_pre", layer): KernelSums(
            vv=rng.random((2, 3, 3)),
            tt=rng.random((2, 3, 3)),
            vt=rng.random((2, 3, 3)),
            n_visual=np.array([4, 4, 4]),
            n_text=np.array([3, 2, 1]),
            clusters=("a", "b/c", "é"),
        )
        for condition in ("clean", "in/between")
        for layer in (0, 1)
    }
    losses = {
        replace(key, contrast="text-text:other/task"): HeldOutLoss(
            *rng.random((3, 2, 3)), np.array([4, 4, 4]), np.array([3, 2, 1]), ("a", "b/c", "é")
        )
        for key in sums
    }
    tokens = frame(records.TOKEN_COLUMNS, 3).assign(task=TASK)
    return RunData(
        record=run_record(complete=complete),
        gram=sums,
        divergence=frame(records.DIVERGENCE_COLUMNS, 5),
        attention=frame(records.ATTENTION_COLUMNS, 4),
        tokens=tokens,
        keys={TASK: {"k_pre/0": rng.random((3, 2, 4)).astype(np.float32), "k_pre/0/base": np.ones((3, 2, 4))}},
        options=frame(records.OPTION_COLUMNS, 2) if options else None,
        losses=losses,
    )


def write_harness_files(folder: Path, date: str = DATE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{date}_results.json").write_text(json.dumps({"results": {"t": {"acc": 1.0}}}))
    (folder / f"{date}_samples_some_task.jsonl").write_text('{"doc_id": 0, "score": NaN}\n{"doc_id": 1, "score": 1}\n')


def test_round_trip(tmp_path):
    data = run_data()
    written = write_run(tmp_path, DATE, data)
    assert written[-1].name == f"{DATE}_keyspace.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)

    read = read_run(tmp_path, DATE)
    assert read.record.model_copy(update={"files": {}}) == data.record
    assert {f"{DATE}_{name}" for name in read.record.files} == {path.name for path in written[:-1]}
    assert set(read.gram) == set(data.gram)
    for key, sums in data.gram.items():
        back = read.gram[key]
        assert back.clusters == sums.clusters
        for name in ("vv", "tt", "vt"):
            assert getattr(back, name).dtype == np.float64
            np.testing.assert_allclose(getattr(back, name), getattr(sums, name), rtol=6e-8)
        np.testing.assert_array_equal(back.n_visual, sums.n_visual)
        np.testing.assert_array_equal(back.n_text, sums.n_text)
    assert set(read.losses) == set(data.losses)
    for key, loss in data.losses.items():
        assert read.losses[key].clusters == loss.clusters
        for name in ("loss_visual", "loss_text", "n_visual", "n_text"):
            np.testing.assert_allclose(getattr(read.losses[key], name), getattr(loss, name), rtol=6e-8)
    for name in ("divergence", "attention", "tokens", "options"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(data, name), check_dtype=False)
    assert set(read.keys) == {TASK}
    assert set(read.keys[TASK]) == {"k_pre/0", "k_pre/0/base"}
    np.testing.assert_array_equal(read.keys[TASK]["k_pre/0"], data.keys[TASK]["k_pre/0"])
    assert read.keys[TASK]["k_pre/0/base"].dtype == np.float32


def test_a_run_that_captured_nothing_round_trips(tmp_path):
    empty = {
        name: pd.DataFrame(columns=list(columns))
        for name, columns in {
            "divergence": records.DIVERGENCE_COLUMNS,
            "attention": records.ATTENTION_COLUMNS,
            "tokens": records.TOKEN_COLUMNS,
        }.items()
    }
    write_run(tmp_path, DATE, RunData(record=run_record(), gram={}, keys={}, **empty))
    read = read_run(tmp_path, DATE)
    assert read.options is None
    assert len(read.gram) == len(read.keys) == len(read.tokens) == 0


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda table: table.drop(columns="layer"), ["attention", "layer"]),
        (lambda table: table.assign(surplus=1), ["attention", "surplus"]),
        (lambda table: table.assign(layer=table["layer"].astype(float)), ["attention.layer", "float64", "int32"]),
        (lambda table: table.assign(mass_image="much"), ["attention.mass_image", "float32"]),
        (lambda table: table.assign(layer=2**40), ["attention.layer", "int32"]),
        (lambda table: table.assign(condition=[1, "a", "b", "c"]), ["attention.condition", "string"]),
    ],
)
def test_tables_hold_exactly_the_declared_columns(tmp_path, change, names):
    data = run_data()
    with pytest.raises(InputError) as error:
        write_run(tmp_path, DATE, replace(data, attention=change(data.attention)))
    assert all(name in str(error.value) for name in names)
    assert list(tmp_path.iterdir()) == []


def test_kernel_sums_of_a_condition_must_agree_about_their_clusters(tmp_path):
    data = run_data()
    key, sums = next(iter(data.gram.items()))
    gram = {**data.gram, key: replace(sums, n_text=sums.n_text + 1)}
    with pytest.raises(InputError, match="same in every layer"):
        write_run(tmp_path, DATE, replace(data, gram=gram))


def test_a_write_that_fails_leaves_no_file_and_no_claim_to_be_whole(tmp_path, monkeypatch):
    def full_disk(source, target):
        if str(target).endswith("_tokens.parquet"):
            raise OSError(errno.ENOSPC, "no space left on device")
        return rename(source, target)

    rename = os.replace
    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(InputError, match=rf"folder='{tmp_path}': .*_tokens.parquet cannot be written \(no space"):
        write_run(tmp_path, DATE, run_data())
    assert not any("tokens" in path.name or "keyspace" in path.name for path in tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from lmms_keyspace.store.files import write

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL if sys.argv[2] == "killed" else signal.SIGSTOP)

os.replace = die
write(Path(sys.argv[1]), b"the second")
"""


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_what_a_killed_write_left_is_removed_and_what_another_process_writes_is_not(tmp_path, how):
    path, link, pipe = tmp_path / "one", tmp_path / f".link{UNFINISHED}", tmp_path / f".pipe{UNFINISHED}"
    write(path, b"the first")
    link.symlink_to(path)
    os.mkfifo(pipe)
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(path), how])
    os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    (left,) = set(tmp_path.iterdir()) - {path, link, pipe}
    assert left.name.startswith(".one.")
    require_writable("out", tmp_path)
    assert path.read_bytes() == b"the first"
    assert set(tmp_path.iterdir()) == {path, link, pipe, *([left] if how == "stopped" else [])}
    if how == "stopped":
        assert left.read_bytes() == b"the second"
        writer.kill()
    writer.wait()


def test_a_file_that_is_taken_for_one_left_behind_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    def taken_once(file, operation):
        monkeypatch.undo()
        remove_unfinished(tmp_path)
        assert not any(tmp_path.iterdir())
        fcntl.flock(file, operation)

    monkeypatch.setattr("fcntl.flock", taken_once)
    write(tmp_path / "one", b"all of it")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("one", b"all of it")]


def test_a_file_system_without_locks_keeps_what_is_written_and_what_was_left(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    left = tmp_path / f".one.12345678{UNFINISHED}"
    left.touch()
    monkeypatch.setattr("fcntl.flock", no_locks)
    write(require_writable("out", tmp_path) / "one", b"all of it")
    assert set(tmp_path.iterdir()) == {tmp_path / "one", left}


def test_find_runs_in_any_folder_above_newest_last(tmp_path):
    for model, date in (("b", "20260101_000000"), ("a", "20260103_000000"), ("b", "20260102_000000")):
        write_harness_files(tmp_path / "out" / model, date)
    (tmp_path / "out" / "a" / "mathverse_results.json").write_text("{}")  # a task's own submission file
    write_run(tmp_path / "out" / "b", "20260102_000000", run_data())
    runs = find_runs(tmp_path)
    assert [(run.folder.name, run.date) for run in runs] == [
        ("b", "20260101_000000"),
        ("b", "20260102_000000"),
        ("a", "20260103_000000"),
    ]
    assert [run.date for run in find_runs(tmp_path / "out" / "b")] == ["20260101_000000", "20260102_000000"]
    assert find_runs(runs[1].results) == [runs[1]]
    assert [run.captured for run in runs] == [False, True, False]
    assert set(runs[0].samples) == {"some_task"}


@pytest.mark.parametrize("path", ["", "absent", "file.txt"])
def test_no_run_says_what_was_looked_for(tmp_path, path):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InputError, match=r"<date>_results.json") as error:
        find_runs(tmp_path / path)
    assert str(tmp_path / path) in str(error.value)


def test_load_run(tmp_path):
    write_harness_files(tmp_path)
    (run,) = find_runs(tmp_path)
    stock = load_run(run)
    assert stock.data is None
    assert stock.results["results"]["t"]["acc"] == 1.0
    samples = stock.samples["some_task"]
    assert samples["doc_id"].tolist() == [0, 1]
    assert np.isnan(samples["score"][0])
    write_run(tmp_path, DATE, run_data())
    loaded = load_run(run)
    assert loaded.data is not None
    assert loaded.data.record.complete


def test_an_incomplete_run_is_refused(tmp_path):
    write_harness_files(tmp_path)
    write_run(tmp_path, DATE, run_data(complete=False))
    with pytest.raises(InputError, match="did not end"):
        load_run(find_runs(tmp_path)[0])


@pytest.mark.parametrize(
    "name",
    [
        "gram.safetensors",
        "losses.safetensors",
        "divergence.parquet",
        "keys_odd%2Ftask%20name.safetensors",
        "results.json",
    ],
)
def test_a_missing_file_is_named(tmp_path, name):
    write_harness_files(tmp_path)
    write_run(tmp_path, DATE, run_data())
    (tmp_path / f"{DATE}_{name}").unlink()
    with pytest.raises(InputError, match="incomplete") as error:
        load_run(find_runs(tmp_path)[0])
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["gram.safetensors", "divergence.parquet", "keyspace.json", "results.json"])
def test_a_truncated_file_is_named(tmp_path, name):
    write_harness_files(tmp_path)
    write_run(tmp_path, DATE, run_data())
    path = tmp_path / f"{DATE}_{name}"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="damaged") as error:
        load_run(find_runs(tmp_path)[0])
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["divergence.parquet", "attention.parquet", "options.parquet"])
def test_a_table_of_another_run_is_refused(tmp_path, name):
    """The format holds; the content is not what this run wrote."""
    for date in (DATE, "20260102_000000"):
        data = run_data()
        tables = {key: getattr(data, key).iloc[:-1] for key in ("divergence", "attention", "options")}
        write_run(tmp_path, date, data if date == DATE else replace(data, **tables))
    (tmp_path / f"20260102_000000_{name}").replace(tmp_path / f"{DATE}_{name}")
    with pytest.raises(InputError, match="not what the run wrote") as error:
        read_run(tmp_path, DATE)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["gram", "losses", "keys"])
def test_a_flipped_bit_is_found_when_the_arrays_are_read(tmp_path, name):
    write_run(tmp_path, DATE, run_data())
    (path,) = tmp_path.glob(f"{DATE}_{name}*.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    arrays = getattr(read_run(tmp_path, DATE), name)
    arrays = next(iter(arrays.values())) if name == "keys" else arrays
    with pytest.raises(InputError, match="not what the run wrote"):
        list(arrays.values())


def test_a_header_that_no_run_writes_is_refused(tmp_path):
    write_run(tmp_path, DATE, run_data())
    path = tmp_path / f"{DATE}_gram.safetensors"
    content = path.read_bytes()
    assert content.count(b'"clusters":"{') == 1
    path.write_bytes(content.replace(b'"clusters":"{', b'"clusters":"['))
    with pytest.raises(InputError, match="header"):
        read_run(tmp_path, DATE)


@pytest.mark.parametrize(("name", "array"), [("gram", "vt"), ("losses", "fit_influence")])
def test_an_entry_without_one_of_its_arrays_is_refused_when_the_run_is_opened(tmp_path, name, array):
    """As runs had them that were made before the losses' influence on the fits was saved."""
    write_run(tmp_path, DATE, run_data())
    path = tmp_path / f"{DATE}_{name}.safetensors"
    with safe_open(path, framework="np") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file({key: values for key, values in tensors.items() if not key.endswith(f"/{array}")}, path, metadata)
    with pytest.raises(InputError, match=f"without {array}.*run"):
        read_run(tmp_path, DATE)


def test_a_run_that_died_while_it_was_written_is_no_run_without_keys(tmp_path):
    write_harness_files(tmp_path)
    write_run(tmp_path, DATE, run_data())
    (tmp_path / f"{DATE}_keyspace.json").unlink()
    with pytest.raises(InputError, match="incomplete"):
        load_run(find_runs(tmp_path)[0])


def test_a_run_that_died_before_its_files_were_written_is_no_run_without_keys(tmp_path):
    write_harness_files(tmp_path)
    (tmp_path / f"{DATE}_results.json").write_text('{"results": {}, "keyspace": {}}')
    with pytest.raises(InputError, match="incomplete"):
        load_run(find_runs(tmp_path)[0])


@pytest.mark.parametrize("left", [None, 0, 1, 2])
def test_samples_that_were_not_all_saved(tmp_path, left):
    """lmms-eval adds a line for a document; what it leaves when it is killed ends with a whole line."""
    write_harness_files(tmp_path)
    lines = [json.dumps({"doc_id": number, "doc_hash": f"hash {number}"}) + "\n" for number in range(2)]
    sha256 = hashlib.sha256(b"sample_0hash 0sample_1hash 1").hexdigest()
    (tmp_path / f"{DATE}_results.json").write_text(json.dumps({"task_hashes": {"some_task": sha256}}))
    path = tmp_path / f"{DATE}_samples_some_task.jsonl"
    path.unlink()
    if left is not None:
        path.write_text("".join(lines[:left]))
    if left == len(lines):
        assert load_run(find_runs(tmp_path)[0]).samples["some_task"]["doc_id"].tolist() == [0, 1]
        return
    with pytest.raises(InputError, match="it was logged and is missing" if left is None else rf"{left} rows.*stopped"):
        load_run(find_runs(tmp_path)[0])


def test_a_record_names_no_file_outside(tmp_path):
    write_run(tmp_path, DATE, run_data())
    path = tmp_path / f"{DATE}_keyspace.json"
    record = json.loads(path.read_text())
    record["files"]["../outside"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="field files"):
        read_run(tmp_path, DATE)


def test_a_truncated_samples_line_is_named(tmp_path):
    write_harness_files(tmp_path)
    path = tmp_path / f"{DATE}_samples_some_task.jsonl"
    path.write_bytes(path.read_bytes() + b'{"doc_id": 2, "answer": "\xff')
    with pytest.raises(InputError, match=r"samples_some_task.jsonl, line 3"):
        load_run(find_runs(tmp_path)[0])


@pytest.mark.parametrize("name", ["keyspace.json", "divergence.parquet", "gram.safetensors"])
def test_a_newer_schema_is_refused(tmp_path, monkeypatch, name):
    write_harness_files(tmp_path)
    write_run(tmp_path, DATE, run_data())
    with monkeypatch.context() as later:
        for module in ("files", "tables", "tensors"):
            later.setattr(f"lmms_keyspace.store.{module}.SCHEMA_VERSION", 7)
        data = run_data()
        newer = replace(data, record=data.record.model_copy(update={"schema_version": 7}))
        write_run(tmp_path / "newer", DATE, newer)
    (tmp_path / "newer" / f"{DATE}_{name}").replace(tmp_path / f"{DATE}_{name}")
    with pytest.raises(InputError, match="says 7, this version reads 1: upgrade lmms_keyspace"):
        load_run(find_runs(tmp_path / f"{DATE}_results.json")[0])


def test_text_that_is_no_unicode_is_read_with_marks(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"answer": "a\\ud800"}\n{"answer": "b\xff"}\n')
    assert read_samples(path)["answer"].tolist() == ["a?", "b\ufffd"]


def test_a_parquet_file_with_other_columns_is_refused(tmp_path):
    write_harness_files(tmp_path)
    write_run(tmp_path, DATE, run_data())
    path = tmp_path / f"{DATE}_attention.parquet"
    table = pq.read_table(path)
    layer = table.schema.get_field_index("layer")
    pq.write_table(table.set_column(layer, "layer", pa.array(["0"] * table.num_rows)), path)
    with pytest.raises(InputError, match=r"\['layer'\]"):
        load_run(find_runs(tmp_path)[0])
