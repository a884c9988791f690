"""The documentation does what it says: commands run or are accepted, examples load, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lmms_eval.models
import numpy as np
import pandas as pd
import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string
from torch.distributed.run import get_args_parser

from lmms_keyspace.cli import app
from lmms_keyspace.harness import MODEL_CLASSES
from lmms_keyspace.key_source import SavedKeys
from lmms_keyspace.model_wrappers import arguments
from lmms_keyspace.reports.policy import load_policy
from lmms_keyspace.store import LoadedRun, find_runs, load_run, read_run
from lmms_keyspace.training.config import read_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OFFLINE = "(offline)"  # ends the headings of the tutorial whose commands are run
_FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"\n]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# After the scheduler's own word, or variables.
_COMMAND = re.compile(r"(?:srun |[A-Z_]+=\S* )*((?:lmms-eval|lmms-keyspace|accelerate launch|torchrun|python) .*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    heading: str
    language: str
    file: str  # the block's title, else empty
    text: str


class Command(NamedTuple):
    page: str
    heading: str
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.arguments)}"


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    headings = [(match.start(), match[1]) for match in re.finditer(r"^##? (.*)$", text, re.MULTILINE)]
    for fence in _FENCE.finditer(text):
        heading = max((place, title) for place, title in headings if place < fence.start())[1]
        yield Block(heading, fence[1], fence[2] or "", fence[3])


def commands(page: Path) -> Iterator[Command]:
    """The commands of our programs in a page's fenced blocks."""
    for block in blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines():
            if match := _COMMAND.match(line):
                yield Command(page.name, block.heading, shlex.split(match[1], comments=True))


ALL = [command for page in PAGES for command in commands(page)]
TUTORIAL = [command for command in ALL if command.page == "tutorial.md" and command.heading.endswith(OFFLINE)]
INTERVENING = [command for command in ALL if command.page == "malora.md"]
EXTENDING = [command for command in ALL if command.page == "extending.md"]
PARSED = [command for command in ALL if command.arguments[0] != "python"]

# A few documents and steps do: what is tested is that the command works as written.
SHORTER = {
    "lmms-eval": ["--limit", "12"],
    "train": [*("--set", "trainer.max_steps=2"), *("--set", "evaluation.every=0"), *("--set", "data.scenes.n=256")],
}
EXITS = {"gate": 2}  # inconclusive on so few groups, as the page says

