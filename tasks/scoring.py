"""From a model's reply to an outcome: strict parsing, no judge, no random fallback.

A reply is `gold`, `lure`, `other` (another possible answer) or `parse_fail`. A reply that names two answers, or none,
is a parse failure and nothing else: it is counted, never guessed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmms_keyspace.outcomes import GOLD, LURE, OTHER, PARSE_FAIL, accuracy_of
from lmms_keyspace.tasks import benchmarks, chinese_replies
from lmms_keyspace.tasks.groups import LETTERS
from lmms_keyspace.tasks.reported import PROBES
from lmms_keyspace.tasks.rich.drawing import NUMBERS
from lmms_keyspace.tasks.rows import Row

_NUMERALS = {str(number): word for number, word in enumerate(NUMBERS, start=1)}
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|[。\n]")
_LETTER = "".join(LETTERS)
_BARE_LETTER = re.compile(rf"[(\[]?([{_LETTER}{_LETTER.lower()}])[)\]]?[.:,)。]*")
_LETTER_AND_TEXT = re.compile(rf"(?:[(\[]([{_LETTER}])[)\]]|([{_LETTER}])[.:)、])\s*(.+)", re.DOTALL)
_LETTER_IN_PROSE = re.compile(rf"\b(?i:answer|option|letter)(?:\s+is)?:?\s+[(\[]?([{_LETTER}])\b")
_LETTER_IN_CHINESE = re.compile(rf"(?:答案|选项|选择|选)[是为]?:?\s*[(\[]?([{_LETTER}])(?![A-Za-z])")
# "A" before a word is taken for the article.
_OTHER_LETTER = re.compile(rf"\b([{_LETTER}])\b(?!\s+\w)")


def parse_word(response: str, pool: Sequence[str]) -> str | None:
    """The word of `pool` that a reply names, or None.

    The whole reply, or exactly one whole word of its first sentence, case and outer punctuation aside. Numerals stand
    for the number words of a pool.
    """
    reply = response.strip()
    sentence = _SENTENCE_END.split(reply, maxsplit=1)[0] if reply else ""
    known = {word.casefold(): word for word in pool}
    words = re.findall(r"\w+", sentence.casefold())
    answers = {known[word] for word in (_NUMERALS.get(word, word) for word in words) if word in known}
    return answers.pop() if len(answers) == 1 else None


def parse_letter(response: str, options: Sequence[str]) -> str | None:
    """The option whose letter a reply gives, or None.

    Accepted: `B`, `b.`, `(B)`, `B. blue` when option B is blue and no other option is named, and in the first sentence
    `the answer is B` or `答案是B`. A word without its letter is no answer here: the letter form exists to tell the two
    apart.
    """
    reply = unicodedata.normalize("NFKC", response).strip().strip("*`\"'")  # full-width forms become plain ones
    whole = _BARE_LETTER.fullmatch(reply)
    if whole:
        return _option(whole[1], options)
    both = _LETTER_AND_TEXT.match(reply)
    if both:
        letter = both[1] or both[2]
        option = _option(letter, options)
        named = {text.casefold(): text for text in options if len(text) > 1}  # a letter may be an article
        words = {named[word] for word in re.findall(r"\w+", both[3].casefold()) if word in named}
        return option if words <= {option} and set(_OTHER_LETTER.findall(both[3])) <= {letter} else None
    sentence = _SENTENCE_END.split(reply, maxsplit=1)[0] if reply else ""
    letters = {*_LETTER_IN_PROSE.findall(sentence), *_LETTER_IN_CHINESE.findall(sentence)}
    return _option(letters.pop(), options) if len(letters) == 1 else None


def outcome(answer: str | None, gold: str, lure: str) -> str:
    """What a parsed answer means: gold, lure, other or parse_fail (None)."""
    if answer is None:
        return PARSE_FAIL
    return {gold: GOLD, lure: LURE}.get(answer, OTHER)


@dataclass(frozen=True)
class Scoring:
    """Callable that scores one reply to a document of a probe, as the harness's `process_results`.

    The harness drops the document from its samples file, so everything a later computation needs is returned here: the
    fields that the samples file keeps, and one item per metric key. Pure, since the harness calls it from several
    threads and repeats it on an exception.
    """

    probe: str

    def __call__(self, doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
        parse = parse_letter if doc["options"] else chinese_replies.parse if doc["lang"] == "zh" else parse_word
        answer = parse(results[0], doc["pool"])
        result = outcome(answer, doc["gold"], doc["lure"])
        correct = float(result == GOLD)
        stock = benchmarks.stock_correct(doc, results[0]) if "benchmark" in doc else None
        named = (doc[field] for field in ("group_id", "family", "condition"))
        row = Row(*named, result, answer, len(doc["pool"]), stock, doc.get("cluster"))
        items: dict[str, Any] = dict.fromkeys(PROBES[self.probe].keys, row)
        accuracy = accuracy_of(doc["condition"]).name
        if accuracy in items:
            # With a `score` the harness adds its own clustered standard error: only where that mean is the metric.
            items[accuracy] = row.fields() | {"score": correct}
        kept = ["image_sha", "gold", "lure", "question", "context"]
        if "benchmark" not in doc:
            kept += ["image", "spec"]  # the recipe, from which a report draws the picture again
        reply = {"response": results[0], "correct": correct, "score": correct}
        reply |= {f"{role}_option": _written(doc, doc[role]) for role in ("gold", "lure")}
        return row.fields() | {field: doc[field] for field in kept} | reply | items


def __getattr__(probe: str) -> Scoring:
    """`!function lmms_keyspace.tasks.scoring.<probe>` of a task YAML."""
    if probe not in PROBES:
        raise AttributeError(f"module {__name__!r} has no attribute {probe!r}")
    return Scoring(probe)


def _written(doc: dict[str, Any], word: str) -> str:
    """An answer as a model should write it, and as the table of log-probabilities names it."""
    return LETTERS[doc["options"].index(word)] if doc["options"] else word


def _option(letter: str, options: Sequence[str]) -> str | None:
    place = LETTERS.index(letter.upper())
    return options[place] if place < len(options) else None
