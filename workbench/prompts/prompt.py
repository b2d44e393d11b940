"""Hold questions with their risk category and label; read, select and split sets of them."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, data_path, read_numbered_jsonl, write_jsonl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


LABELS = ("unsafe", "safe", "neutral")
"""What a prompt can be."""


HARMLESS = "harmless"
"""Category of the neutral everyday instructions."""


HARD_SAFE = "hard_safe"
"""Category of safe prompts that look dangerous."""


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        id: Unique in its set.
        text: What the user says, without any chat template.
        response: An answer that comes with it (datasets with labelled answers), or None.
        category: Risk category, "harmless" for everyday instructions, "hard_safe" for safe ones
            that look dangerous.
        label: "unsafe", "safe" (a twin or a hard safe prompt) or "neutral".
        source: Data set it comes from.
        pair_id: Shared by an unsafe prompt and its safe twin; None for unpaired prompts.
    """

    id: str
    text: str
    response: str | None
    category: str
    label: str
    source: str
    pair_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "text", "category", "source"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name} must be a text that is not empty, got {value!r}")
        if self.label not in LABELS:
            raise ValueError(f"label must be one of {', '.join(LABELS)}, got {self.label!r}")
        for name in ("response", "pair_id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be a text or null, got {value!r}")
        try:
            texts = (self.id, self.text, self.response, self.category, self.source, self.pair_id)
            "".join(map(str, texts)).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "a text holds half a character (a lone surrogate), which no tokenizer reads: "
                f"{error}"
            ) from error


class Folds(NamedTuple):
    """Three disjoint sets of prompts.

    Vectors are fitted on the first, strength is chosen on the second, the third is reported once.
    """

    fit: list[Prompt]
    tune: list[Prompt]
    test: list[Prompt]


def load_prompts(path: PathLike | None = None) -> list[Prompt]:
    """Read prompts from a jsonl file, one object per line with the fields of ``Prompt``.

    Args:
        path: The file; None is the set written for this project (data/prompts.jsonl).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a prompt or an id comes twice, with the line's number.
    """
    path = data_path("prompts.jsonl") if path is None else path
    known = {field.name for field in fields(Prompt)}
    required = known - {"response", "pair_id"}
    prompts, seen = [], set()
    for number, row in read_numbered_jsonl(path):
        missing, unknown = sorted(required - row.keys()), sorted(row.keys() - known)
        if missing:
            raise ValueError(
                f"{path}, line {number}: column {missing[0]!r} is missing; "
                f"columns: {', '.join(sorted(known))}."
            )
        if unknown:
            raise ValueError(
                f"{path}, line {number}: unknown column {unknown[0]!r}; "
                f"columns: {', '.join(sorted(known))}.{did_you_mean(unknown[0], known)}"
            )
        try:
            prompt = Prompt(**{"response": None, **row})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
        if prompt.id in seen:
            raise ValueError(f"{path}, line {number}: id {prompt.id!r} comes twice.")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return prompts


def save_prompts(path: PathLike, prompts: Iterable[Prompt]) -> None:
    """Write prompts as jsonl, atomically."""
    write_jsonl(path, (asdict(prompt) for prompt in prompts))


def categories_of(prompts: Iterable[Prompt]) -> list[str]:
    """List the risk categories (those with an unsafe prompt), sorted."""
    return sorted({prompt.category for prompt in prompts if prompt.label == "unsafe"})


