"""The sentences before a benchmark's question: someone says which option is the answer, or something else."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lmms_keyspace.outcomes import CONFLICT, IRRELEVANT, MATCH

IMAGE_MARK = re.compile(r"<image (\d+)>")
_LONGEST = 80  # characters of an option that a hint repeats beside its letter


@dataclass(frozen=True)
class _Language:
    frames: tuple[str, ...]
    claim: str
    letter_claim: str
    fillers: tuple[str, ...]


# No frame or filler holds a capital letter that stands alone: it could be taken for an option.
_LANGUAGES = {
    "en": _Language(
        (
            "One student says that {claim}.",
            "Someone wrote that {claim}.",
            "The note beside it says that {claim}.",
            "According to the teacher, {claim}.",
            "The study guide states that {claim}.",
            "My friend told me that {claim}.",
        ),
        "the answer is {letter} ({option})",
        "the answer is {letter}",
        ("the library closes at six", "the bus leaves at noon", "the shop opens early"),
    ),
    "zh": _Language(
        (
            "有位同学说{claim}。",
            "旁边的笔记写着{claim}。",
            "老师提到{claim}。",
            "参考书上说{claim}。",
            "我朋友告诉我{claim}。",
            "有人写道{claim}。",
        ),
        "答案是{letter} ({option})",
        "答案是{letter}",
        ("图书馆六点关门", "公交车中午出发", "商店早上很早开门"),
    ),
}


def hints(lang: str, options: Mapping[str, str], gold: str, lure: str, r: random.Random) -> dict[str, str]:
    """Condition -> sentence, all in one frame; `options` maps letters to texts, `gold` and `lure` are letters."""
    words = _LANGUAGES[lang]
    frame = r.choice(words.frames)
    filler = r.choice([text for text in words.fillers if not _names(text, options.values(), lang)] or words.fillers)
    return {
        MATCH: frame.format(claim=_claim(words, gold, options[gold])),
        CONFLICT: frame.format(claim=_claim(words, lure, options[lure])),
        IRRELEVANT: frame.format(claim=filler),
    }


def _claim(words: _Language, letter: str, option: str) -> str:
    if len(option) > _LONGEST or IMAGE_MARK.search(option):
        return words.letter_claim.format(letter=letter)
    return words.claim.format(letter=letter, option=option)


def _names(text: str, options: Collection[str], lang: str) -> bool:
    """Whether a text holds an option as a word of its own; Chinese does not part its words."""
    if lang == "zh":
        return any(option and option in text for option in options)
    return any(re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, re.IGNORECASE) for option in options if option)
