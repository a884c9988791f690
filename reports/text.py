"""Makes a name that a run brought along fit to be shown: one line, no control characters, not longer than a name."""

from __future__ import annotations

import unicodedata

LONGEST_NAME = 80
LONGEST_SENTENCE = 500
# Control characters move a terminal's cursor and color its text; bidirectional controls (a part of "Cf") show a name in
# another order than it was written in. "Cs" is half a surrogate pair, which no file can hold.
_UNSHOWN = ("Cc", "Cf", "Cs")
_JOINERS = "\u200c\u200d"  # harmless, and needed by some scripts and by emoji


def one_line(text: str, longest: int = LONGEST_NAME) -> str:
    """White space becomes single spaces, what cannot be shown U+FFFD; cut to `longest` characters with an ellipsis."""
    # A cut before the work, too: names of a megabyte happen to whoever passes a file's content for its name.
    words = " ".join(text[: 4 * longest].split())
    shown = "".join(
        "\ufffd" if unicodedata.category(c) in _UNSHOWN and c not in _JOINERS else c for c in words[: longest + 1]
    )
    return shown if len(shown) <= longest and len(text) <= 4 * longest else shown[: longest - 1] + "…"