def select_prompts(
    prompts: Sequence[Prompt],
    *,
    category: str | Iterable[str] | None = None,
    label: str | Iterable[str] | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Select the prompts that have a category and a label, in their order.

    Args:
        prompts: Where to select from.
        category: One category or several; None takes all.
        label: One label or several; None takes all.
        limit: Largest number per category and label; the first ones are taken. None takes all.

    Raises:
        ValueError: If a category or label is unknown, or nothing is left.
    """
    categories, labels = _as_set(category), _as_set(label)
    present = Counter(prompt.category for prompt in prompts)
    for name in sorted(categories or ()):
        if name not in present:
            allowed = ", ".join(repr(known) for known in sorted(present))
            raise ValueError(
                f"no prompts of category {name!r}; categories: {allowed}."
                f"{did_you_mean(name, present)}"
            )
    for name in sorted(labels or ()):
        if name not in LABELS:
            raise ValueError(f"unknown label {name!r}; labels: {', '.join(LABELS)}.")
    taken: Counter[tuple[str, str]] = Counter()
    selected = []
    for prompt in prompts:
        if (categories is not None and prompt.category not in categories) or (
            labels is not None and prompt.label not in labels
        ):
            continue
        taken[prompt.category, prompt.label] += 1
        if limit is None or taken[prompt.category, prompt.label] <= limit:
            selected.append(prompt)
    if not selected:
        wanted = (
            f"category {', '.join(sorted(categories or present))} "
            f"with label {', '.join(sorted(labels or LABELS))}"
        )
        at_most = f", limit {limit}" if limit is not None else ""
        raise ValueError(f"no prompts of {wanted}{at_most}.")
    return selected


def split_prompts(
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.5, 0.25, 0.25),
) -> Folds:
    """Split prompts into fit, tune and test, each category and label in the given shares.

    The folds are disjoint, and twins are kept together.

    Args:
        prompts: What to split.
        seed: Another seed gives another split; the same one gives the same, whatever the order of
            the prompts.
        fractions: Shares of the three folds; they add up to 1.

    Raises:
        ValueError: If the fractions are not shares of 1, or a category has too few prompts to be in
            every fold.
    """
    # The last condition is so written that it refuses NaN.
    if len(fractions) != 3 or min(fractions) < 0 or not abs(sum(fractions) - 1) <= 1e-9:
        raise ValueError(f"fractions must be three shares that add up to 1, got {fractions}.")
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.pair_id or prompt.id].append(prompt)
    strata: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for key, members in groups.items():
        strata[tuple(sorted({(p.category, p.label) for p in members}))].append(key)
    fold_of: dict[str, int] = {}
    for stratum, keys in sorted(strata.items()):
        if len(keys) < sum(f > 0 for f in fractions):
            raise ValueError(
                f"category {stratum[0][0]!r} has {len(keys)} prompts or pairs, too few to be in "
                "every fold."
            )
        generator = random.Random(f"{seed}|{stratum}")
        keys = sorted(keys)
        generator.shuffle(keys)
        sizes = _fold_sizes(len(keys), fractions)
        fold_of |= zip(
            keys, (fold for fold, size in enumerate(sizes) for _ in range(size)), strict=True
        )
    folds = Folds([], [], [])
    for prompt in prompts:
        folds[fold_of[prompt.pair_id or prompt.id]].append(prompt)
    return folds


def in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Reorder prompts so that the categories take turns: the first n then hold all of them."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    groups = list(by_category.values())
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def prompts_key(prompts: Iterable[Prompt]) -> str:
    """Hash ids, texts and responses in order, for caches."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.text, prompt.response)).encode("utf-8"))
    return digest.hexdigest()[:16]


def text_key(text: str) -> str:
    """Hash a prompt's words: what a vector remembers of the prompts it was fitted on."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:12]


def _fold_sizes(n: int, fractions: tuple[float, float, float]) -> list[int]:
    """Round the shares of n groups to sizes of folds.

    No fold with a share is empty, and none without one gets any.
    """
    sizes = [max(1, round(n * fraction)) if fraction > 0 else 0 for fraction in fractions]
    # The first fold with a share takes what rounding leaves over.
    spare = next(fold for fold, fraction in enumerate(fractions) if fraction > 0)
    while sum(sizes) > n:
        sizes[max(range(3), key=lambda fold: (fold == spare and sizes[fold] > 1, sizes[fold]))] -= 1
    sizes[spare] += n - sum(sizes)
    return sizes


def _as_set(value: str | Iterable[str] | None) -> set[str] | None:
    if value is None:
        return None
    return {value} if isinstance(value, str) else set(value)
