"""The generated probes in Chinese: the same groups and pictures, with questions, sentences and answers in Chinese."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmms_keyspace.errors import InputError
from lmms_keyspace.outcomes import (
    AUTHORITY,
    BEFORE,
    CAPTION_ORACLE,
    CONFLICT,
    FILLER,
    IRRELEVANT,
    MATCH,
    OPINION,
    PAIR_CONDITIONS,
    TEXT_ONLY_CONFLICT,
)
from lmms_keyspace.tasks.captions import edge, size

if TYPE_CHECKING:
    from lmms_keyspace.tasks.probes import Case

NUMERALS = ("一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二")
WORDS = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "white": "白色",
    "pink": "粉色",
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "cross": "十字形",
    "diamond": "菱形",
    "star": "星形",
    "one": "一个",
    "two": "两个",
    "three": "三个",
    "four": "四个",
    "left": "左边",
    "right": "右边",
    "top": "上边",
    "bottom": "下边",
}
_FRAMES = (
    "便条上写着{claim}。",
    "图片说明写道{claim}。",
    "有人写道{claim}。",
    "标签上写着{claim}。",
    "有人告诉我{claim}。",
    "大家都知道{claim}。",
)
_OPINIONS = ("我认为{claim}。", "在我看来{claim}。", "我很确定{claim}。")
_EXPERTS = ("一位专家确认{claim}。", "官方报告指出{claim}。", "教授解释说{claim}。")
_CLAIMS = {
    "color": ("{noun}是{value}的", "{noun}的颜色是{value}"),
    "shape": ("{noun}是{value}的", "{noun}的形状是{value}"),
    "count": ("图中有{value}{noun}", "图里能看到{value}{noun}"),
    "position": ("{noun}靠近{value}", "{noun}在{value}"),
    "size": ("较大的{noun}是{value}的", "较大的{noun}的颜色是{value}"),
}
_QUESTIONS = {
    "color": "物体是什么颜色?",
    "shape": "物体是什么形状?",
    "count": "图中有几个{noun}?",
    "position": "{noun}靠近哪一边?",
    "size": "较大的物体是什么颜色?",
}
_INSTRUCTION = "请用一个词回答。"
# Things that no picture shows, and words of the answers' kind outside every pool.
_ABSENT = {
    "color": ("汽车", "大门", "小船"),
    "shape": ("招牌", "窗户", "风筝"),
    "count": ("小鸟", "杯子", "书本"),
    "position": ("台灯", "椅子", "时钟"),
    "size": ("汽车", "大门", "小船"),
}
_OTHER_WORDS = {
    "color": ("棕色", "黑色"),
    "shape": ("心形", "环形"),
    "count": ("五个", "六个"),
    "position": ("前面", "后面"),
    "size": ("棕色", "黑色"),
}
# Sentences about nothing, by their number of characters: as long as the claim they stand in for.
FILLERS: dict[int, tuple[str, str]] = {
    5: ("商店开门早", "火车来得晚"),
    6: ("商店很早开门", "火车总是晚点"),
    7: ("商店早上就开门", "火车今天来得晚"),
    8: ("商店早上六点开门", "火车每天都会晚点"),
    9: ("商店每天早上都开门", "去海边的火车会晚点"),
    10: ("商店每天早上六点开门", "去海边的火车总是晚点"),
    11: ("商店每天早上六点半开门", "去海边的火车今天会晚点"),
}
_SIZES = {"large": "大的", "small": "小的", "medium-sized": "中等大小的"}


def translated(case: Case) -> Case:
    """A case of a core probe with its words in Chinese; picture, gold and lure stay what they are.

    Raises:
        InputError: a case in whose picture an English word is written.
    """
    if "written" in case.spec:
        raise InputError("lang", "zh", "the words written in the pictures are English; take en")
    asked = _asked(case)
    return replace(
        case,
        context=_context(case, _noun(case, asked)),
        question=_QUESTIONS[asked].format(noun=_noun(case, asked)),
        gold=WORDS[case.gold],
        lure=WORDS[case.lure],
        options=tuple(WORDS[word] for word in case.options),
        pool=tuple(WORDS[word] for word in case.pool),
    )


def prompt(question: str, context: str) -> str:
    """The text of a user turn."""
    return f"{context}{question}\n{_INSTRUCTION}"


def framed(claim: str, template: int) -> str:
    """A claim in the words of one of the six frames."""
    return _FRAMES[template].format(claim=claim)


def _asked(case: Case) -> str:
    """The family whose question a case asks; those of a pair ask for two things in turn."""
    if case.condition in PAIR_CONDITIONS:
        return case.family.split("_")[PAIR_CONDITIONS.index(case.condition) % 2]
    return case.family


def _noun(case: Case, asked: str) -> str:
    return WORDS[case.spec["objects"][0]["shape"]] if asked in ("count", "position") else "物体"


def _context(case: Case, noun: str) -> str:
    template = case.template
    if case.condition == CAPTION_ORACLE:
        return _caption(case.spec)
    if case.condition == IRRELEVANT:
        r = random.Random(f"zh/{case.group_id}")
        absent, other = r.choice(_ABSENT[case.family]), r.choice(_OTHER_WORDS[case.family])
        return framed(_claim(case.family, absent, other, template), template)
    if case.condition == MATCH:
        return framed(_claim(case.family, noun, WORDS[case.gold], template), template)
    if case.condition not in (CONFLICT, TEXT_ONLY_CONFLICT, BEFORE, OPINION, AUTHORITY, FILLER):
        return ""
    false = _claim(case.family, noun, WORDS[case.lure], template)
    if case.condition == FILLER:
        return framed(FILLERS[len(false)][template // 2 % 2], template)
    if case.condition in (OPINION, AUTHORITY):
        frames = _OPINIONS if case.condition == OPINION else _EXPERTS
        return frames[template // 2].format(claim=false)
    return framed(false, template)


def _claim(family: str, noun: str, value: str, template: int) -> str:
    claims = _CLAIMS[family]
    return claims[template % len(claims)].format(noun=noun, value=value)


def _caption(spec: dict[str, Any]) -> str:
    described = [
        f"一个靠近{WORDS[edge(thing)]}的{_SIZES[size(thing)]}{WORDS[thing['color']]}{WORDS[thing['shape']]}"
        for thing in spec["objects"]
    ]
    return f"图中有{'和'.join(described)}。"
