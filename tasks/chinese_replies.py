"""From a Chinese reply to the answer that it names: Chinese does not part its words, so names are looked for anywhere
in the first sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmms_keyspace.tasks.chinese import NUMERALS

_COUNTED = ("一个", "两个", "三个", "四个")
# Other ways to say an answer, found anywhere in a reply; the longest first.
_ALIASES = {
    "粉红色": "粉色",
    "粉红": "粉色",
    "橘色": "橙色",
    "方形": "正方形",
    "十字": "十字形",
    "二个": "两个",
    **{f"{digit}个": word for digit, word in zip("1234", _COUNTED, strict=True)},
    **{f"{side}{end}": f"{side}边" for side in "左右上下" for end in ("侧", "面", "方", "边缘")},
    **{color: f"{color}色" for color in "红绿蓝黄紫橙白粉"},
}
# And those that must be the whole reply.
_WHOLE = {
    "两": "两个",
    **dict(zip("一二三四", ("一个", "两个", "三个", "四个"), strict=True)),
    **dict(zip("1234", _COUNTED, strict=True)),
    **{side: f"{side}边" for side in "左右上下"},
}
_SENTENCE_END = re.compile(r"[。!?\n]")
_NUMBER = re.compile(r"\d+|[零一二两三四五六七八九十]+")


def parse(response: str, pool: Sequence[str]) -> str | None:
    """The word of `pool` that the first sentence of a reply names, or None; two different ones name none."""
    sentence = _SENTENCE_END.split(response.strip(), maxsplit=1)[0].strip(" .,*\"'")
    numbers = {word.removesuffix("点").replace("两", "二"): word for word in pool}
    if set(numbers) <= set(NUMERALS):
        return numbers.get(_number(sentence) or "")
    if _WHOLE.get(sentence) in pool:
        return _WHOLE[sentence]
    names = {word: word for word in pool} | {alias: word for alias, word in _ALIASES.items() if word in pool}
    by_length = sorted(names, key=len, reverse=True)
    found = re.findall("|".join(map(_pattern, by_length)), sentence, re.IGNORECASE)
    folded = {name.casefold(): word for name, word in names.items()}
    answers = {folded[name.casefold()] for name in found}
    return answers.pop() if len(answers) == 1 else None


def _number(sentence: str) -> str | None:
    """The one number of a sentence, as a Chinese numeral; zeros, as in 3:00, are no number."""
    said = {_numeral(token) for token in _NUMBER.findall(sentence) if token.strip("0零")}
    return said.pop() if len(said) == 1 else None


def _numeral(token: str) -> str:
    if token.isdecimal():
        return NUMERALS[int(token) - 1] if int(token) <= len(NUMERALS) else token
    return token.replace("两", "二")


def _pattern(name: str) -> str:
    """Letters and English labels are words of their own."""
    return rf"(?<![A-Za-z]){name}(?![A-Za-z])" if name.isascii() else re.escape(name)
