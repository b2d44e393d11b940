"""Hold questions with their risk category and label; read, select and split sets of them."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.files.hints import did_you_mean
from workbench.files.store import PathLike, data_path, existing_file, key_of, write_jsonl
from workbench.files.tables import read_numbered_rows
from workbench.prompts.cells import is_missing, names_in, values_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from workbench.prompts.forms import PromptsLike


LABELS = ("unsafe", "safe", "neutral")
"""What a prompt can be."""


HARMLESS = "harmless"
"""Category of the neutral everyday instructions."""


HARD_SAFE = "hard_safe"
"""Category of safe prompts that look dangerous."""


OTHER = "other"
"""Category of prompts for which none is named."""


GIVEN = "given"
"""Source of prompts that come from no data set."""


ROLES = ("system", "user", "assistant")
"""Who can say a turn of a conversation."""


COLUMNS = ("id", "text", "category", "label", "source")
"""Columns that a table of prompts written by ``save_prompts`` always has."""


_SELDOM = ("history", "more_categories", "reference")
"""Fields that are written for those prompts alone that have them."""


class _NotGiven(str):
    """Stands for a text that was not given; no text is this object."""

    __slots__ = ()


_NOT_GIVEN = _NotGiven()


@dataclass(frozen=True)
class Message:
    """Hold one turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: What is said.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a message's role is one of {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.content, str) or not self.content.strip():
            raise ValueError(
                f"a message's content must be a text that is not empty, got {self.content!r}"
            )


@dataclass(frozen=True)
class Prompt:
    """One question: ``Prompt("How do I bake bread?")``, or with all that is known of it.

    Attributes:
        id: Unique in its set. Without one it is made from source, text, response and history. A
            text that is given alone, as the first argument, is the question and not its id.
        text: What the user says last, without any chat template.
        response: An answer that comes with it (datasets with labelled answers), or None.
        category: Main risk category, "harmless" for everyday instructions, "hard_safe" for safe
            ones that look dangerous, "other" where none is named.
        label: "unsafe", "safe" (a twin or a hard safe prompt) or "neutral".
        source: Data set it comes from.
        pair_id: Shared by an unsafe prompt and its safe twin; None for unpaired prompts.
        history: Turns of the conversation before ``text``, a system turn among them if there is
            one, as ``Message`` objects or dicts of role and content.
        more_categories: Risk categories it has beside the main one.
        reference: A good answer that others are compared with, or None; no model and no judge
            is shown it.
    """

    id: str = ""
    text: str = _NOT_GIVEN
    response: str | None = None
    category: str = OTHER
    label: str = "neutral"
    source: str = GIVEN
    pair_id: str | None = None
    history: tuple[Message, ...] = ()
    more_categories: tuple[str, ...] = ()
    reference: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.text is _NOT_GIVEN:
            self._set(text=self.id, id="")
        self._set(
            history=_messages(self.history), more_categories=_more_names(self.more_categories)
        )
        for name in ("id", "text", "category", "source"):
            value = getattr(self, name)
            if not isinstance(value, str) or not (value.strip() or (name == "id" and not value)):
                raise ValueError(f"{name} must be a text that is not empty, got {value!r}")
        if re.search("[;|]", self.category):
            raise ValueError(
                f"category must be one name, got {self.category!r}; give the others as "
                "more_categories"
            )
        if self.label not in LABELS:
            raise ValueError(f"label must be one of {', '.join(LABELS)}, got {self.label!r}")
        for name in ("response", "pair_id", "reference"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be a text or null, got {value!r}")
        try:
            names = ("id", "text", "response", "source", "pair_id", "reference")
            said = (message.content for message in self.history)
            texts = (*(getattr(self, name) for name in names), *self.categories, *said)
            "".join(map(str, texts)).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "a text holds half a character (a lone surrogate), which no tokenizer reads: "
                f"{error}"
            ) from error
        if not self.id:
            what = [self.text, self.response or None, *_turns(self.history)]
            self._set(id=f"{self.source}-{key_of(what)[:12]}")

    @property
    def categories(self) -> tuple[str, ...]:
        """All its risk categories, the main one first."""
        return tuple(dict.fromkeys((self.category, *self.more_categories)))

    def _set(self, **values: Any) -> None:
        """Set fields while the object is made; it is frozen afterwards."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


class Folds(NamedTuple):
    """Three disjoint sets of prompts.

    Vectors are fitted on the first, strength is chosen on the second, the third is reported once.
    """

    fit: list[Prompt]
    tune: list[Prompt]
    test: list[Prompt]


def load_prompts(path: PathLike | None = None) -> list[Prompt]:
    """Read prompts from a table with the fields of ``Prompt`` as columns.

    Args:
        path: A jsonl file written by ``save_prompts``, one object per line, or such a table in
            another format (see ``files.read_rows``); None is the set written for this project
            (data/prompts.jsonl).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a prompt or an id comes twice, with the line's number.
    """
    path = data_path("prompts.jsonl") if path is None else existing_file(path)
    rows = read_numbered_rows(path)
    if not rows:
        raise ValueError(f"{path} holds no prompts.")
    return prompts_of_rows(rows)


def prompts_of_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Prompt]:
    """Make prompts of rows with the fields of ``Prompt``; each row comes with its place in words.

    A column that is not among the fields is left out, unless it looks like one of them misspelt.

    Raises:
        ValueError: If a row is not a prompt or an id comes twice, with the row's place.
    """
    known = {one.name for one in fields(Prompt)}
    columns = f"columns: {', '.join(sorted(known - set(_SELDOM)))}."
    prompts, seen = [], set()
    for place, row in rows:
        missing = sorted(set(COLUMNS) - row.keys())
        if missing:
            raise ValueError(f"{place}: column {missing[0]!r} is missing; {columns}")
        for name in sorted(row.keys() - known):
            # one that may be a misspelt field: its values would be lost without a word
            if hint := did_you_mean(name, (known - row.keys()) | ({name.rstrip("s")} & known)):
                raise ValueError(f"{place}: unknown column {name!r}; {columns}{hint}")
        try:
            prompt = Prompt(**_fields_of(row, known))
        except ValueError as error:
            raise ValueError(f"{place}: {error}.") from error
        if prompt.id in seen:
            raise ValueError(f"{place}: id {prompt.id!r} comes twice.")
        seen.add(prompt.id)
        prompts.append(prompt)
    return prompts


def _fields_of(row: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Take the fields of a prompt from a row; an empty cell is nothing given."""
    values = {name: row[name] for name in known if name in row}
    for name in ("response", "pair_id", "reference"):
        if is_missing(values.get(name)):
            values[name] = None
    for name, read in (("history", values_in), ("more_categories", names_in)):
        if name in values:
            values[name] = tuple(read(values[name]))
    return values


