"""What a gate demands: per metric a margin and a direction, read from TOML."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmms_keyspace.errors import InputError

_SHIPPED = resources.files("lmms_keyspace.reports") / "policies"


class MetricRule(BaseModel):
    """One metric that must not get worse by `margin` or more, in its own unit (shares: 0.05 is 5 points)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    direction: Literal["higher", "lower"] | None = None  # which is better; None: as the metric is defined
    task: str | None = None  # None: every task of the baseline that has the metric


class Policy(BaseModel):
    """The rules of a gate. `inconclusive` says what an inconclusive gate is to the caller: exit 2, 1 or 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    min_groups: Annotated[int, Field(ge=2)] = 50
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    inconclusive: Literal["report", "fail", "pass"] = "report"
    metric: Annotated[tuple[MetricRule, ...], Field(min_length=1)]


def load_policy(source: str | Path) -> Policy:
    """The policy of a TOML file, or one that comes with the package, by name (`visual-reliance`).

    Raises InputError for a name that is neither, a file that is not TOML, and an unknown, missing or wrong key.
    """
    path = Path(source)
    shipped = _SHIPPED / f"{source}.toml"
    if path.is_file():
        content = path.read_bytes()
    elif str(source) in shipped_policies():
        content = shipped.read_bytes()
    else:
        raise InputError(
            "policy", str(source), f"give a TOML file or a policy of the package: {', '.join(shipped_policies())}"
        )
    try:
        policy = Policy.model_validate(tomllib.loads(content.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError("policy", str(source), f"not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = MetricRule if first["loc"][:1] == ("metric",) and len(first["loc"]) > 1 else Policy
        raise InputError(
            "policy", str(source), f"key {key}: {first['msg']} (keys: {', '.join(known.model_fields)})"
        ) from error
    rules = [(rule.name, rule.task) for rule in policy.metric]
    for name, task in rules:
        if rules.count((name, task)) > 1 or (task is not None and (name, None) in rules):
            raise InputError("policy", str(source), f"metric {name} has two rules for one task: keep one")
    return policy


def shipped_policies() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _SHIPPED.iterdir() if file.name.endswith(".toml"))
