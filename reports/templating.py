"""One HTML file from a template: no request, one script of ours, everything from a run escaped."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lmms_keyspace.reports import theme


def rendered(template: str, **content: Any) -> str:
    """The page. Its policy lets the browser run `page.js` and load nothing, whatever a run may hold."""
    environment = Environment(
        loader=PackageLoader("lmms_keyspace.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return environment.get_template(template).render(theme=theme, script=script, policy=policy, **content)