def save_prompts(path: PathLike, prompts: PromptsLike) -> None:
    """Write prompts as jsonl, atomically.

    Args:
        path: The file.
        prompts: What to write, in any form that ``as_prompts`` reads.
    """
    rows = (asdict(prompt) for prompt in _prompts(prompts))
    write_jsonl(path, ({k: v for k, v in row.items() if v or k not in _SELDOM} for row in rows))


def categories_of(prompts: PromptsLike) -> list[str]:
    """List the risk categories (those with an unsafe prompt), sorted."""
    unsafe = (prompt for prompt in _prompts(prompts) if prompt.label == "unsafe")
    return sorted({category for prompt in unsafe for category in prompt.categories})


def select_prompts(
    prompts: PromptsLike,
    *,
    category: str | Iterable[str] | None = None,
    label: str | Iterable[str] | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Select the prompts that have a category and a label, in their order.

    Args:
        prompts: Where to select from, in any form that ``as_prompts`` reads.
        category: One category or several; None takes all. A prompt of several categories is
            selected by each of them.
        label: One label or several; None takes all.
        limit: Largest number per category and label; the first ones are taken. None takes all.

    Raises:
        ValueError: If a category or label is unknown, or nothing is left.
    """
    prompts, categories, labels = _prompts(prompts), _as_set(category), _as_set(label)
    present = Counter(name for prompt in prompts for name in prompt.categories)
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
        wanted = [c for c in prompt.categories if categories is None or c in categories]
        if not wanted or (labels is not None and prompt.label not in labels):
            continue
        if limit is None or all(taken[name, prompt.label] < limit for name in wanted):
            taken.update((name, prompt.label) for name in wanted)
            selected.append(prompt)
    if not selected:
        asked = (
            f"category {', '.join(sorted(categories or present))} "
            f"with label {', '.join(sorted(labels or LABELS))}"
        )
        at_most = f", limit {limit}" if limit is not None else ""
        raise ValueError(f"no prompts of {asked}{at_most}.")
    return selected


def split_prompts(
    prompts: PromptsLike,
    *,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.5, 0.25, 0.25),
) -> Folds:
    """Split prompts into fit, tune and test, each category and label in the given shares.

    The folds are disjoint, and twins are kept together. A prompt of several categories is in one
    fold, with a share by its main category; every category is in every fold.

    Args:
        prompts: What to split, in any form that ``as_prompts`` reads.
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
    prompts = _prompts(prompts)
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.pair_id or prompt.id].append(prompt)
    strata: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    main_ones = {prompt.category for prompt in prompts}
    for key, members in groups.items():
        classes = {(_stratum_of(prompt, main_ones), prompt.label) for prompt in members}
        strata[tuple(sorted(classes))].append(key)
    fold_of: dict[str, int] = {}
    for stratum, keys in sorted(strata.items()):
        generator = random.Random(f"{seed}|{stratum}")
        keys = sorted(keys)
        generator.shuffle(keys)
        sizes = _fold_sizes(len(keys), fractions)
        fold_of |= zip(
            keys, (fold for fold, size in enumerate(sizes) for _ in range(size)), strict=True
        )
    _check_every_fold(groups, fold_of, sum(fraction > 0 for fraction in fractions))
    folds = Folds([], [], [])
    for prompt in prompts:
        folds[fold_of[prompt.pair_id or prompt.id]].append(prompt)
    return folds


