"""Translate the categories of public data sets to this project's own, by data/categories.csv."""

from __future__ import annotations

import csv
import functools
import re

from workbench.files.store import data_path
from workbench.prompts.cells import names_in
from workbench.prompts.prompt import OTHER


def category_of(dataset: str, theirs: object) -> str:
    """Translate a data set's category to one of ours; of several it is the main one.

    See ``all_categories_of``.
    """
    return all_categories_of(dataset, theirs)[0]


def all_categories_of(dataset: str, theirs: object) -> tuple[str, ...]:
    """Translate the categories in a data set's cell to ours, by data/categories.csv.

    One that has none of ours keeps its own name, as a slug.

    Args:
        dataset: Name of the set.
        theirs: A name, several with ";" between them, a list, or an object of names and whether
            they hold.

    Returns:
        One or more; "other" where the cell holds none.
    """
    known = category_map()
    whole = known.get((dataset, slug_of(theirs))) if isinstance(theirs, str) else None
    if whole is not None:  # a name of theirs that has a ";" in it
        return (whole or slug_of(str(theirs)),)
    slugs = [slug_of(name) for name in names_in(theirs)]
    ours = dict.fromkeys(known.get((dataset, slug)) or slug for slug in slugs if slug)
    return tuple(ours) or (known.get((dataset, "")) or OTHER,)


@functools.cache
def category_map() -> dict[tuple[str, str], str]:
    """Map a data set and its category, as a slug, to one of ours; "" where none is meant."""
    with data_path("categories.csv").open(encoding="utf-8", newline="") as file:
        return {
            (row["dataset"], slug_of(row["their_category"])): row["category"]
            for row in csv.DictReader(file)
        }


def slug_of(name: str) -> str:
    """Write a name in small letters with "_" for all that is no letter and no digit."""
    return re.sub(r"\W+", "_", name.strip().lower()).strip("_")


def our_categories() -> set[str]:
    """List the categories of this project."""
    return {category for category in category_map().values() if category} | {OTHER}
