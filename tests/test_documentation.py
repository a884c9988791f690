"""The documentation does what it says: commands run or are accepted, examples load, links lead somewhere."""

from __future__ import annotations

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
from lmms_keyspace.model_wrappers import arguments
from lmms_keyspace.reports.policy import load_policy
from lmms_keyspace.store import find_runs, load_run
from lmms_keyspace.training.config import read_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OFFLINE = "(offline)"  # ends the headings of the tutorial whose commands are run
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# After a prompt, the scheduler's own word, or variables.
_COMMAND = re.compile(r"(?:\$ |srun |[A-Z_]+=\S* )*((?:lmms-eval|lmms-keyspace|accelerate launch|torchrun) .*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Command(NamedTuple):
    page: str
    heading: str
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.arguments)}"


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Heading, language and text of every fenced block."""
    text = page.read_text(encoding="utf-8")
    headings = [(match.start(), match[1]) for match in re.finditer(r"^#+ (.*)$", text, re.MULTILINE)]
    for fence in _FENCE.finditer(text):
        heading = max((place, title) for place, title in headings if place < fence.start())[1]
        yield heading, fence[1], fence[2]


def commands(page: Path) -> Iterator[Command]:
    """The commands of our programs in a page's fenced blocks."""
    for heading, _, text in blocks(page):
        for line in text.replace("\\\n", " ").splitlines():
            if match := _COMMAND.match(line):
                yield Command(page.name, heading, shlex.split(match[1], comments=True))


ALL = [command for page in PAGES for command in commands(page)]
TO_RUN = [command for command in ALL if command.page == "tutorial.md" and command.heading.endswith(OFFLINE)]

# A few documents and steps do: what is tested is that the command works as written.
SHORTER = {
    "lmms-eval": ["--limit", "12"],
    "train": [*("--set", "trainer.max_steps=2"), *("--set", "evaluation.every=0"), *("--set", "data.scenes.n=256")],
}
EXITS = {"gate": 2}  # inconclusive on so few groups, as the page says

# Runs every command given, in one process, by the function that the installed script calls, and without a network.
DRIVER = """
import importlib.metadata, json, socket, sys

def refused(*args, **kwargs):
    raise OSError("no network here")

socket.getaddrinfo = refused
scripts = {script.name: script for script in importlib.metadata.entry_points(group="console_scripts")}
exits = []
for sys.argv in json.load(open("commands.json")):
    try:
        exits.append(scripts[sys.argv[0]].load()() or 0)
    except SystemExit as end:
        exits.append(end.code or 0)
json.dump(exits, open("exits.json", "w"))
"""


def test_the_offline_part_of_the_tutorial_runs(tmp_path):
    assert {command.heading.split(".")[0] for command in TO_RUN} == {"1", "4", "5"}
    given = [words + SHORTER.get(words[0], SHORTER.get(words[1], [])) for _, _, words in TO_RUN]
    (tmp_path / "commands.json").write_text(json.dumps(given))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert json.loads((tmp_path / "exits.json").read_text()) == [EXITS.get(words[1], 0) for words in given], said
    for words in given:  # lmms-eval exits 0 on failure
        if words[0] == "lmms-eval":
            (run,) = find_runs(tmp_path / words[words.index("--output_path") + 1])
            assert load_run(run).samples, words  # raises for a run that did not end
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
    assert (tmp_path / "runs" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def task_names() -> set[str]:
    assert lmms_eval.models.list_available_models()  # loads the plugins, which bring their tasks
    return set(TaskManager().all_tasks)


@pytest.mark.parametrize("command", ALL, ids=str)
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
    pretrained = parsed.model_args.replace("$1", "some/model")  # the argument of a script
    arguments.parse(
        simple_parse_args_string(pretrained),
        model=parsed.model,
        needs_adapter=wrapper.needs_adapter,
        has_bundled=wrapper.has_bundled,
    )


@pytest.mark.parametrize(("page", "language", "read"), [
    ("training.md", "yaml", lambda path: read_config(path).output_dir),
    ("gate.md", "toml", lambda path: load_policy(path).name),
])  # fmt: skip
def test_an_example_file_is_accepted_by_its_loader(page, language, read, tmp_path):
    (text,) = (text for _, kind, text in blocks(ROOT / "docs" / page) if kind == language)
    path = tmp_path / f"example.{language}"
    path.write_text(text, encoding="utf-8")
    assert read(path)


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
