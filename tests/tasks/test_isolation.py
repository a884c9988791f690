"""A run of our tasks uses no network and writes nothing outside its output folder and the datasets cache."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from evaluation import evaluate

_watched: list[str] | None = None
_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _watch(event: str, arguments: tuple) -> None:
    if _watched is None:
        return
    if (
        event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)) and (arguments[2] or 0) & _WRITE
    ) or event == "os.mkdir":
        _watched.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


@pytest.mark.parametrize("task", ["textbias_probe_quick", "textbias_rich_quick"])
def test_files_are_written_where_they_belong(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    global _watched
    import datasets

    here, out = tmp_path / "here", tmp_path / "out"
    here.mkdir()
    monkeypatch.chdir(here)
    _watched = []
    try:
        evaluate("keyspace_llava", out, tasks=[task], limit=6, model_args="capture=off")
        written = {Path(path).resolve() for path in _watched}
    finally:
        _watched = None
    allowed = [out, Path(datasets.config.HF_DATASETS_CACHE), Path(tempfile.gettempdir()), Path("/dev")]
    strays = [path for path in written if not any(path.is_relative_to(folder.resolve()) for folder in allowed)]
    assert [path for path in strays if "__pycache__" not in path.parts] == []
    assert [path for path in written if path.is_relative_to(here)] == []
    assert list(here.iterdir()) == []
    assert list(out.rglob(f"*_samples_{task}.jsonl"))


def test_the_network_is_closed() -> None:
    with pytest.raises(AssertionError, match="network used"):
        socket.create_connection(("127.0.0.1", 9))
