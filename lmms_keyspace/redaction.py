"""What may be written of a setting: files of a run and pages are passed on, so they hold no secret and no home folder.

Secrets are hidden as lmms-eval 0.7.3 hides them in its results (`evaluator._redact_eval_config_secrets`), by the name
of the setting or by the form of the value; home folders become `~`. Standard library only: everything may import it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

_HIDDEN = "[REDACTED]"
_NAMES = ("token", "client_secret", "huggingfacehub_api_token")
_ENDINGS = ("api_key", "_token", "_secret", "password")
_ASSIGNMENT = re.compile(r"(?i)(^|[,\s])(\w*(?:api_key|token|secret|password))=([^,\s]+)")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


def without_secrets(value: Any) -> Any:
    """The value with every token and password in it replaced; mappings, lists and tuples are gone through.

    A text is searched for `name=value` with a secret's name and for tokens of the hub; a mapping also by its keys.
    """
    if isinstance(value, dict):
        return {key: _HIDDEN if _is_secret(key) else without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(item) for item in value)
    if isinstance(value, str):
        return _HUB_TOKEN.sub(_HIDDEN, _ASSIGNMENT.sub(rf"\1\2={_HIDDEN}", value))
    return value


def publishable(value: Any) -> Any:
    """`without_secrets`, and every home folder in a text is `~`: this process's, and those of others by their place."""
    return _without_home(without_secrets(value))


def _is_secret(name: object) -> bool:
    lowered = str(name).lower()
    return lowered in _NAMES or lowered.endswith(_ENDINGS)


def _without_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_home(item) for item in value)
    return _homes(str(Path.home())).sub("~", value) if isinstance(value, str) else value


@cache
def _homes(own: str) -> re.Pattern[str]:
    """Home folders where a path begins; `own` may lie anywhere but is not the root of all paths."""
    places = [r"/home/[^/\s,:;'\"]+", r"/Users/[^/\s,:;'\"]+", "/root"]
    if own != "/":
        places.insert(0, re.escape(own))
    return re.compile(rf"(?<![\w.~/-])(?:{'|'.join(places)})(?![\w.-])")
