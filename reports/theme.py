"""The colors of the page and of its figures, in light and in dark.

Every pair of text and ground keeps a contrast of 4.5 to 1 or more, every mark one of 3 to 1. Runs take the series in
turn, the base the gray one; a mark of its own shape goes with every color, so that no meaning hangs on color alone.
"""

from __future__ import annotations

N_SERIES = 8
MARKERS = ("o", "s", "^", "D", "v", "P", "h", "o")  # as matplotlib names them
SYMBOLS = "●■▲◆▼✚⬢●"  # the same shapes as text
# What is not a run (answers, modalities) takes the last two series.
FIRST_OTHER = 6

LIGHT = {
    "paper": "#ffffff",
    "raised": "#f3f5f8",
    "ink": "#1b1f24",
    "muted": "#59626d",
    "grid": "#d5dae0",
    "link": "#0a58b5",
    "good": "#0a7046",
    "bad": "#b3261d",
    "series-0": "#4c5661",
    "series-1": "#0b62b8",
    "series-2": "#b84a00",
    "series-3": "#0a7a4f",
    "series-4": "#8a3ab9",
    "series-5": "#a1174f",
    "series-6": "#00707a",
    "series-7": "#8f5d00",
}
DARK = {
    "paper": "#14171a",
    "raised": "#1f2429",
    "ink": "#e8eaed",
    "muted": "#a8b1bb",
    "grid": "#3a424a",
    "link": "#7db8ff",
    "good": "#4fd1a0",
    "bad": "#ff8a80",
    "series-0": "#b4bcc5",
    "series-1": "#6cb2ff",
    "series-2": "#ff9d5c",
    "series-3": "#4fd1a1",
    "series-4": "#d19bff",
    "series-5": "#ff86b0",
    "series-6": "#4fd0dc",
    "series-7": "#e5b84a",
}
