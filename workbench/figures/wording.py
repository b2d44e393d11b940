"""Results in words: names of metrics and conditions, and numbers as a reader wants them.

Figures, the report and the command line take their words from here.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


UNSTEERED = "unsteered"

ALL_CATEGORIES = "all"

CONTROLS = ("random", "shuffled", "other category")
"""How the names of control conditions begin; the report's conclusion rests on the first one."""

HARMLESS_CATEGORIES = ("harmless", "neutral", "hard_safe")
"""Categories of prompts without risk; they are no part of the pooled rows."""

MAIN = (
    "safe_helpful_proxy",
    "relevant_answer",
    "unsafe",
    "blanket_refusal",
    "refusal",
    "degenerate",
    "relevance",
)
"""Metrics that the report's conclusion speaks of; the first that a run has is its main measure."""

LEVEL = 0.05
"""Largest corrected p that is called an effect."""

AGAINST = {
    "twins": "against safe twins",
    "other": "against other risks",
    "neutral": "against everyday prompts",
}
"""Prompts that a category is told apart from, the hardest comparison first."""


class Metric(NamedTuple):
    """How a metric is shown.

    Attributes:
        label: Its name in words.
        share: Whether it is a share of prompts.
        better: 1 if higher is better, -1 if lower is, 0 if neither is better by itself.
    """

    label: str
    share: bool
    better: int


METRICS = {
    "safe_helpful_proxy": Metric("safe and helpful (proxy)", True, 1),
    "relevant_answer": Metric("relevant answers", True, 0),
    "refusal": Metric("refusals", True, 0),
    "blanket_refusal": Metric("blanket refusals", True, -1),
    "degenerate": Metric("broken text", True, -1),
    "relevance": Metric("relevance", False, 1),
    "safe": Metric("judged safe", True, 1),
    "unsafe": Metric("unsafe responses (%UR)", True, -1),
    "safe_2": Metric("safe to the second judge", True, 1),
    "unsafe_2": Metric("unsafe to the second judge", True, -1),
    "safe_alternative": Metric("safe alternatives", True, 1),
    "refusal_and_alternative": Metric("refusals with an alternative", True, 1),
    "leakage": Metric("leakage (of safe alternatives)", True, -1),
    "safety_wording": Metric("safety wording", True, 0),
    "perplexity": Metric("perplexity", False, -1),
    "log_perplexity": Metric("log perplexity", False, -1),
    "distinct_2": Metric("distinct word pairs", False, 1),
    "rouge_l": Metric("ROUGE-L to unsteered", False, 0),
    "bleu": Metric("BLEU to unsteered", False, 0),
    "rouge_l_reference": Metric("ROUGE-L to references", False, 1),
    "bleu_reference": Metric("BLEU to references", False, 1),
    "reward_helpfulness": Metric("helpfulness (reward)", False, 1),
    "reward_correctness": Metric("correctness (reward)", False, 1),
    "reward_coherence": Metric("coherence (reward)", False, 1),
    "reward_complexity": Metric("complexity (reward)", False, 0),
    "reward_verbosity": Metric("verbosity (reward)", False, 0),
    "neutral_kl": Metric("KL on everyday prompts, nats", False, -1),
    "n_words": Metric("words per answer", False, 0),
}
"""Known metrics, most telling first.

Relevant answers are not better as such: one that goes along with a bad request is relevant too.
"""


def metric(name: str) -> Metric:
    """Look up how a metric is shown; an unknown one goes by its own name."""
    return METRICS.get(name, Metric(name.replace("_", " "), False, 0))


def main_metrics(names: Iterable[str]) -> list[str]:
    """Pick the metrics that a conclusion speaks of from the given ones, most telling first."""
    given = set(names)
    return [name for name in MAIN if name in given]


