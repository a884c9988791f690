"""The mutants of the estimators, of capture and of the gate, and a seeded sample of them. Used by `mutation`.

The operators are those of cosmic-ray that need no arguments. Left out before the draw: changes inside of type
annotations, type aliases and `if TYPE_CHECKING`, mutants that do not compile, and those with the syntax tree of the
original. Strings, so docstrings and messages, are not changed by any operator.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
TARGETS = {
    "divergence": ("lmms_keyspace/divergence/*.py",),
    "capture": ("lmms_keyspace/capture/*.py",),
    "gate": ("reports/gate*.py", "reports/policy.py", "lmms_keyspace/stats/noninferiority.py"),
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        first, last: lines of the changed statement; of a compound one those before its body, of a function's head all.
        diff: the lines taken out and put in.
        source: the whole changed module.
    """

    path: str
    operator: str
    occurrence: int
    line: int
    first: int
    last: int
    definition: str
    diff: str
    source: str

    @property
    def digest(self) -> str:
        """Its name in the log."""
        return hashlib.sha256(f"{self.path}\n{self.source}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Place:
    """Where an operator applies, before the change is made."""

    path: Path
    operator: str
    occurrence: int
    line: int
    definition: str

    def rank(self, seed: int) -> str:
        """Its place in the seeded order."""
        name = f"{seed} {self.path.relative_to(ROOT).as_posix()} {self.operator} {self.occurrence}"
        return hashlib.sha256(name.encode()).hexdigest()

    def mutant(self) -> Mutant | None:
        """The change, or None where it does not compile or changes nothing."""
        source = self.path.read_text(encoding="utf-8")
        changed = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        try:
            if changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
                return None
        except SyntaxError:
            return None
        lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm="")
        diff = "\n".join(line for line in lines if line[:3] not in ("---", "+++") and line[0] in "-+")
        path = self.path.relative_to(ROOT).as_posix()
        first, last = _statement(ast.parse(source), self.line)
        return Mutant(path, self.operator, self.occurrence, self.line, first, last, self.definition, diff, changed)


def places(path: Path) -> Iterator[Place]:
    """All places of a module that the operators change, types left out."""
    source = path.read_text(encoding="utf-8")
    nodes = list(ast_nodes(get_ast(source)))
    types = [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in _types(ast.parse(source))
    ]
    for name in operator_names():
        if get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        positions = ((node, start) for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (node, start) in enumerate(positions):
            if not any(first <= start < last for first, last in types):
                yield Place(path, name, occurrence, start[0], ASTQuery(node).get_definition_name())


def _statement(tree: ast.Module, line: int) -> tuple[int, int]:
    """The lines that decide whether a change on `line` is run."""
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= line <= _last(node)]
    if not around:  # a decorator
        return line, line
    inner = max(around, key=lambda node: node.lineno)
    if isinstance(inner, ast.For | ast.While | ast.If | ast.With | ast.Try):
        return inner.lineno, inner.body[0].lineno - 1
    return inner.lineno, _last(inner)


def _last(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _types(tree: ast.Module) -> Iterator[Any]:
    """The nodes that only speak to a type checker: annotations, type aliases, blocks under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns:
            yield node.returns
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield node
    alias = ast.Name | ast.Attribute | ast.Subscript | ast.BinOp | ast.BitOr | ast.List | ast.Tuple | ast.Load
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            within = ast.walk(node.value)
            if all(isinstance(one, alias) or (isinstance(one, ast.Constant) and one.value is None) for one in within):
                yield node.value


def sources() -> list[Path]:
    """The files that are changed."""
    return [file for patterns in TARGETS.values() for pattern in patterns for file in sorted(ROOT.glob(pattern))]


def target_of(path: str) -> str:
    """The target that a file belongs to."""
    return next(name for name, patterns in TARGETS.items() if any(fnmatch(path, pattern) for pattern in patterns))


def sample(seed: int, n: int) -> tuple[list[Mutant], int]:
    """The n mutants of smallest seeded hash, and the number of places they were drawn from.

    So an edit of one module leaves the sample of the others nearly as it is.
    """
    drawn = sorted((place for file in sources() for place in places(file)), key=lambda place: place.rank(seed))
    found: list[Mutant] = []
    for place in drawn:
        if len(found) == n:
            break
        mutant = place.mutant()
        if mutant is not None:
            found.append(mutant)
    return found, len(drawn)
