"""Bytes that capture holds and writes, against other ways, and its peak against the figure printed before the run."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import workload
from timing import Measured

from lmms_keyspace.capture import Capture
from lmms_keyspace.families import decoder_sites

_PAGE = os.sysconf("SC_PAGE_SIZE")
# The allocators give freed blocks back at once, so that resident memory is memory in use.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def memory_bundled(device: torch.device, rounds: int) -> Measured:
    """The bundled model, 768 documents (128 clusters of 6 conditions): peak of capture over the figure printed."""
    return _measured("bundled", 768)


def memory_random_llava(device: torch.device, rounds: int) -> Measured:
    """A random LLaVA (width 512, 8 layers, 196 image tokens), 64 documents."""
    return _measured("random_llava", 64)


def _measured(model: str, documents: int) -> Measured:
    """Each side in a process of its own, because memory that was freed is not given back to the machine."""
    plain, captured = (
        json.loads(
            subprocess.run(
                [sys.executable, __file__, model, str(documents), *flags],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | _ALLOCATOR,
            ).stdout
        )
        for flags in ([], ["--capture"])
    )
    ratio = (captured["grown"] - plain["grown"]) / captured["estimate"]
    shares = {name: value / captured["held"] for name, value in captured["others"].items()}
    note = (
        f"held {captured['held'] / 1e6:.1f} MB, written {captured['written'] / 1e6:.1f} MB, printed before "
        f"{captured['estimate'] / 1e6:.1f} MB; "
        + ", ".join(f"{name} {share:.0f} times" for name, share in shares.items())
    )
    return Measured([ratio], [], note)


class _Peak:
    """Highest resident memory while it runs, sampled every few milliseconds, less that at the start."""

    def __init__(self) -> None:
        gc.collect()
        self._start = self._highest = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._highest = max(self._highest, _resident())
            time.sleep(0.002)

    def grown(self) -> int:
        """Bytes."""
        self._stop.set()
        self._thread.join()
        return max(self._highest, _resident()) - self._start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _side(model: str, documents: int, capture: bool) -> dict[str, object]:
    device = torch.device("cpu")
    makers: dict[str, Callable[[], tuple[object, object]]] = {
        "bundled": workload.bundled,
        "random_llava": workload.random_llava,
    }
    work = workload.Workload(*makers[model](), device, documents=documents, batch=8)
    work.warm_up()
    peak = _Peak()
    if not capture:
        work.plain()()
        return {"grown": peak.grown()}
    made = work.captured()()
    grown = peak.grown()
    assert isinstance(made, Capture)
    decoder = decoder_sites(work.model)
    tokens = sum(int(inputs["attention_mask"].sum()) for _, inputs in work.batches)
    padded = sum(inputs["input_ids"].numel() for _, inputs in work.batches)
    itemsize = torch.empty(0, dtype=work.model.dtype).element_size()
    keys = sum(site.n_kv_heads * site.head_dim for site in decoder.sites)
    hidden = (len(decoder.sites) + 1) * decoder.text_config.hidden_size
    tables = (made.token_table(), made.attention_table())
    vectors = [made.keys("benchmark", layer=layer)[0] for layer in made.layers]
    return {
        "grown": grown,
        "estimate": made.memory_estimate(work.samplable(), selected=documents, documents=documents),
        "held": sum(layer.nbytes for layer in vectors) + sum(int(t.memory_usage(deep=True).sum()) for t in tables),
        "written": _written(tables),
        "others": {
            "output_hidden_states": padded * hidden * itemsize,
            "the keys of every token": tokens * keys * itemsize,
        },
    }


def _written(tables: tuple[object, ...]) -> int:
    """Bytes of the tables as they are saved; keys are not, unless asked for (less a sample for pictures)."""
    with tempfile.TemporaryDirectory() as folder:
        for number, table in enumerate(tables):
            table.to_parquet(Path(folder) / f"{number}.parquet")
        return sum(path.stat().st_size for path in Path(folder).iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("documents", type=int)
    parser.add_argument("--capture", action="store_true")
    given = parser.parse_args()
    print(json.dumps(_side(given.model, given.documents, given.capture)))


if __name__ == "__main__":
    main()