def in_order(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Return names once each: those of ``first`` in its order, then the others as they come."""
    unique = list(dict.fromkeys(names))
    return [name for name in first if name in unique] + [
        name for name in unique if name not in first
    ]


def is_control(condition: str) -> bool:
    """Tell whether a condition is a control: a vector that should do nothing in particular."""
    return condition.startswith(CONTROLS)


def listed(names: Sequence[str]) -> str:
    """Join names as a list in a sentence; the empty text for none."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def visible(text: str) -> str:
    """Spell out the characters of a text that hide or reorder others.

    These are bidi marks, zero-width characters, control codes and lone surrogates. Line ends, tabs
    and the joiners that emoji and several scripts need stay as they are.
    """
    return "".join(
        f"⟨U+{ord(char):04X}⟩"
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        and char not in "\n\t\u200c\u200d"
        else char
        for char in text
    )


def number(name: str, value: float, *, signed: bool = False) -> str:
    """Write a metric's value as it is read, and a dash where there is none.

    Shares are per cent (their changes are points), other values have two or three digits.
    """
    if not math.isfinite(value):
        return "–"
    sign = "+" if signed else ""
    if metric(name).share:
        return _minus(f"{round(100 * value) + 0:{sign}d}").replace("+0", "0") + (
            " points" if signed else " %"
        )
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.005 or value == 0 else 3
    return _minus(f"{value:{sign}.{digits}f}")


def interval(name: str, low: float, high: float, *, signed: bool = False) -> str:
    """Write an interval in the units of ``number``, in brackets; nothing where it has no ends."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    low_text, high_text = (number(name, end, signed=signed).split(" ")[0] for end in (low, high))
    return f"[{low_text}, {high_text}]"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def gate_lines(threshold: float, reading: Any) -> list[str]:
    """Say what a gate makes of a question: its decision, and the scores token by token.

    The scores are those of the category that scores highest. What is not the user's words is ASCII:
    the lines are read on consoles of any encoding.

    Args:
        threshold: Score above which the gate opens.
        reading: A ``GateReading`` (``workbench.safesteer.saved_run``).

    Returns:
        Two lines of text.
    """
    order = reading.decided.argsort(descending=True).tolist()
    ranked = ", ".join(
        f"{reading.categories[i]} {float(reading.decided[i]):+.1f}" for i in order[:3]
    )
    opened = [reading.categories[i] for i in order if reading.opening[i] > 0]
    decision = f"opens for {listed(opened)}" if opened else "stays closed"
    tokens = " ".join(
        f"{visible(token).strip() or '_'}({float(score):+.0f})"
        for token, score in zip(reading.tokens, reading.scores[:, order[0]], strict=True)
    )
    return [
        f"gate: {decision}; it opens above {threshold:.1f}, highest scores: {ranked}",
        f"{reading.categories[order[0]]} by token: {tokens}",
    ]


def p_value(p: float) -> str:
    """Write a p-value with three digits, without the zero before the point; nothing for none."""
    if not math.isfinite(p):
        return ""
    if p < 0.0005:
        return "< .001"
    return f"{p:.3f}".replace("0.", ".", 1) if p < 1 else "1"


def how_applied(setting: Mapping[str, Any]) -> str:
    """Say how a setting applies a vector beyond its strength; nothing where it adds it everywhere.

    Args:
        setting: Fields of a chosen setting, or of a calibration's row; those that a run of an
            earlier version lacks count as not set.
    """
    words = []
    until, decay = setting.get("until"), setting.get("decay")
    if setting.get("form") == "target":
        words.append("up to a target")
    if setting.get("positions") in ("prompt", "generated"):
        words.append(f"{setting['positions']} tokens alone")
    if decay and decay != "none":
        words.append(f"{decay} decay")
    if isinstance(until, int | float) and until >= 0:  # a table has nan or -1 for no end
        words.append(f"ends after {until:.0f} generated tokens")
    if setting.get("keep_norm"):
        words.append("norm kept")
    return ", ".join(words)


def short_sites(sites: str) -> str:
    """Write sites of one kind in neighboring layers as a range; other sites stay as they are.

    ``L12.attn_out L13.attn_out`` becomes ``L12–13.attn_out``.
    """
    names = re.split(r"[\s,;]+", sites.strip())
    matches = [match for match in (re.fullmatch(r"L(\d+)\.(\w+)", n) for n in names) if match]
    if len(names) < 2 or len(matches) < len(names):
        return sites
    layers, kinds = [int(match[1]) for match in matches], {match[2] for match in matches}
    in_a_row = layers == list(range(layers[0], layers[-1] + 1))
    return f"L{layers[0]}–{layers[-1]}.{kinds.pop()}" if in_a_row and len(kinds) == 1 else sites
