"""Make prompts of what people have: texts, messages, rows of tables, data frames, prompts.

Every public function that takes prompts reads them with ``as_prompts``; docs/inputs.md has an
example of each form.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from workbench.files.hints import did_you_mean
from workbench.files.tables import SUFFIXES, TEXT_COLUMNS, rows_of_object
from workbench.prompts.cells import (
    LABEL_WORDS,
    find_column,
    is_missing,
    label_in,
    missing_column,
    names_in,
    text_in,
    values_in,
)
from workbench.prompts.prompt import LABELS, Prompt
from workbench.prompts.turns import MESSAGE_COLUMNS, is_conversation, is_message, read_turns

if TYPE_CHECKING:
    import pandas as pd


PromptsLike: TypeAlias = "str | Prompt | Mapping[str, Any] | Iterable[Any] | pd.DataFrame"
"""What ``as_prompts`` reads."""


def as_prompts(
    given: PromptsLike,
    *,
    text: str | None = None,
    response: str | None = None,
    category: str | None = None,
    label: str | None = None,
    reference: str | None = None,
) -> list[Prompt]:
    """Make prompts of texts, conversations, rows or a data frame, one for each, in order.

    Words are kept as they are, in every language. A prompt without an id gets one made from its
    words, the same in every session; where the same words come again a number is put behind it.

    Args:
        given: A text or a list of texts; a conversation (a list of messages with role and content)
            or a list of them; a data frame, a list of dicts or a dict of columns, with a column
            text, prompt, question or instruction (or messages) and, where there are any,
            category, label, response, reference, id, pair_id and source; ``Prompt`` objects; or a
            mixture.
        text: Column of the question, where it has another name.
        response: Column of an answer that comes with the question.
        category: Column of the category, or the category of all. A cell may hold several, as a
            list or with ";" between them: the first is the main one.
        label: Column of the label (unsafe, safe, neutral and the like; also yes or no in a column
            such as is_safe), or the label of all. Without any it is "neutral".
        reference: Column of the reference answer, where it has another name.

    Returns:
        The prompts; those that are ``Prompt`` objects already stay as they are.

    Raises:
        TypeError: If something in it is in none of these forms.
        ValueError: If a column is missing, or a row has no text or an unknown label, with its
            number.
    """
    items = _items_of(given, text)
    nothing_named = all(name is None for name in (text, response, category, label, reference))
    if nothing_named and all(isinstance(item, Prompt) for item in items):
        return items
    rows = [item for item in items if isinstance(item, Mapping) and not is_message(item)]
    named = {"response": response, "reference": reference}
    columns = _Columns.of(rows, text, category, label, named) if rows else None
    if columns is None and (column := text or response or reference) is not None:
        raise ValueError(f"{column!r} names a column, but what is given has no columns.")
    for_all: dict[str, Any] = {}
    if category is not None and (columns is None or columns.category is None):
        for_all |= _categories_of_all(category)
    if label is not None and (columns is None or columns.label is None):
        for_all["label"] = _label_word(label)
    made = (_prompt_of(item, columns, for_all, f"row {i}") for i, item in enumerate(items, 1))
    return list(_with_ids_of_their_own(made))


def _categories_of_all(category: str) -> dict[str, Any]:
    """Read the category that was given for all prompts, as a cell of a table is read."""
    main, *others = names_in(category) or [category]
    return {"category": main, "more_categories": tuple(others)} if others else {"category": main}


class _Columns(NamedTuple):
    """Hold where rows have what a prompt is made of; None where they do not have it."""

    text: str | None
    messages: str | None
    response: str | None
    reference: str | None
    category: str | None
    label: str | None
    id: str | None
    pair_id: str | None
    source: str | None
    history: str | None
    more_categories: str | None

    @classmethod
    def of(
        cls,
        rows: list[Mapping[str, Any]],
        text: str | None,
        category: str | None,
        label: str | None,
        answers: Mapping[str, str | None],
    ) -> _Columns:
        """Find the columns of rows, by the names that were given or else by the usual ones.

        Raises:
            ValueError: If one that is needed, or was given, is not there.
        """
        present = list(dict.fromkeys(str(name) for row in rows for name in row))

        def named(name: str | None, *usual: str) -> str | None:
            return find_column(usual if name is None else (name,), present)

        question = named(text, *TEXT_COLUMNS)
        messages = None if question else named(text, *MESSAGE_COLUMNS)
        if question is None and messages is None:
            wanted = TEXT_COLUMNS if text is None else (text,)
            raise missing_column("the rows", wanted, present)
        extra = find_column(("input",), present) if text is None else None
        beside = [row.get(extra) for row in rows] if extra else []
        if str(question).lower() == "instruction" and any(
            isinstance(value, str) and value.strip() for value in beside
        ):
            raise ValueError(
                f"columns {question!r} and {extra!r} make one question together: join them in "
                "a column 'text', or say text='instruction' to leave the other out."
            )
        of_answers = {kind: named(name, kind) for kind, name in answers.items()}
        for kind, name in answers.items():
            if name is not None and of_answers[kind] is None:
                raise missing_column("the rows", (name,), present)
        kinds, labels = named(category, "category", "categories"), named(label, "label")
        if category is not None and kinds is None and did_you_mean(category, present):
            raise missing_column("the rows", (category,), present)
        if label is not None and labels is None and label.lower() not in LABEL_WORDS:
            raise missing_column("the rows", (label,), present, LABELS)
        others = ("id", "pair_id", "source", "history", "more_categories")
        places = {name: named(name) for name in others}
        return cls(question, messages, **of_answers, category=kinds, label=labels, **places)


def _items_of(given: PromptsLike, text: str | None) -> list[Any]:
    """List what was given, one item per prompt."""
    if isinstance(given, os.PathLike) or (isinstance(given, str) and _is_file(given)):
        raise TypeError(
            f"{os.fspath(given)!r} is a file; read it with wb.prompts_from({os.fspath(given)!r})."
        )
    if isinstance(given, str | Prompt):
        return [given]
    if isinstance(given, Mapping):
        return [[given]] if is_message(given) else list(rows_of_object(given, text))
    if is_conversation(given):
        return [given]
    if hasattr(given, "columns") and hasattr(given, "to_dict"):
        if not given.columns.is_unique:
            twice = given.columns[given.columns.duplicated()][0]
            raise ValueError(f"column {twice!r} comes twice; rename one of them.")
        return list(given.to_dict("records"))
    if hasattr(given, "index") and hasattr(given, "to_dict"):  # a series: a row, or a column
        row = {str(name): value for name, value in given.to_dict().items()}
        return [row] if find_column(TEXT_COLUMNS, list(row)) else list(given)
    if not isinstance(given, Iterable):
        raise TypeError(f"{_ALLOWED}, got {type(given).__name__}.")
    return list(given)


_ALLOWED = (
    "prompts are given as a text, a list of texts, a data frame, dicts with a column text, "
    "messages with role and content, or wb.Prompt objects"
)


def _is_file(text: str) -> bool:
    """Tell whether a text is the name of a table that is there, and so hardly a question."""
    if not text.lower().endswith((*SUFFIXES, ".gz", ".xz")) or "\n" in text or len(text) > 500:
        return False
    return Path(text).expanduser().is_file()


def _label_word(label: str) -> str:
    word = LABEL_WORDS.get(label.strip().lower())
    if word is None:
        raise ValueError(f"label must be one of {', '.join(LABELS)}, got {label!r}.")
    return word


def _prompt_of(
    item: Any, columns: _Columns | None, for_all: dict[str, Any], place: str
) -> tuple[Prompt, bool]:
    """Make a prompt of one item, and tell whether it came with an id."""
    if isinstance(item, Prompt):
        return (replace(item, **for_all) if for_all else item), True
    try:
        if isinstance(item, str):
            return Prompt(text=item, **for_all), False
        if is_message(item) or is_conversation(item):
            turns = read_turns([item] if is_message(item) else item, place)
            return Prompt(**turns._asdict(), **for_all), False
        if isinstance(item, Mapping) and columns is not None:
            fields = _fields_of_row(item, columns, place) | for_all
            return Prompt(**fields), "id" in fields
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(place) else f"{place}: {said}.") from error
    raise TypeError(f"{_ALLOWED}; {place} is {type(item).__name__}.")


def _fields_of_row(row: Mapping[str, Any], columns: _Columns, place: str) -> dict[str, Any]:
    """Read the fields of a prompt from a row; what is missing in it is left out."""
    fields: dict[str, Any] = {}
    if columns.messages is not None:
        fields |= read_turns(values_in(row.get(columns.messages)), place)._asdict()
    else:
        column = str(columns.text)
        if not text_in(row.get(column), column, place):
            raise ValueError(f"{place}: column {column!r} is empty; leave the row out.")
        fields["text"] = row[column]
    for name in ("response", "reference"):
        column = getattr(columns, name)
        if column is not None and not is_missing(row.get(column)):
            text_in(row[column], column, place)
            fields[name] = row[column]
    if columns.label is not None:
        fields["label"] = label_in(row.get(columns.label), columns.label, place)
        if fields["label"] is None:
            raise ValueError(f"{place}: column {columns.label!r} is empty; say the label.")
    names = names_in(row.get(columns.category)) if columns.category is not None else []
    if columns.more_categories is not None:
        names += names_in(row.get(columns.more_categories))
    if names:
        fields |= {"category": names[0], "more_categories": tuple(names[1:])}
    for name in ("id", "pair_id", "source"):
        column = getattr(columns, name)
        if column is not None and not is_missing(row.get(column)):
            fields[name] = _as_name(row[column])
    if columns.history is not None:
        fields["history"] = tuple(values_in(row.get(columns.history)))
    return fields


def _as_name(value: Any) -> str:
    """Write an id as a text; beside missing ones pandas makes 3.0 of 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _with_ids_of_their_own(made: Iterable[tuple[Prompt, bool]]) -> Iterator[Prompt]:
    """Put a number behind ids that were made from the same words."""
    made = list(made)
    taken = {prompt.id for prompt, has_id in made if has_id}
    times: dict[str, int] = {}
    for prompt, has_id in made:
        if has_id:
            yield prompt
            continue
        number = times.get(prompt.id, 0)
        while (prompt_id := f"{prompt.id}-{number + 1}" if number else prompt.id) in taken:
            number += 1
        times[prompt.id] = number
        taken.add(prompt_id)
        yield replace(prompt, id=prompt_id)