def _stratum_of(prompt: Prompt, main_ones: set[str]) -> str:
    """Name the category that a prompt is counted for where folds are cut.

    It is the main one, or a further one that is the main one of no prompt.
    """
    return next((name for name in prompt.more_categories if name not in main_ones), prompt.category)


def _check_every_fold(
    groups: Mapping[str, Sequence[Prompt]], fold_of: Mapping[str, int], n_folds: int
) -> None:
    """Raise where a category and label is not in every fold that has a share."""
    keys_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for key, members in groups.items():
        for prompt in members:
            for name in prompt.categories:
                keys_of[name, prompt.label].add(key)
    for (name, _), keys in sorted(keys_of.items()):
        if len({fold_of[key] for key in keys}) < n_folds:
            try_this = "" if len(keys) < n_folds else "; try another seed"
            raise ValueError(
                f"category {name!r} has {len(keys)} prompts or pairs, too few to be in every fold"
                f"{try_this}."
            )


def in_turn(prompts: PromptsLike) -> list[Prompt]:
    """Reorder prompts so that the categories take turns: the first n then hold all of them."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in _prompts(prompts):
        by_category.setdefault(prompt.category, []).append(prompt)
    groups = list(by_category.values())
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def prompts_key(prompts: PromptsLike) -> str:
    """Hash ids, texts, responses and earlier turns in order, for caches."""
    digest = hashlib.sha256()
    for prompt in _prompts(prompts):
        what = (prompt.id, prompt.text, prompt.response, *_turns(prompt.history))
        digest.update(repr(what).encode("utf-8"))
    return digest.hexdigest()[:16]


def text_key(text: str, history: Sequence[Message] = ()) -> str:
    """Hash a prompt's words: what a vector remembers of the prompts it was fitted on.

    Args:
        text: The question.
        history: Turns of the conversation before it; the same question after others is another.
    """
    said = "".join(f"{role}\0{content}\0" for role, content in _turns(history)) + text
    return hashlib.sha256(said.encode("utf-8", errors="surrogatepass")).hexdigest()[:12]


def _turns(history: Sequence[Message]) -> list[tuple[str, str]]:
    """Return role and content of each turn, for keys."""
    return [(message.role, message.content) for message in history]


def _messages(history: Any) -> tuple[Message, ...]:
    """Make turns of messages, or of dicts of role and content."""
    turns = []
    for turn in history or ():
        if isinstance(turn, Message):
            turns.append(turn)
        elif isinstance(turn, Mapping) and turn.keys() == {"role", "content"}:
            turns.append(Message(turn["role"], turn["content"]))
        else:
            raise ValueError(f"history holds messages of role and content, got {turn!r:.60}")
    return tuple(turns)


def _more_names(categories: Any) -> tuple[str, ...]:
    """Make a tuple of category names; one name may be given as it is."""
    names = (categories,) if isinstance(categories, str) else tuple(categories or ())
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"more_categories holds names of categories, got {name!r}")
    return names


def _prompts(prompts: PromptsLike) -> list[Prompt]:
    """Make prompts of what was given; ``forms`` is built on this module, so it is read late."""
    from workbench.prompts.forms import as_prompts

    return as_prompts(prompts)


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
