"""What `lmms-keyspace doctor` checks: everything a run needs, with the true error where something is wrong."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from lmms_keyspace import embedded, harness


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    subject: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Run every check.

    Returns:
        One finding per check; those of a check that raised carry its error. Nothing after one of builds, hooks and
        models that fails: every task would only repeat it.
    """
    findings = [_finding("versions", versions)]
    for subject, check in (("builds", _builds), ("hooks", _hooks), ("models", _models)):
        findings.append(_finding(subject, check))
        if not findings[-1].ok:
            return findings
    checks: list[tuple[str, Callable[[], str]]] = [
        *((f"task {path.stem}", lambda path=path: _task(path)) for path in _task_files()),
        *((f"bundled {name}", lambda folder=folder: _weights(folder)) for name, folder in _bundled().items()),
    ]
    return findings + [_finding(subject, check) for subject, check in checks]


def _finding(subject: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, check())
    except Exception as error:  # noqa: BLE001 - whatever is wrong is what the user came to see
        return Finding(subject, False, " ".join(f"{type(error).__name__}: {error}".split()))


def versions() -> str:
    """What this package needs is there, and what those packages need of each other: pip can leave two that do not fit.

    Raises:
        RuntimeError: names each package that is missing or of another version.
    """
    own = _requirements("lmms-keyspace")
    problems = [_problem("", one) for one in own]
    problems += [_problem(f"{package.name} needs ", one) for package in own for one in _requirements(package.name)]
    wrong = [problem for problem in problems if problem]
    if wrong:
        raise RuntimeError("; ".join(wrong) + "; install with the versions of constraints.txt")
    names = [one.name for one in own]
    return ", ".join(["python " + platform.python_version(), *(f"{name} {version(name)}" for name in names)])


def _requirements(package: str) -> list[Requirement]:
    """Of an installed package on this machine, without its extras; none of one that is missing."""
    try:
        found = [Requirement(text) for text in requires(package) or []]
    except PackageNotFoundError:
        return []
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _problem(who: str, requirement: Requirement) -> str | None:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{who}{requirement.name}, which is missing"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{who}{requirement.name} {requirement.specifier}, but {found} is installed"


def _builds() -> str:
    """pip can take torch from one index and torchvision from another; then nothing that reads a picture loads."""
    import torch

    try:
        import torchvision
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"torch {torch.__version__} and torchvision {version('torchvision')} are builds that do not fit each other "
            f"({error}); install both anew from one index (pip install --force-reinstall torch torchvision)"
        ) from error
    return f"torch {torch.__version__} and torchvision {torchvision.__version__} load together"


def _models() -> str:
    from lmms_eval.models import get_model, list_available_models

    missing = sorted(set(harness.MODEL_CLASSES) - set(list_available_models()))
    if missing:
        raise RuntimeError(f"lmms-eval does not list {', '.join(missing)}; reinstall the package (pip install -e .)")
    for name in harness.MODEL_CLASSES:
        get_model(name)
    return ", ".join(harness.MODEL_CLASSES)


def _hooks() -> str:
    import lmms_eval.models  # noqa: F401 - loads the entry point, as lmms-eval does

    problems = [problem for problem in (harness.install_task_hook(), harness.install_run_hooks()) if problem]
    if problems:
        raise RuntimeError("; ".join(problems))
    return "tasks by name, output folder, key-space files"


def _task_files() -> list[Path]:
    return sorted(harness.tasks_folder().rglob("*.yaml"))


def _task(path: Path) -> str:
    """Load the YAML and build its documents, as lmms-eval does, without lmms-eval's silence about errors."""
    import datasets
    from lmms_eval.tasks import TaskManager, get_task_dict
    from lmms_eval.utils import load_yaml_config

    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    names = [name for name in manager.all_tasks if manager.task_index[name]["yaml_path"] == str(path)]
    if not names:
        raise RuntimeError(f"{path.name} names no task that lmms-eval finds")
    config = load_yaml_config(str(path))  # resolves every function that it names
    dataset = ((config.get("metadata") or {}).get("keyspace") or {}).get("dataset")
    if dataset:
        return f"asks {dataset}, which is not looked for here"
    datasets.disable_progress_bars()
    loaded = get_task_dict(names, manager, "chat").values()
    tasks = [task for entry in loaded for task in (entry.values() if isinstance(entry, dict) else [entry])]
    return f"{sum(len(task.eval_docs) for task in tasks)} documents"


def _bundled() -> dict[str, Path]:
    return {"base": embedded.base_path(), **{name: embedded.adapter_path(name) for name in embedded.ADAPTERS}}


def _weights(folder: Path) -> str:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"no weights in {folder}; build them with `python -m lmms_keyspace.embedded.build`")
    with safe_open(files[0], framework="numpy") as weights:
        count = len(list(weights.keys()))
    return f"{count} tensors, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
