"""What was run, enough to run it again; folders of a machine are shortened, since pages are published."""

from __future__ import annotations

import json

from lmms_keyspace.reports.load import Run

RUN_COLUMNS = ("Run", "Model", "Adapter", "Tasks", "Documents", "Captured", "Precision, device", "Date")


def run_row(run: Run) -> tuple[str, ...]:
    """One line of the table of runs, with the columns of RUN_COLUMNS."""
    record = run.record
    documents = ", ".join(str(len(run.loaded.samples.get(task, []))) for task in run.tasks)
    tasks = ", ".join(run.tasks)
    if record is None:
        model = f"{run.config.get('model', '?')}, {_arguments(run)}"
        device = str(run.config.get("device", "-"))
        return (run.label, model, "-", tasks, documents, "nothing", device, run.loaded.files.date)
    sha = f", sha256 {record.adapter_sha256[:8]}" if record.adapter_sha256 else ""
    adapter = f"{_tail(record.adapter)} ({record.adapter_method}{sha})" if record.adapter else "none"
    if record.intervention:
        adapter += f"; intervention {record.intervention}"
    captured = ", ".join(
        f"{task.rows_captured} documents in {task.clusters_selected} clusters" for task in record.tasks.values()
    )
    return (
        run.label,
        f"{record.model}, {_tail(record.pretrained)} ({record.architecture}, {record.connector})",
        adapter,
        tasks,
        documents,
        captured if record.capture else "off",
        f"{record.dtype}, {record.device}, batch {record.batch_size}",
        record.date,
    )


def settings(run: Run) -> tuple[tuple[str, str], ...]:
    """Every setting and version, and the command that repeats the run as far as lmms-eval wrote it down."""
    rows = [("command", _command(run))]
    if run.record is None:
        return (*rows, *((str(key), _shortened(value)) for key, value in sorted(run.config.items())))
    left_out = {"tasks", "bandwidths", "complete", "versions"}
    rows += [(key, _shortened(value)) for key, value in run.record.model_dump().items() if key not in left_out]
    rows += [(f"version of {name}", version) for name, version in run.record.versions.items()]
    for name, task in run.record.tasks.items():
        rows += [(f"{name}: {key}", _shortened(value)) for key, value in task.model_dump().items()]
    return tuple(rows)


def _command(run: Run) -> str:
    config = run.config
    parts = [f"lmms-eval --model {config.get('model', '?')}"]
    if arguments := _arguments(run):
        parts.append(f"--model_args {arguments}")
    parts.append(f"--tasks {','.join(run.tasks)}")
    parts += [f"--{name} {config[name]}" for name in ("batch_size", "limit", "gen_kwargs") if config.get(name)]
    return " ".join([*parts, "--log_samples --output_path OUT"])


def _arguments(run: Run) -> str:
    """`--model_args`, with folders shortened."""
    parts = (part.partition("=") for part in str(run.config.get("model_args") or "").split(","))
    return ",".join(f"{name}{equals}{_shortened(value)}" for name, equals, value in parts)


def _tail(path: str) -> str:
    """A hub id whole, the last two parts of a folder."""
    return path if path.count("/") <= 1 else "/".join(path.rstrip("/").split("/")[-2:])


def _shortened(value: object) -> str:
    if isinstance(value, str):
        return _tail(value) if value.startswith("/") else value
    return json.dumps(value, ensure_ascii=False, default=str)
