"""The one error that bad input gets: it names the argument, the value and the way out."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    Args:
        argument: name of the argument, file or setting, as the user wrote it.
        value: the offending value.
        way_out: one sentence that says what to do instead.
    """

    def __init__(self, argument: str, value: object, way_out: str) -> None:
        super().__init__(f"{argument}={value!r}: {way_out}")
        self.argument = argument
        self.value = value
        self.way_out = way_out
