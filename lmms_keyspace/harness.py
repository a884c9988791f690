"""The only module that touches lmms-eval's internals.

lmms-eval loads `model_manifests` through the entry-point group `lmms_eval.models`. Besides naming our models it
places five hooks, each a no-op unless one of our models runs (the first unless one of our tasks is asked for):

* `TaskManager.initialize_tasks` also indexes our task folder (lmms-eval has no entry point for tasks);
* `evaluator.simple_evaluate` checks the output folder before the model loads, gives a run without
  `--output_path` a default folder, samples included, adds the `keyspace` block to the results, and saves what was
  captured of a run that dies;
* `ResponseCache.execute` tells the model of every request before the cache answers some of them;
* the command line's `make_table` prints the headline of our tasks;
* `EvaluationTracker.save_results_aggregated` writes our files beside lmms-eval's, with the same date.

Where lmms-eval changed, a hook is not placed and one warning says what no longer works and the way out.
This module imports neither torch nor lmms_eval at import time: a failure here would drop every plugin model.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_keyspace.errors import InputError
from lmms_keyspace.processes import end_process, of_rank_0, terminable, uninterrupted

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

    from lmms_keyspace.records import RunData

DEFAULT_OUTPUT = "lmms_keyspace_runs"
_WRAPPER = "lmms_keyspace.model_wrappers.keyspace_vlm"
# lmms-eval model name -> class of the wrapper module. One class; the subclasses only say what the name promises.
MODEL_CLASSES = {
    "keyspace_vlm": "KeyspaceVLM",
    "keyspace_llava": "KeyspaceLlava",
    "keyspace_qwen2_5_vl": "KeyspaceQwen25VL",
    "malora_vlm": "MaloraVLM",
    "malora_llava": "MaloraLlava",
    "malora_qwen2_5_vl": "MaloraQwen25VL",
}
_MARK = "_lmms_keyspace_hook"


@dataclass
class _Run:
    """What is known of the evaluation under way."""

    date: str  # lmms-eval's date string, as its file names carry it
    data: RunData | None = None
    hole: InputError | None = None  # to raise when the results are saved


_current: _Run | None = None


def model_manifests() -> list[ModelManifest]:
    """Entry point `lmms_eval.models`: name our models and place the hooks.

    Returns:
        One chat-model manifest per name in `MODEL_CLASSES`.
    """
    # Imported here: lmms_eval.models.registry_v2 is half-initialised while this module is imported by it.
    from lmms_eval.models.registry_v2 import ModelManifest

    problem = install_task_hook()
    if problem:
        _warn(problem)
    return [ModelManifest(model_id=name, chat_class_path=f"{_WRAPPER}.{cls}") for name, cls in MODEL_CLASSES.items()]


def tasks_folder() -> Path:
    """The installed folder of our task YAMLs.

    Raises:
        InputError: the plug is missing because the checkout, not the installed package, was imported.
    """
    spec = importlib.util.find_spec("lmms_keyspace.tasks")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "lmms_keyspace.tasks",
            None,
            "the package is not installed with its plugs; run `pip install -e .` in the checkout",
        )
    return Path(spec.submodule_search_locations[0])


def install_task_hook() -> str | None:
    """Make every TaskManager index our tasks too.

    Returns:
        None when the hook is in place, else what no longer works and the way out.
    """
    from lmms_eval.tasks import TaskManager

    way_out = f"textbias tasks are not found by name; add `--include_path {tasks_folder()}`"
    original = getattr(TaskManager, "initialize_tasks", None)
    if original is None:
        return f"lmms_eval.tasks.TaskManager.initialize_tasks is gone: {way_out}"
    if hasattr(original, _MARK):
        return None
    if not _accepts(original, "include_path", "include_defaults"):
        return f"lmms_eval.tasks.TaskManager.initialize_tasks changed its signature: {way_out}"

    @functools.wraps(original)
    def initialize_tasks(
        self: Any, include_path: str | Sequence[str] | None = None, include_defaults: bool = True
    ) -> dict[str, Any]:
        problem = install_run_hooks()
        if problem:
            _warn(problem)
        given = [include_path] if isinstance(include_path, str) else list(include_path or [])
        ours = tasks_folder()
        if not any(Path(path).resolve() == ours.resolve() for path in given):
            given.append(str(ours))
        return original(self, include_path=given, include_defaults=include_defaults)  # type: ignore[no-any-return]

    setattr(initialize_tasks, _MARK, True)
    TaskManager.initialize_tasks = initialize_tasks
    return None


def install_run_hooks() -> str | None:
    """Hook the evaluation and the saving of results; placed once, when lmms-eval is wholly imported.

    Returns:
        None when both hooks are in place, else what no longer works and the way out.
    """
    from lmms_eval import evaluator
    from lmms_eval.caching.response_cache import ResponseCache
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

    way_out = "key-space files are not saved beside the results; name a folder with `--model_args keys_dir=FOLDER`"
    evaluate = getattr(evaluator, "simple_evaluate", None)
    save = getattr(EvaluationTracker, "save_results_aggregated", None)
    if evaluate is None or save is None:
        return f"lmms_eval's simple_evaluate or EvaluationTracker.save_results_aggregated is gone: {way_out}"
    if not hasattr(evaluate, _MARK):
        if not _accepts(evaluate, "model", "evaluation_tracker", "log_samples", "datetime_str", "cli_args"):
            return f"lmms_eval.evaluator.simple_evaluate changed its signature: {way_out}"
        evaluator.simple_evaluate = _hooked_evaluate(evaluate)
    if not hasattr(save, _MARK):
        if not _accepts(save, "results", "samples", "datetime_str"):
            return f"EvaluationTracker.save_results_aggregated changed its signature: {way_out}"
        EvaluationTracker.save_results_aggregated = _hooked_save(save)
    execute = getattr(ResponseCache, "execute", None)
    if not hasattr(execute, _MARK):
        if execute is None or not _accepts(execute, "lm", "reqtype", "requests"):
            return "lmms_eval's ResponseCache.execute changed: what it answers is not captured; leave out --use_cache"
        ResponseCache.execute = _hooked_execute(execute)
    _hook_table()
    return None


def _hook_table() -> None:
    """Have the command line print our tasks' headline metrics; without it the table is long and nothing is lost."""
    from lmms_eval.utils import make_table

    for name in ("lmms_eval.__main__", "__main__"):  # the console script, `python -m lmms_eval`
        command_line: Any = sys.modules.get(name)
        if hasattr(command_line, "make_table") and command_line.make_table is make_table:
            command_line.make_table = _hooked_table(make_table)


