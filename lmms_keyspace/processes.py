"""How one process of an evaluation begins and ends: one date for all, interrupts, and no others left waiting."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Iterator


def of_rank_0(text: str) -> str:
    """`text` as rank 0 has it; its own where a run has one process."""
    import torch.distributed as dist  # not needed to import lmms_keyspace.harness, which must stay light

    texts = [text]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(texts, src=0)
    return texts[0]


def end_process(error: Exception, *, by_command_line: bool) -> None:
    """End this process, if it is one of several, so that its launcher ends the others too.

    lmms-eval's command line would print the error, go on and exit 0, and the others would wait for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and by_command_line:
        traceback.print_exception(error)
        raise SystemExit(1) from error


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, which a launcher sends when another process died, is an exception inside: what was captured is saved."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours:
        yield
        return

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait: a launcher sends them more than once, and would end the saving too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
