"""Hooks of mkdocs: pages that live outside docs/ become pages of the site, and links to them hold in both places.

The plugs are installed inside the package but live beside it; the reference is read from a tree as it is installed.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Path in the repository -> name in the site.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CITATION.cff": "CITATION.cff",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "lmms_keyspace/embedded/weights/CARD.md": "bundled_model.md",
}
INSTALLED = ROOT / "build" / "installed" / "lmms_keyspace"
_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_startup(**_: Any) -> None:
    shutil.rmtree(INSTALLED, ignore_errors=True)
    INSTALLED.mkdir(parents=True)
    plugs = [ROOT / name for name in ("model_wrappers", "tasks", "reports")]
    for source in (*(ROOT / "lmms_keyspace").iterdir(), *plugs):
        (INSTALLED / source.name).symlink_to(source)


def on_files(files: Files, config: Any) -> Files:
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links are written as they hold in the repository; here they become what holds in the site."""
    name = page.file.src_uri
    written_in = next((path for path, site in OUTSIDE.items() if site == name), f"docs/{name}")

    def in_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), match[1]))
        site = OUTSIDE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(site, posixpath.dirname(name) or '.')}{match[2] or ''})"

    return _LINK.sub(in_site, markdown)
