"""What capture costs a run of `keyspace_llava`: keys, labels, sample and attention mass together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import workload
from timing import Measured, in_parts, seconds
from wrapped import CutRun, Requests, ours, quiet


def capture_bundled(device: torch.device, rounds: int) -> Measured:
    """`keyspace_llava` on the 1,800 documents of the text bias probe, batch 8, capture=on over capture=off.

    A round is the next 72 documents of the run (25 rounds make 1,800, whatever `rounds` says), see `_cut`.
    """
    return _cut(Requests(), 72, device)


def capture_random_llava(device: torch.device, rounds: int) -> Measured:
    """The same on a random LLaVA (width 512, 8 layers, 196 image tokens); a round is a batch of 8 documents."""
    with tempfile.TemporaryDirectory() as folder:
        path = workload.save(*workload.random_llava(), Path(folder))
        return _cut(Requests(pictures=8 * rounds, new_tokens=workload.NEW_TOKENS), 8, device, path)


def _cut(requests: Requests, per_part: int, device: torch.device, path: Path | None = None) -> Measured:
    """Three runs over the same documents, part by part: with capture, without, without again.

    Each part is a round. The ratio of the whole runs in the note counts what comes before the first part too: reading
    the requests, and with capture labeling all prompts and drawing the sample. The end of the run (tables, divergence,
    files) is told apart, because it does not grow with the documents that are not sampled.
    """
    quiet()
    runs = [
        CutRun(ours(requests, batch=8, capture=capture, pretrained=path), requests, per_part)
        for capture in (True, False, False)
    ]
    warm_up = CutRun(ours(requests, batch=8, capture=True, pretrained=path), requests, per_part)
    warm_up.start()
    warm_up.parts[0]()
    starts = [seconds(run.start, device) for run in runs]
    parts = in_parts(*(run.parts for run in runs), device)
    ends = [seconds(run.end, device) for run in runs]
    one, other, again = (start + sum(part) for start, part in zip(starts, parts, strict=True))
    note = (
        f"{len(requests.instances)} documents in {len(parts[0])} parts; the whole runs {2 * one / (other + again):.3f} "
        f"({one:.2f} s, without {other:.2f} s and {again:.2f} s), before the first part {starts[0]:.2f} s, without "
        f"{starts[1]:.2f} s and {starts[2]:.2f} s; the end of the run {ends[0]:.2f} s, without {ends[1]:.2f} s"
    )
    rounds = list(zip(*parts, strict=True))
    return Measured([2 * a / (b + c) for a, b, c in rounds], [c / b for _, b, c in rounds], note)