def _hooked_table(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def make_table(result_dict: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        from lmms_keyspace.printed import shortened

        return original(shortened(result_dict), *args, **kwargs)

    return make_table


def hand_over(data: RunData, keys_dir: Path | None, *, rank: int = 0, hole: InputError | None = None) -> None:
    """Take a run from a wrapper, to be saved with lmms-eval's results or at once under `keys_dir`.

    Args:
        data: the run, or what a process captured of one that died; its record's date is replaced by lmms-eval's, or now
            where the evaluation did not go through our hook.
        keys_dir: folder named by the user; the files are written there now, whatever lmms-eval does later.
        rank: of the process; part of the files' names when it is not 0.
        hole: an error to raise when lmms-eval's results are saved.
    """
    from lmms_eval.utils import get_datetime_str

    date = get_datetime_str().replace(":", "-") if _current is None else _current.date
    data = _dated(data, f"{date}_rank{rank}" if rank else date)
    if _current is not None:
        _current.data = data
        _current.hole = hole
    if keys_dir is not None:
        try:
            _write(keys_dir, data)
        except InputError as error:  # no room there: the results are saved first
            if _current is None:
                raise
            _current.hole = hole or error
    elif _current is None:
        _warn("this evaluation was not started through lmms-eval's simple_evaluate: name keys_dir= to save the files")


def _hooked_evaluate(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def simple_evaluate(*args: Any, **kwargs: Any) -> Any:
        global _current
        _current = None
        bound = signature.bind(*args, **kwargs)
        model = bound.arguments.get("model")
        name = model if isinstance(model, str) else getattr(model, "keyspace_model_name", None)
        if name not in MODEL_CLASSES:
            return original(*args, **kwargs)
        from lmms_eval.utils import get_datetime_str

        # simple_evaluate's own default is one date for the whole process.
        date = bound.arguments["datetime_str"] = of_rank_0(bound.arguments.get("datetime_str") or get_datetime_str())
        run = _Run(date=date.replace(":", "-"))
        tracker = bound.arguments.get("evaluation_tracker")
        by_command_line = bound.arguments.get("cli_args") is not None
        try:
            with terminable():
                _prepare_output(bound.arguments, run)
                _current = run
                results = original(*bound.args, **bound.kwargs)
        except BaseException as error:
            # lmms-eval saves nothing of a run that died; `run.data` is what the wrapper captured until then.
            if run.data is not None and tracker is not None and tracker.output_path:
                with uninterrupted():
                    _write(_folder_of(tracker), run.data)
            if isinstance(error, Exception):
                end_process(error, by_command_line=by_command_line)
            raise
        if results is not None and run.data is not None:
            results["keyspace"] = results_block(run.data)
            if run.hole is not None:
                _save_results(results, tracker, date)
                end_process(run.hole, by_command_line=by_command_line)
                raise run.hole
        return results

    setattr(simple_evaluate, _MARK, True)
    return simple_evaluate


def _save_results(results: dict[str, Any], tracker: Any, date: str) -> None:
    """Save results and samples as lmms-eval's command line does, which will not come to it."""
    if tracker is None or not tracker.output_path:
        return
    samples = results.pop("samples", None)
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=date)
    for task, rows in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=rows)


def _hooked_execute(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def execute(self: Any, lm: Any, reqtype: str, requests: list[Any]) -> Any:
        if getattr(lm, "keyspace_model_name", None) not in MODEL_CLASSES or reqtype != "generate_until":
            return original(self, lm, reqtype, requests)
        with lm.expecting(requests):
            return original(self, lm, reqtype, requests)

    setattr(execute, _MARK, True)
    return execute


def _prepare_output(arguments: dict[str, Any], run: _Run) -> None:
    """Check that results can be written, before minutes of model loading; choose a folder when none was named."""
    tracker = arguments.get("evaluation_tracker")
    if tracker is None:
        return
    model_args = arguments.get("model_args") or ""
    if not tracker.output_path and "keys_dir=" not in str(model_args):
        tracker.output_path = str(Path(DEFAULT_OUTPUT) / str(run.date))
        arguments["log_samples"] = True
        cli_args = arguments.get("cli_args")
        if cli_args is not None:  # the command line reads its own copy when it saves the samples
            cli_args.log_samples = True
        _info(f"no --output_path: results, samples and key-space files go to ./{tracker.output_path}/")
    if tracker.output_path:
        from lmms_keyspace.store.files import require_writable

        require_writable("--output_path", tracker.output_path)


def _hooked_save(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_results_aggregated(self: Any, results: dict[str, Any], samples: Any, datetime_str: str) -> Any:
        global _current
        run, _current = _current, None
        saved = original(self, results=results, samples=samples, datetime_str=datetime_str)
        if run is not None and run.data is not None and self.output_path:
            try:
                _write(_folder_of(self), run.data)
            except InputError:  # no room: lmms-eval would save the samples later, and does not come to it
                for task, rows in (samples or {}).items():
                    self.save_results_samples(task_name=task, samples=rows)
                raise
        return saved

    setattr(save_results_aggregated, _MARK, True)
    return save_results_aggregated


def _folder_of(tracker: Any) -> Path:
    """Where an EvaluationTracker puts the files of its model."""
    return Path(tracker.output_path, tracker.general_config_tracker.model_name_sanitized)


def results_block(data: RunData) -> dict[str, Any]:
    """The `keyspace` block of results.json: what was captured and the per-layer point estimates.

    Returns:
        JSON-ready. `divergence` maps task -> condition -> `<space> <contrast> <estimator>` -> layer -> value
        (mean over KV heads; mmd2 has no unit, js_classifier is in nats).
    """
    from lmms_keyspace.records import ALL_HEADS, MAIN_ESTIMATORS, NOT_COMPARABLE

    record, table = data.record, data.divergence
    table = table[(table["head"] == ALL_HEADS) & table["estimator"].isin(MAIN_ESTIMATORS) & table["value"].notna()]
    divergence: dict[str, Any] = {}
    for row in table.itertuples():
        by_condition = divergence.setdefault(row.task, {}).setdefault(row.condition, {})
        by_condition.setdefault(f"{row.space} {row.contrast} {row.estimator}", {})[str(row.layer)] = float(row.value)
    return {
        "schema_version": record.schema_version,
        "model": record.model,
        "pretrained": record.pretrained,
        "adapter": record.adapter,
        "capture": record.capture,
        "reference": record.reference if record.reference != "none" else NOT_COMPARABLE,
        "not_interpretable": sorted(name for name, task in record.tasks.items() if not task.interpretable),
        "same_prompts": {name: task.same_prompts for name, task in record.tasks.items() if task.same_prompts},
        "images_absent": {name: task.images_absent for name, task in record.tasks.items() if task.images_absent},
        "divergence": divergence,
    }


def _dated(data: RunData, date: str) -> RunData:
    return replace(data, record=data.record.model_copy(update={"date": date}))


def _write(folder: Path, data: RunData) -> None:
    from lmms_keyspace.store import write_run

    write_run(folder, data.record.date, data)
    _info(f"key-space files saved to {folder}/{data.record.date}_*")


def _accepts(function: Callable[..., Any], *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


def _info(message: str) -> None:
    from loguru import logger

    logger.info(message)


def _warn(problem: str) -> None:
    from loguru import logger

    logger.warning(f"lmms_keyspace: {problem}")
