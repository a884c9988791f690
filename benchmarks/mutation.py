"""Mutation testing of the estimators, of capture and of the gate: do the tests notice a change of the code?

    pip install -e '.[dev,mutation]'
    python benchmarks/mutation.py [--seed 0] [--n 300] [--log runs/mutation.jsonl] [--again | --show]

A sample of mutants (see `mutants`) meets the tests that run the changed statement. Each mutant is imported in place of
its module by a forked child of a process that holds the third-party packages and nothing of ours, so it costs the time
of its tests, and no file is changed. Tests by hypothesis draw 20 examples, always the same. A mutant that makes the
tests take 20 s of processor time and three times what they should counts as killed. A run goes on where its log ends.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest
import torch
from coverage import Coverage
from mutants import ROOT, TARGETS, Mutant, sample, sources, target_of

# The tests that belong to a target. A mutant meets those that run its lines, file by file, fast ones first.
TESTS = {
    "divergence": ["tests/divergence"],
    "capture": ["tests/test_sinks.py", "tests/capture", "tests/test_capture_limits.py"],
    "gate": [
        "tests/stats/test_noninferiority.py",
        "tests/stats/test_detectable_loss.py",
        "tests/reports/test_gate.py",
        "tests/reports/test_gate_scores.py",
    ],
}
KILLED, TIMEOUT, SURVIVED = "killed", "timeout", "survived"
_MEMORY = 8 << 30  # bytes of data a child may hold


class Watch:
    """A pytest plugin that keeps the first failure and what each test costs and runs."""

    def __init__(self, coverage: Coverage | None) -> None:
        self.failed = ""
        self.seconds: dict[str, float] = {}
        self._coverage = coverage

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if self._coverage is not None:
            self._coverage.switch_context(item.nodeid)
        began = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - began
        return result

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


@dataclass(frozen=True)
class Baseline:
    """The tests of a target on the unchanged code.

    Attributes:
        seconds: test -> processor time.
        runs: path -> line -> tests that run it; "" stands for the import.
        modules: the third-party modules that they import.
    """

    seconds: dict[str, float]
    runs: dict[str, dict[str, list[str]]]
    modules: list[str]

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that run the changed statement, or all where it runs at import."""
        lines = self.runs.get(mutant.path, {})
        found = {test for line in range(mutant.first, mutant.last + 1) for test in lines.get(str(line), [])}
        chosen = [test for test in self.seconds if test in found or "" in found or not found]
        of_file: dict[str, float] = defaultdict(float)
        for test in chosen:
            of_file[test.split("::")[0]] += self.seconds[test]
        return sorted(chosen, key=lambda test: (of_file[test.split("::")[0]], self.seconds[test]))


