"""One of two processes of a run is killed, without a launcher that would end the other: how long does that one wait?"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import fault_stages as stages
from transformers import GenerationMixin


def kill_one(folder: Path, limit_s: float = 600) -> str:
    """What is wrong with how the other process ends; empty where nothing is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command, log = stages.evaluate(folder / "run", "--model", "keyspace_llava"), folder / "log"
    ranks = {_start(command, rank, port, log): rank for rank in (0, 1)}
    ended: dict[int, tuple[int, float]] = {}
    due = time.monotonic() + limit_s
    while len(ended) < len(ranks) and time.monotonic() < due:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            ended[ranks[pid]] = (os.waitstatus_to_exitcode(status), time.monotonic())
        time.sleep(0.1)
    for pid, rank in ranks.items():
        if rank not in ended:
            os.kill(pid, signal.SIGKILL)
            return f"process {rank} did not end"
    (code, last), (died, first) = ended[0], ended[1]
    print(f"the first process ended {last - first:.1f} s after the second")
    said = log.read_text(errors="replace")
    records = [json.loads(path.read_text()) for path in (folder / "run").rglob("*_keyspace.json")]
    if died != -signal.SIGKILL or code != 1 or "another process of this run ended" not in said:
        return f"exits {code} and {died}: {said[-2000:]}"
    return "" if [record["complete"] for record in records] == [False] else f"records: {records}"


def _start(command: list[str], rank: int, port: str, log: Path) -> int:
    said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    child = os.fork()
    if child == 0:
        stages.be(command, said, lambda: _one_of_two(rank, port))
    os.close(said)
    return child


def _one_of_two(rank: int, port: str) -> None:
    """As a launcher sets it; the second process is killed at its second batch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    generate, calls = GenerationMixin.generate, []

    def killed(*args: object, **kwargs: object) -> object:
        calls.append(kwargs)
        if rank == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*args, **kwargs)

    GenerationMixin.generate = killed  # type: ignore[method-assign]
