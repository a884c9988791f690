"""The one error that bad input gets: it names the argument, the value and the way out."""

from lmms_keyspace.redaction import without_secrets

_LONGEST = 1000  # characters of a value that a message shows


class InputError(ValueError):
    """Something the user gave cannot be used.

    Args:
        argument: name of the argument, file or setting, as the user wrote it.
        value: the offending value.
        way_out: one sentence that says what to do instead.
    """

    def __init__(self, argument: str, value: object, way_out: str) -> None:
        # A token given under a wrong name ends in a log. `repr` escapes what would move a terminal's cursor.
        shown = repr(without_secrets({argument: value})[argument])
        if len(shown) > _LONGEST:
            shown = shown[:_LONGEST] + "…"
        super().__init__(f"{argument}={shown}: {way_out}")
        self.argument = argument
        self.value = value
        self.way_out = way_out
