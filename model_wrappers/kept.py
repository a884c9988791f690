"""What was made of pictures, picture by picture: by the image processor, or by the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

# What was made of one picture: named tensors.
Made = Mapping[str, torch.Tensor]


class Kept:
    """What was made of pictures, kept while requests wait that will show them, as far as there is room.

    Attributes:
        room: numbers that there is room for in all.
    """

    def __init__(self, values: int) -> None:
        self.room = values
        self._free = values
        self._waiting: Counter[Hashable] = Counter()  # name of a picture -> requests that will still show it
        self._made: dict[Hashable, Made] = {}

    def __len__(self) -> int:
        return len(self._made)

    def expect(self, name: Hashable) -> None:
        """One request more will show a picture."""
        self._waiting[name] += 1

    @property
    def shown_again(self) -> int:
        """Pictures that several requests will show."""
        return sum(requests > 1 for requests in self._waiting.values())

    def repeated(self, shown: Iterable[Hashable]) -> bool:
        """Whether a picture of a batch is in it twice, was shown before or will be shown later."""
        return any(self._waiting[name] > 1 or name in self._made for name in shown)

    def of(
        self, shown: Sequence[Hashable], make: Callable[[list[Hashable]], Sequence[Made] | None]
    ) -> list[Made] | None:
        """What was made of each picture of a batch, in order.

        Args:
            make: makes it of the pictures that are not kept, in order; None where it cannot.
        """
        new = list(dict.fromkeys(name for name in shown if name not in self._made))
        fresh = make(new) if new else []
        if fresh is None:
            return None
        made = self._made | dict(zip(new, fresh, strict=True))
        in_order = [made[name] for name in shown]
        self._waiting.subtract(shown)
        for name in dict.fromkeys(shown):
            if self._waiting[name] > 0:
                self._keep(name, made[name])
            elif name in self._made:
                self._free += _numbers(self._made.pop(name))
        return in_order

    def _keep(self, name: Hashable, made: Made) -> None:
        if name not in self._made and _numbers(made) <= self._free:
            # A part of the batch's tensor would hold all of its memory.
            self._made[name] = {part: values.clone() for part, values in made.items()}
            self._free -= _numbers(made)


def _numbers(made: Made) -> int:
    return sum(values.numel() for values in made.values())


def by_picture(visual: Mapping[str, Any], pictures: int) -> list[Made] | None:
    """An image processor's output for several pictures, apart; None where it is not known which part is of which.

    Known are one entry for each picture and, with `image_grid_thw` `[pictures, 3]`, one for each patch of its grid.
    """
    values, grids = visual.get("pixel_values"), visual.get("image_grid_thw")
    if set(visual) - {"image_grid_thw"} != {"pixel_values"} or not isinstance(values, torch.Tensor):
        return None
    sizes = [1] * pictures if grids is None else grids.prod(-1).tolist()
    if len(sizes) != pictures or sum(sizes) != len(values):
        return None
    parts = [{"pixel_values": part} for part in values.split(sizes)]
    if grids is not None:
        for part, grid in zip(parts, grids.split(1), strict=True):
            part["image_grid_thw"] = grid
    return parts


def joined(parts: Sequence[Made]) -> dict[str, torch.Tensor] | None:
    """What `by_picture` took apart, in any order; None where the pictures do not fit together."""
    if len({part["pixel_values"].shape[1:] for part in parts}) > 1:
        return None
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
