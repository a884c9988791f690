"""The text bias probe in Chinese: the same groups and pictures, with questions, sentences and answers in Chinese."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from lmms_keyspace.outcomes import CONFLICT, IRRELEVANT, MATCH, TEXT_ONLY_CONFLICT
from lmms_keyspace.tasks.probes import Case

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
# Other ways to say an answer, found anywhere in a reply; the longest first.
_ALIASES = {
    "粉红色": "粉色",
    "粉红": "粉色",
    "橘色": "橙色",
    "方形": "正方形",
    "十字": "十字形",
    "二个": "两个",
    **{f"{digit}个": word for digit, word in zip("1234", ("一个", "两个", "三个", "四个"), strict=True)},
    **{f"{side}{end}": f"{side}边" for side in "左右上下" for end in ("侧", "面", "方", "边缘")},
    **{color: f"{color}色" for color in "红绿蓝黄紫橙白粉"},
}
# And those that must be the whole reply.
_WHOLE = dict(zip("一二三四", ("一个", "两个", "三个", "四个"), strict=True)) | {
    "两": "两个",
    **dict(zip("1234", ("一个", "两个", "三个", "四个"), strict=True)),
    **{side: f"{side}边" for side in "左右上下"},
}
_FRAMES = (
    "便条上写着{claim}。",
    "图片说明写道{claim}。",
    "有人写道{claim}。",
    "标签上写着{claim}。",
    "有人告诉我{claim}。",
    "大家都知道{claim}。",
)
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


def translated(case: Case) -> Case:
    """A case of `textbias_probe` with its words in Chinese; picture, gold and lure stay what they are."""
    family = case.family
    noun = WORDS[case.spec["objects"][0]["shape"]] if family in ("count", "position") else "物体"
    told = {MATCH: case.gold, CONFLICT: case.lure, TEXT_ONLY_CONFLICT: case.lure}
    context = ""
    if case.condition in told:
        context = _sentence(case, noun, WORDS[told[case.condition]])
    elif case.condition == IRRELEVANT:
        r = random.Random(f"zh/{case.group_id}")
        context = _sentence(case, r.choice(_ABSENT[family]), r.choice(_OTHER_WORDS[family]))
    return replace(
        case,
        context=context,
        question=_QUESTIONS[family].format(noun=noun),
        gold=WORDS[case.gold],
        lure=WORDS[case.lure],
        options=tuple(WORDS[word] for word in case.options),
        pool=tuple(WORDS[word] for word in case.pool),
    )


def prompt(question: str, context: str) -> str:
    """The text of a user turn."""
    return f"{context}{question}\n{_INSTRUCTION}"


def parse(response: str, pool: Sequence[str]) -> str | None:
    """The word of `pool` that the first sentence of a reply names, or None; two different ones name none."""
    sentence = re.split(r"[。!?\n]", response.strip(), maxsplit=1)[0].strip(" .,*\"'")
    if _WHOLE.get(sentence) in pool:
        return _WHOLE[sentence]
    names = {word: word for word in pool} | {alias: word for alias, word in _ALIASES.items() if word in pool}
    found = re.findall("|".join(sorted(map(re.escape, names), key=len, reverse=True)), sentence)
    answers = {names[name] for name in found}
    return answers.pop() if len(answers) == 1 else None


def _sentence(case: Case, noun: str, value: str) -> str:
    claims = _CLAIMS[case.family]
    return _FRAMES[case.template].format(claim=claims[case.template % len(claims)].format(noun=noun, value=value))
