"""This process among those of a run (`accelerate launch --num_processes N`), and how they tell each other things.

Everything goes through a gloo group of our own: host memory and bytes on every backend, never a pickle, and no mixing
with lmms-eval's own collectives. When a process dies its connections close, so the others get an error and do not wait.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist


class Ranks:
    """The processes of a run. All of them must make the same calls in the same order; with one process all is local.

    Attributes:
        rank: number of this process; 0 measures and writes.
        size: how many there are.
    """

    def __init__(self) -> None:
        many = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if many else 0
        self.size = dist.get_world_size() if many else 1

    @functools.cached_property
    def _group(self) -> dist.ProcessGroup:
        return dist.new_group(backend="gloo")  # with lmms-eval's timeout: shards may end hours apart

    def share(self, content: bytes) -> list[bytes]:
        """Give `content` to all processes.

        Returns:
            What each of them gave, by rank.

        Raises:
            RuntimeError: another process ended.
        """
        if self.size == 1:
            return [content]
        shared = []
        for source, length in enumerate(self._lengths(len(content))):
            mine = source == self.rank
            buffer = _of_bytes(content) if mine else torch.empty(length, dtype=torch.uint8)
            if length:
                with _explained():
                    dist.broadcast(buffer, src=source, group=self._group)
            shared.append(content if mine else buffer.numpy().tobytes())
        return shared

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Bring the tensors of all processes to rank 0.

        Args:
            tensor: `[n, ...]`; n may differ between the processes, the other dimensions and the dtype may not.

        Returns:
            By rank, on the device of `tensor`; empty on every rank but 0.

        Raises:
            RuntimeError: another process ended.
        """
        if self.size == 1:
            return [tensor]
        lengths = self._lengths(len(tensor))
        if self.rank != 0:
            if len(tensor):
                with _explained():
                    dist.send(_as_bytes(tensor), dst=0, group=self._group)
            return []
        gathered = [tensor]
        for source, length in enumerate(lengths[1:], start=1):
            part = torch.empty((length, *tensor.shape[1:]), dtype=tensor.dtype)
            if length:
                with _explained():
                    dist.recv(_as_bytes(part), src=source, group=self._group)
            gathered.append(part.to(tensor.device))
        return gathered

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """As `gather`, for bytes."""
        return [part.numpy().tobytes() for part in self.gather(_of_bytes(content))]

    def _lengths(self, length: int) -> list[int]:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _explained():
            dist.all_gather(lengths, torch.tensor([length]), group=self._group)
        return [int(value) for value in lengths]


def _of_bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory, which gloo sends whatever the dtype."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError("another process of this run ended, its own messages say why") from error
