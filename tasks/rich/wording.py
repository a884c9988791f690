"""What is asked and said of the rich families, in English and in Chinese.

Labels inside a picture are English in both languages, and so are the answers that are labels. A claim has two forms,
which with the six frames of its language make twelve paraphrases; a task uses six of them, as the core families do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lmms_keyspace import scenes
from lmms_keyspace.tasks import chinese
from lmms_keyspace.tasks.rich.drawing import COLUMNS, NUMBERS


class Wording(NamedTuple):
    """Question, what a sentence claims, and the same of a thing that no picture shows, with words outside the pool."""

    question: str
    claims: tuple[str, str]
    absent: tuple[str, str]
    absent_words: tuple[str, str]


_ENGLISH = {
    "digit": Wording(
        "Which digit is shown?",
        ("the digit is {value}", "the picture shows the digit {value}"),
        ("the floor is {value}", "the ticket shows the number {value}"),
        ("ten", "eleven"),
    ),
    "letter": Wording(
        "Which letter is shown?",
        ("the letter is {value}", "the picture shows the letter {value}"),
        ("the platform is {value}", "the ticket shows the platform {value}"),
        ("Q", "W"),
    ),
    "bar": Wording(
        "Which bar is the tallest?",
        ("the tallest bar is {value}", "the bar of {value} is the tallest"),
        ("the best cake is {value}", "the cake of {value} is the best"),
        ("walnut", "carrot"),
    ),
    "line": Wording(
        "In which month is the line highest?",
        ("the line is highest in {value}", "the highest point of the line is in {value}"),
        ("the shop is closed in {value}", "the busiest week of the shop is in {value}"),
        ("October", "December"),
    ),
    "pie": Wording(
        "What color is the largest slice?",
        ("the largest slice is {value}", "the color of the largest slice is {value}"),
        ("the largest boat is {value}", "the color of the largest boat is {value}"),
        ("brown", "black"),
    ),
    "clock": Wording(
        "Which hour does the clock show?",
        ("the clock shows {value}", "the hour on the clock is {value}"),
        ("the shop opens at {value}", "the hour of the meeting is {value}"),
        ("noon", "midnight"),
    ),
    "table": Wording(
        "Which number stands in row {row}, column {column}?",
        ("the number in row {row}, column {column} is {value}", "row {row}, column {column} holds the number {value}"),
        ("the number of chairs in the hall is {value}", "the small hall nearby holds the number {value}"),
        ("ten", "eleven"),
    ),
    "arrow": Wording(
        "Which way does the arrow point?",
        ("the arrow points {value}", "the direction of the arrow is {value}"),
        ("the window faces {value}", "the direction of the wind is {value}"),
        ("forward", "backward"),
    ),
    "dice": Wording(
        "How many dots does the die show?",
        ("the die shows {value}", "the number of dots on the die is {value}"),
        ("the box holds {value}", "the number of books on the shelf is {value}"),
        ("seven", "eight"),
    ),
}
_CHINESE = {
    "digit": Wording(
        "图中显示的是哪个数字?",
        ("图中的数字是{value}", "图中显示的数字是{value}"),
        ("门上的数字是{value}", "车票上写的号码是{value}"),
        ("十", "十一"),
    ),
    "letter": Wording(
        "图中显示的是哪个字母?",
        ("图中的字母是{value}", "图中显示的字母是{value}"),
        ("站台的字母是{value}", "车票上写的站台是{value}"),
        ("Q", "W"),
    ),
    "bar": Wording(
        "最高的柱子标着什么?",
        ("最高的柱子是{value}", "最高的柱子标着{value}"),
        ("最好的蛋糕是{value}", "最好的盒子标着{value}"),
        ("walnut", "carrot"),
    ),
    "line": Wording(
        "折线在哪个月最高?",
        ("折线在{value}最高", "折线的最高点在{value}"),
        ("商店在{value}关门", "商店最忙的一周在{value}"),
        ("October", "December"),
    ),
    "pie": Wording(
        "最大的扇形是什么颜色?",
        ("最大的扇形是{value}的", "最大的扇形的颜色是{value}"),
        ("最大的小船是{value}的", "最大的小船的颜色是{value}"),
        ("棕色", "黑色"),
    ),
    "clock": Wording(
        "时钟显示几点?",
        ("时钟显示{value}", "时钟上的时间是{value}"),
        ("商店开门是{value}", "开会的时间是{value}"),
        ("中午", "午夜"),
    ),
    "table": Wording(
        "{row}行{column}列的数字是几?",
        ("{row}行{column}列的数字是{value}", "表格中{row}行{column}列写着{value}"),
        ("大厅里椅子的数字是{value}", "旁边的小厅门上写着{value}"),
        ("十", "十一"),
    ),
    "arrow": Wording(
        "箭头指向哪一边?",
        ("箭头指向{value}", "箭头的方向是{value}"),
        ("窗户朝向{value}", "风的方向是{value}"),
        ("前面", "后面"),
    ),
    "dice": Wording(
        "骰子上有几个点?",
        ("骰子显示{value}", "骰子上的点数是{value}"),
        ("盒子上写着{value}", "书架上书的数字是{value}"),
        ("七", "八"),
    ),
}
_WORDINGS = {"en": _ENGLISH, "zh": _CHINESE}


def question(spec: dict[str, Any], lang: str) -> str:
    """What is asked of a picture."""
    return _WORDINGS[lang][spec["rich"]].question.format(**_cell(spec))


def hint(spec: dict[str, Any], value: str, template: int, lang: str) -> str:
    """A sentence which states that the answer is `value` (a word of the language), true or false."""
    claims = _WORDINGS[lang][spec["rich"]].claims
    return _framed(claims[template % len(claims)].format(value=value, **_cell(spec)), template, lang)


def irrelevant(family: str, value: int, template: int, lang: str) -> str:
    """The hint's sentence said of a thing that the picture does not show, with the `value`-th of two words outside the
    pool."""
    wording = _WORDINGS[lang][family]
    claim = wording.absent[template % len(wording.absent)].format(value=wording.absent_words[value])
    return _framed(claim, template, lang)


def answer(word: str, family: str, lang: str) -> str:
    """The word of a pool as the language writes it; labels and letters stay what they are."""
    if lang == "en" or family in ("letter", "bar", "line"):
        return word
    if word not in NUMBERS:
        return chinese.WORDS["top" if word == "up" else "bottom" if word == "down" else word]
    numeral = chinese.NUMERALS[NUMBERS.index(word)]
    return f"{'两' if word == 'two' else numeral}点" if family == "clock" else numeral


def _framed(claim: str, template: int, lang: str) -> str:
    return scenes.framed(claim, template) if lang == "en" else chinese.framed(claim, template)


def _cell(spec: dict[str, Any]) -> dict[str, str]:
    """Row and column that a table is asked for."""
    return {"row": spec["rows"][spec["row"]], "column": COLUMNS[spec["column"]]} if spec["rich"] == "table" else {}