class Runner:
    """Runs tests in forked children, and learns from the unchanged code which modules to hold and what tests run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._baselines: dict[str, Baseline] = {}

    def status(self, mutant: Mutant) -> tuple[str, str]:
        """What became of a mutant, and the test that killed it."""
        baseline = self._baseline(target_of(mutant.path))
        tests = baseline.tests_of(mutant)
        limit = int(3 * sum(baseline.seconds[test] for test in tests)) + 20
        code, report = self._run(tests, limit, mutant)
        if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
            return TIMEOUT, ""
        return (SURVIVED, "") if code == 0 else (KILLED, report.get("failed") or "at import")

    def _baseline(self, target: str) -> Baseline:
        if target not in self._baselines:
            code, report = self._run(TESTS[target], 600, None)
            if code != 0:
                raise SystemExit(f"the tests fail on the unchanged code: {report.get('failed', code)}")
            baseline = self._baselines[target] = Baseline(report["seconds"], report["runs"], report["modules"])
            for name in baseline.modules:
                importlib.import_module(name)
            ours = [name for name in sys.modules if name.startswith("lmms_keyspace")]
            if ours:
                raise SystemExit(f"{ours[0]} was imported by a third-party package")
        return self._baselines[target]

    def _run(self, tests: Sequence[str], seconds: int, mutant: Mutant | None) -> tuple[int, dict[str, Any]]:
        """The exit code (a signal as its negative) and the report of a child; `seconds` is of processor time."""
        answer = self._folder / "report.json"
        answer.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._in_child(tests, seconds, mutant, answer)
        _, state = os.waitpid(child, 0)
        report = json.loads(answer.read_text()) if answer.exists() else {}
        return os.waitstatus_to_exitcode(state), report

    def _in_child(self, tests: Sequence[str], seconds: int, mutant: Mutant | None, answer: Path) -> NoReturn:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30 * seconds)  # for what waits instead of working
        coverage = None
        if mutant is None:
            coverage = Coverage(data_file=None, include=[str(file) for file in sources()], config_file=False)
            coverage.start()
        else:
            serve(ROOT / mutant.path, mutant.source)
        watch = Watch(coverage)
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile=mutation"]
        code = pytest.main([*tests, *options, f"--basetemp={self._folder / 'tests'}"], plugins=[watch])
        report: dict[str, Any] = {"failed": watch.failed}
        if coverage is not None:
            coverage.stop()
            report |= {"seconds": watch.seconds, "modules": third_party(), "runs": tests_by_line(coverage)}
        answer.write_text(json.dumps(report))
        os._exit(code)


def tests_by_line(coverage: Coverage) -> dict[str, dict[str, list[str]]]:
    """Path -> line -> the tests that ran it."""
    data = coverage.get_data()
    return {
        Path(file).relative_to(ROOT).as_posix(): {str(n): tests for n, tests in data.contexts_by_lineno(file).items()}
        for file in data.measured_files()
    }


def serve(path: Path, source: str) -> None:
    """Import this source in place of the file's."""
    original = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        if Path(self.path).resolve() == path:
            return compile(source, self.path, "exec", dont_inherit=True)
        return original(self, fullname)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def third_party() -> list[str]:
    """Names of the imported modules that are installed packages, except ours."""
    found = []
    for name, module in list(sys.modules.items()):
        origin = str(getattr(getattr(module, "__spec__", None), "origin", None))
        named = getattr(module, "__name__", None) == name
        if named and "site-packages" in origin and not name.startswith(("lmms_", "_pytest", "pytest")):
            found.append(name)
    return found


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """Digest -> the latest record of the log."""
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {record["digest"]: record for record in records}


def table(mutants: Sequence[Mutant], log: dict[str, dict[str, Any]]) -> str:
    """Killed share by target as Markdown, then the survivors."""
    lines = ["| target | mutants run | killed | of these by time | survived | killed share |", f"|{'---|' * 6}"]
    done = [log[mutant.digest] for mutant in mutants if mutant.digest in log]
    for target in (*TARGETS, "all"):
        of_target = [one for one in done if target in ("all", target_of(one["path"]))]
        count = Counter(one["status"] for one in of_target)
        killed = count[KILLED] + count[TIMEOUT]
        share = f"{killed / len(of_target):.1%}" if of_target else ""
        lines.append(f"| {target} | {len(of_target)} | {killed} | {count[TIMEOUT]} | {count[SURVIVED]} | {share} |")
    survivors = sorted((one for one in done if one["status"] == SURVIVED), key=lambda one: (one["path"], one["line"]))
    for one in survivors:
        lines.append(f"\n{one['path']}:{one['line']} in {one['definition']} ({one['operator']})\n{one['diff']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--log", type=Path, default=ROOT / "runs" / "mutation.jsonl")
    parser.add_argument("--again", action="store_true", help="run the survivors of the log again")
    parser.add_argument("--show", action="store_true", help="run nothing: print what the log says")
    given = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile(
        "mutation", derandomize=True, database=None, deadline=None, max_examples=20, phases=phases
    )
    mutants, population = sample(given.seed, given.n)
    print(f"{len(mutants)} mutants of {population} places, seed {given.seed}", flush=True)
    given.log.parent.mkdir(parents=True, exist_ok=True)
    log = read_log(given.log)
    folder = Path(tempfile.mkdtemp(prefix="mutation-"))
    try:
        runner = Runner(folder)
        for i, mutant in enumerate(mutants):
            known = log.get(mutant.digest)
            if given.show or (known and not (given.again and known["status"] == SURVIVED)):
                continue
            status, by = runner.status(mutant)
            record = {key: value for key, value in asdict(mutant).items() if key != "source"}
            log[mutant.digest] = record | {"digest": mutant.digest, "status": status, "by": by}
            with given.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(log[mutant.digest]) + "\n")
            print(f"{i + 1:4} {status:9} {mutant.path}:{mutant.line} {mutant.operator}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(table(mutants, log))


if __name__ == "__main__":
    main()
