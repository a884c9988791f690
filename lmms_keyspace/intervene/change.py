"""What every intervention on a model shares: it can be switched off for a while, or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lmms_keyspace.families import Decoder
from lmms_keyspace.malora import ModalityMask


class Change:
    """A change of a model's forward pass, from now on. Subclasses put what they install on `_installed`.

    Args:
        decoder: of the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._on = True
        self._installed = ExitStack()
        self._modality, handles = ModalityMask.attach(decoder.model)
        for handle in handles:
            self._installed.callback(handle.remove)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched model inside."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def remove(self) -> None:
        """Take the hooks off and put back what was replaced."""
        self._installed.close()
