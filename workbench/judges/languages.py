"""Tell the language of a text: by its letters, and by its function words where they are Latin.

Simple and honest rather than clever: no model, the same result everywhere, and "unknown" where a
text is too short, mixed, or in no language that is known here. Judges and measures that were made
for some languages leave the others unscored.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

from workbench.files.store import data_path, read_json

if TYPE_CHECKING:
    from collections.abc import Collection

UNKNOWN = "unknown"
"""What a text is called that is too short, mixed, or in no language known here."""


MAX_CHARACTERS = 2000
"""Characters read; a text does not change its language after them."""


MIN_SHARE = 0.6
"""Share of the letters that must be of one script; below it a text is mixed."""


MIN_FUNCTION_WORDS = 2
"""Different function words of a language in Latin letters that a text must have."""


MIN_WORD_SHARE = 0.2
"""Share of a text's words that must be function words; they are 30 to 60 % of running text."""


MIN_WORDS_TO_TELL, MIN_ACCENTED = 6, 0.1
"""From so many words, and this share of letters outside ASCII, text in no known language is said
to be in an unknown one; shorter text may be a name or a formula."""


# An ideograph holds about as much as three letters of an alphabet, a syllable as two.
_WEIGHTS = {"CJK": 3, "HANGUL": 2, "HIRAGANA": 2, "KATAKANA": 2}


_LANGUAGE_OF_SCRIPT = {"HANGUL": "ko", "THAI": "th"}


_LATIN_WORD = re.compile(r"[^\W\d_]+")


# Letters with two marks or a hook, which no other language in Latin letters has.
_VIETNAMESE = re.compile(
    "[\u01a1\u01b0\u1ea3\u1ebb\u1ec9\u1ecf\u1ee7\u1ef7"
    "\u1ea5\u1ea7\u1ea9\u1eab\u1ead\u1eaf\u1eb1\u1eb3\u1eb5\u1eb7"
    "\u1ebf\u1ec1\u1ec3\u1ec5\u1ec7\u1ed1\u1ed3\u1ed5\u1ed7\u1ed9"
    "\u1edb\u1edd\u1edf\u1ee1\u1ee3\u1ee9\u1eeb\u1eed\u1eef\u1ef1]"
)


def language_of(text: str) -> str:
    """Tell the language of a text.

    Chinese, Japanese, Korean and Thai are told by their letters, and so are other scripts, which
    give the script's name ("Cyrillic", "Arabic"). Latin text is in the language whose function
    words are most of its words: those of data/languages.json. Code, names and numbers have none,
    and neither have very short answers: they are "unknown".

    Args:
        text: Any text; its first ``MAX_CHARACTERS`` are read.

    Returns:
        A code of ISO 639-1 ("en", "zh"), the name of a script, or "unknown".
    """
    text = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS])
    weights = script_weights(text)
    total = sum(weights.values())
    if not total:
        return UNKNOWN
    east_asian = sum(weights[script] for script in ("CJK", "HIRAGANA", "KATAKANA"))
    if east_asian >= MIN_SHARE * total:
        # Japanese cannot be written without kana; Chinese has none.
        kana = weights["HIRAGANA"] + weights["KATAKANA"]
        return "ja" if kana >= 0.1 * east_asian else "zh"
    script, weight = weights.most_common(1)[0]
    if weight < MIN_SHARE * total:
        return UNKNOWN
    if script == "LATIN":
        return _latin_language(text)
    return _LANGUAGE_OF_SCRIPT.get(script, script.capitalize())


def language_name(language: str) -> str:
    """Give the English name of what ``language_of`` returns, for messages."""
    known = _languages()
    if language in known["latin"]:
        return str(known["latin"][language]["name"])
    return str(known["others"].get(language, language))


def other_language(text: str, languages: Collection[str]) -> str:
    """Name the language of a text that is in none of some languages; "" where it may be in one.

    For judges and measures that were made for some languages only: what this names, they leave
    unscored.

    Args:
        text: Any text.
        languages: Codes, as ``language_of`` gives them.
    """
    language = language_of(text)
    if language != UNKNOWN:
        return "" if language in languages else language_name(language)
    weights = script_weights(text)
    mixed = {*weights} - {"LATIN", *(("CJK",) if "zh" in languages else ())}
    if sum(weights[script] for script in mixed) >= (1 - MIN_SHARE) * max(1, sum(weights.values())):
        return "several languages"
    return "a language that was not recognised" if _is_accented(text) else ""


def script_weights(text: str) -> Counter[str]:
    """Count the letters of a text by script, as Unicode names it; ideographs weigh more."""
    if text.isascii():
        return Counter({"LATIN": sum(map(str.isalpha, text))})
    weights: Counter[str] = Counter()
    for char in text:
        if char.isalpha():
            script = unicodedata.name(char, "OTHER").split(" ")[0]
            weights[script] += _WEIGHTS.get(script, 1)
    return weights


def _latin_language(text: str) -> str:
    """Find the language most of whose function words a text in Latin letters has."""
    if len(_VIETNAMESE.findall(text.casefold())) > 1:
        return "vi"
    words = _LATIN_WORD.findall(text.casefold())
    found = {
        language: [word for word in words if word in listed]
        for language, listed in _function_words().items()
    }
    # A word that several languages have says less of each.
    weights = _word_weights()
    scores = Counter({name: sum(map(weights.__getitem__, hits)) for name, hits in found.items()})
    (best, most), (_, second) = scores.most_common(2)
    # English wins a tie: names and titles in other languages stand in English text.
    if scores["en"] == most or len(found["en"]) >= len(found[best]):
        best = "en"
    elif second == most:
        return UNKNOWN
    hits = found[best]
    share, different = len(hits) / max(1, len(words)), len(set(hits))
    enough = share >= MIN_WORD_SHARE and different >= MIN_FUNCTION_WORDS
    # Two words alone are a name ("Rio de la Plata") unless they are most of what is said.
    return best if enough and (best == "en" or different > 2 or share >= 0.5) else UNKNOWN


def _is_accented(text: str) -> bool:
    """Tell running text with letters outside ASCII and hardly an English function word."""
    letters = [char for char in text if char.isalpha()]
    accented = sum(not char.isascii() for char in letters)
    latin = script_weights(text)["LATIN"] == len(letters)
    words = _LATIN_WORD.findall(text.casefold())
    english = sum(word in _function_words()["en"] for word in words)
    enough = len(words) >= MIN_WORDS_TO_TELL and accented >= MIN_ACCENTED * len(letters)
    return latin and enough and english < MIN_WORD_SHARE * len(words)


@cache
def _function_words() -> dict[str, frozenset[str]]:
    """Read the function words of the languages in Latin letters, once per process."""
    return {
        language: frozenset(row["words"].split()) for language, row in _languages()["latin"].items()
    }


@cache
def _word_weights() -> dict[str, float]:
    """Weigh every function word by one over the number of languages that have it."""
    shared = Counter(word for listed in _function_words().values() for word in listed)
    return {word: 1 / n for word, n in shared.items()}


@cache
def _languages() -> dict[str, dict[str, dict[str, str]]]:
    """Read data/languages.json, once per process."""
    content: dict[str, dict[str, dict[str, str]]] = read_json(data_path("languages.json"))
    return content