# Runs every command given, in one process, by the function that the installed script calls, and without a network.
DRIVER = """
import importlib.metadata, json, runpy, socket, sys

def refused(*args, **kwargs):
    raise OSError("no network here")

socket.getaddrinfo = refused
scripts = {script.name: script for script in importlib.metadata.entry_points(group="console_scripts")}
exits = []
for sys.argv in json.load(open("commands.json")):
    try:
        if sys.argv[0] == "python":
            del sys.argv[0]
            runpy.run_path(sys.argv[0], run_name="__main__")
            exits.append(0)
        else:
            exits.append(scripts[sys.argv[0]].load()() or 0)
    except SystemExit as end:
        exits.append(end.code or 0)
json.dump(exits, open("exits.json", "w"))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, str]:
    """The folder in which every offline command was run (tutorial, interventions, extending), and the output.

    One start of Python serves them all.
    """
    folder = tmp_path_factory.mktemp("documentation")
    for block in blocks(ROOT / "docs" / "extending.md"):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")
    given = [words + SHORTER.get(words[0], SHORTER.get(words[1], [])) for _, _, words in TUTORIAL + INTERVENING]
    given += [command.arguments for command in EXTENDING]
    (folder / "commands.json").write_text(json.dumps(given))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    exits = json.loads((folder / "exits.json").read_text())
    assert exits == [EXITS.get(words[1], 0) for words in given], said
    return folder, done.stdout


def run_in(folder: Path) -> LoadedRun:
    """The one run there, read whole; lmms-eval exits 0 on failure, so the files are what counts."""
    (files,) = find_runs(folder)
    return load_run(files)


def test_the_offline_part_of_the_tutorial_runs(ran):
    folder, _ = ran
    assert {command.heading.split(".")[0] for command in TUTORIAL} == {"1", "4", "6"}
    for name in ("base", "malora", "trained"):
        assert len(run_in(folder / "runs" / name).samples["textbias_probe_quick"]) == 12
    assert (folder / "runs" / "report" / "report.html").is_file()
    assert (folder / "runs" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_intervention_takes_its_statistics_from_the_run_before(ran):
    folder, _ = ran
    reference, shifted = (run_in(folder / "out" / name).data.record for name in ("reference", "shifted"))
    assert len(INTERVENING) == 2
    assert shifted.intervention == f"mean_shift from {reference.date}"


def test_each_extension_is_under_40_lines():
    for heading in ("A new probe", "A new estimator", "A new architecture"):
        files = [one for one in blocks(ROOT / "docs" / "extending.md") if one.heading == heading and one.file]
        code = [line for one in files if one.language != "json" for line in one.text.splitlines() if line.strip()]
        assert 10 < len(code) < 40, heading


def test_the_new_probe_is_captured_by_condition_and_reported(ran):
    folder, _ = ran
    run = run_in(folder / "runs" / "disk")
    assert set(run.data.divergence["condition"]) == {"clean", "conflict"}
    hint = run.data.attention.groupby("condition")["mass_hint"]
    assert hint.max()["clean"] == 0 < hint.min()["conflict"]
    assert run.samples["disk"]["group_id"].nunique() == 8
    table = pd.read_csv(folder / "runs" / "disk_report" / "tables" / "comparison.csv")
    assert "text_flip_rate" in set(table["metric"])


def test_the_new_estimator_prints_its_values(ran):
    folder, output = ran
    source = SavedKeys(run_in(folder / "runs" / "disk").data)
    lines = [line.split() for line in output.splitlines() if line.startswith("frechet_diagonal")]
    assert [int(line[1]) for line in lines] == source.layers
    for _, layer, *values in lines:
        visual, text = (
            source.keys("disk", "clean", "k_pre", int(layer), modality)[0].numpy() for modality in ("visual", "text")
        )
        means, spreads = (np.square(f(visual) - f(text)).sum(1) for f in (mean_of_tokens, spread_of_tokens))
        np.testing.assert_allclose(np.array(values, dtype=float), means + spreads, rtol=1e-4)


def mean_of_tokens(keys: np.ndarray) -> np.ndarray:
    return keys.mean(axis=0, dtype=np.float64)


def spread_of_tokens(keys: np.ndarray) -> np.ndarray:
    return keys.std(axis=0, ddof=1, dtype=np.float64)


def test_the_new_architecture_is_known_and_passes_the_self_check(ran):
    folder, output = ran
    assert "without an entry: unknown\nwith an entry: mlp\n" in output
    (files,) = find_runs(folder / "runs" / "vipllava")
    data = read_run(files.folder, files.date)  # raises for a run that did not end
    assert data.record.architecture == "vipllava"
    assert set(data.divergence["connector"]) == {"mlp"}


@pytest.fixture(scope="module")
def task_names() -> set[str]:
    assert lmms_eval.models.list_available_models()  # loads the plugins, which bring their tasks
    return {*TaskManager().all_tasks, "disk"}  # the page on extending makes that one


@pytest.mark.parametrize("command", PARSED, ids=str)
def test_a_command_is_accepted_by_its_program(command, task_names, monkeypatch):
    program, *given = command.arguments
    module = ""
    if program in ("accelerate", "torchrun"):
        parser = launch_command_parser() if program == "accelerate" else get_args_parser()
        parsed = parser.parse_args(given[program == "accelerate" :])
        assert parsed.module
        module, given = parsed.training_script, parsed.training_script_args
    match program, module:
        case ("lmms-eval", _) | (_, "lmms_eval"):
            check_evaluation(given, task_names, monkeypatch)
        case (_, "lmms_keyspace.training"):
            check_keyspace(["train", *given])
        case _:
            assert (program, module) == ("lmms-keyspace", "")
            check_keyspace(given)


def check_keyspace(given: list[str]) -> None:
    """Parsed as typer does; settings of the trainer go through its loader."""
    group = typer.main.get_command(app)
    context = group.commands[given[0]].make_context(given[0], given[1:])
    if given[0] == "train":
        read_config(None, ["output_dir=out", *(context.params["settings"] or ())])


def check_evaluation(given: list[str], task_names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed by lmms-eval; its tasks exist, and the model takes its arguments."""
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *given])
    parsed = parse_eval_args()[1]
    assert set(parsed.tasks.split(",")) <= task_names
    wrapper: type = lmms_eval.models.get_model(parsed.model)
    assert parsed.model in MODEL_CLASSES
    given = parsed.model_args.replace("$1", "some/model").replace("{model}", "some/model")  # of a script
    arguments.parse(
        simple_parse_args_string(given),
        model=parsed.model,
        needs_adapter=wrapper.needs_adapter,
        has_bundled=wrapper.has_bundled,
    )


@pytest.mark.parametrize(("page", "language", "read"), [
    ("training.md", "yaml", lambda path: read_config(path).output_dir),
    ("tutorial.md", "yaml", lambda path: read_config(path).output_dir),
    ("gate.md", "toml", lambda path: load_policy(path).name),
])  # fmt: skip
def test_an_example_file_is_accepted_by_its_loader(page, language, read, tmp_path):
    (text,) = (block.text for block in blocks(ROOT / "docs" / page) if block.language == language)
    path = tmp_path / f"example.{language}"
    path.write_text(text, encoding="utf-8")
    assert read(path)


PYTHON = [(page.name, one.text) for page in PAGES for one in blocks(page) if one.language == "python"]


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[f"{page}-{n}" for n, (page, _) in enumerate(PYTHON)])
def test_python_in_a_page_imports_what_there_is(page, text):
    for node in ast.walk(ast.parse(text, page)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmms_keyspace"):
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_every_link_between_files_leads_somewhere():
    texts = [
        *PAGES,
        *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in texts
        for target in _LINK.findall(page.read_text(encoding="utf-8"))
        if ":" not in target and target[0] != "#" and not (page.parent / target.split("#")[0]).exists()
    ]
    assert dead == []


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(leaves(nav))


def leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for inner in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(inner)
