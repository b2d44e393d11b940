"""Read public benchmarks as prompts in this project's categories and labels.

Written as text, on a command line or in a notebook, a data set is ``NAME``, ``NAME:PATH`` or
``file:PATH``, with options behind further colons: ``safebench:safebench.csv``,
``catqa:split=zh``, ``file:mine.csv:text=question:category=topic:label=unsafe``. A table with the
columns of this project's own prompts is read as such, with its ids and pairs. data/datasets.yaml
says where the known sets come from and what their columns mean, data/categories.csv which category
of ours stands for which of theirs. Files are parsed, never run, and no line of any of these sets is
part of the project.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.files.hints import did_you_mean
from workbench.files.store import data_path, key_of, local_path
from workbench.files.tables import SUFFIXES, TEXT_COLUMNS, Numbered, read_numbered_rows
from workbench.prompts.categories import (
    all_categories_of,
    category_map,
    our_categories,
    slug_of,
)
from workbench.prompts.cells import (
    YES,
    find_column,
    is_missing,
    label_in,
    missing_column,
    text_in,
    values_in,
)
from workbench.prompts.prompt import (
    COLUMNS,
    HARD_SAFE,
    HARMLESS,
    LABELS,
    OTHER,
    Prompt,
    load_prompts,
    prompts_of_rows,
    select_prompts,
)
from workbench.prompts.turns import MESSAGE_COLUMNS, is_conversation, read_turns

if TYPE_CHECKING:
    import pandas as pd


Row = Mapping[str, Any]
"""One row of a table: column to value."""


OWN = "workbench"
"""Name of the project's own prompts, where several sets are joined."""


GITHUB = "https://raw.githubusercontent.com"
"""Where files of a GitHub repository are served as they are."""


_ROLES = ("text", "response", "category", "label", "reference")
"""What a column can be for; an option of each of these names says which one it is."""


_OPTIONS = (*_ROLES, "split", "limit")


_OPTION = re.compile(r"(\w+)=(.*)")


_SPLIT = "(split)"
"""Column that carries the split's name to the functions that prepare rows."""


@dataclass(frozen=True)
class Dataset:
    """One data set: where it comes from and what its columns mean.

    The fields are explained in data/datasets.yaml.
    """

    name: str
    what: str
    licence: str = ""
    citation: str = ""
    hub: str = ""
    revision: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    splits: Sequence[str] = ()
    text: Sequence[str] = TEXT_COLUMNS
    category: Sequence[str] = ()
    label: Sequence[str] | Mapping[str, str] = ("label",)
    response: Sequence[str] = ()
    reference: Sequence[str] = ()
    context: Sequence[str] = ()
    pair: Sequence[str] = ()
    prepare: str = ""

    def url(self, split: str) -> str:
        """Spell the address of a split's file at the pinned commit."""
        file = self.files[split]
        if self.hub.startswith("github.com/"):
            return f"{GITHUB}/{self.hub.removeprefix('github.com/')}/{self.revision}/{file}"
        return f"hf://datasets/{self.hub}@{self.revision}/{file}"


@functools.cache
def known_datasets() -> Mapping[str, Dataset]:
    """Read the known data sets by name, as data/datasets.yaml describes them."""
    import yaml

    table = yaml.safe_load(data_path("datasets.yaml").read_text(encoding="utf-8"))
    for entry in table.values():
        if isinstance(entry["label"], str):
            entry["label"] = dict.fromkeys(entry["files"], entry["label"])
    return {name: Dataset(name, **entry) for name, entry in table.items()}


def list_datasets() -> pd.DataFrame:
    """List every known data set, one per row.

    Returns:
        Columns name, what, licence, citation, hub, revision, splits (first the default) and
        columns.
    """
    import pandas as pd

    rows = []
    for known in known_datasets().values():
        entry = {
            key: getattr(known, key)
            for key in ("name", "what", "licence", "citation", "hub", "revision")
        }
        roles = {key: getattr(known, key) for key in _ROLES}
        columns = (
            f"{role}: {' | '.join(names)}"
            for role, names in roles.items()
            if names and isinstance(names, list)
        )
        rows.append(entry | {"splits": ", ".join(known.files), "columns": "; ".join(columns)})
    return pd.DataFrame(rows)


def read_dataset(
    spec: str,
    *,
    text: str | None = None,
    response: str | None = None,
    category: str | None = None,
    label: str | None = None,
    reference: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read a public benchmark, or any file with named columns.

    Rows without a text or a label are left out, and so is a copy of an earlier row; copies whose
    labels contradict each other are all left out. Several answers to one question share a
    ``pair_id``, so that no split separates them, and a main category: the most frequent among the
    unsafe ones.

    Args:
        spec: ``"NAME"`` (downloaded once), ``"NAME:PATH"`` (a local file of that set) or
            ``"file:PATH"``; each option below may also be written in it, as ``":option=value"``.
        text: Column of the question; without it text, prompt, question or instruction is taken, or
            a list of messages from the column messages, conversation or conversations.
        response: Column of an answer that comes with the question. Sets whose label is about an
            answer read it anyway.
        category: Column of the category, or one of this project's categories for all rows. A cell
            may hold several, as a list or with ";" between them: the first is the main one.
        label: Column of the label (unsafe, safe, neutral and the like; also yes or no in a column
            such as is_safe), or unsafe, safe or neutral for all rows.
        reference: Column of a reference answer; sets that have one (alpaca) read it anyway.
        split: One of the set's splits.
        limit: Largest number of prompts of each category and label; the first ones are taken.

    Raises:
        ValueError: If the set or an option is unknown, the file or a column is missing, a line
            cannot be parsed, or no prompt is left.
        ConnectionError: If the set cannot be fetched.
    """
    name, path, options = _parse(spec)
    given = {
        "text": text,
        "response": response,
        "category": category,
        "label": label,
        "reference": reference,
        "split": split,
        "limit": limit,
    }
    options |= {key: str(value) for key, value in given.items() if value is not None}
    most = options.get("limit", "1")
    if not most.isdecimal() or int(most) < 1:
        raise ValueError(f"limit must be a whole number from 1, got {most!r}.")
    if name == OWN and (path is not None or options.keys() - {"limit"}):
        raise ValueError(
            f"{OWN!r} is the project's own set: it has no path, and no option but limit; "
            f"got {spec!r}."
        )
    prompts = load_prompts() if name == OWN else _read(_known(name, path), path, options)
    return select_prompts(prompts, limit=int(most)) if "limit" in options else prompts


def prompts_from(spec: str | Path | None) -> list[Prompt]:
    """Read the prompts that a command was given.

    Args:
        spec: None is the project's own set; anything else is read by ``read_dataset`` (before a
            table's path "file:" may be left out). Several may be joined by commas, with "workbench"
            for the project's own; a prompt that comes a second time is left out.

    Raises:
        ValueError: As ``read_dataset``, or if a line of a jsonl file is not a prompt.
        ConnectionError: If a set cannot be fetched.
    """
    if spec is None:
        return load_prompts()
    is_file = local_path(spec).is_file()
    parts = [str(spec)] if is_file else [part.strip() for part in str(spec).split(",")]
    unique: dict[tuple[Any, ...], Prompt] = {}
    for part in parts:
        for prompt in _prompts_of_part(part):
            unique.setdefault((prompt.text, prompt.response, prompt.history), prompt)
    for prompt_id, n in Counter(prompt.id for prompt in unique.values()).items():
        if n > 1:
            raise ValueError(
                f"id {prompt_id!r} comes {n} times in {str(spec)!r}; rename the ids in one of the "
                "files."
            )
    return list(unique.values())


def _parse(spec: str) -> tuple[str, str | None, dict[str, str]]:
    """Take apart a data set as written: name, path and options.

    Options are taken from the end, for a path may hold a colon.
    """
    pieces = spec.split(":")
    options: dict[str, str] = {}
    while len(pieces) > 1 and (match := _OPTION.fullmatch(pieces[-1])):
        key, value = match.groups()
        if key not in _OPTIONS or not value:
            allowed = (
                f"options: {', '.join(_OPTIONS)}, as option=value.{did_you_mean(key, _OPTIONS)}"
            )
            raise ValueError(f"cannot read {pieces[-1]!r} in {spec!r}; {allowed}")
        options[key] = value
        pieces.pop()
    return pieces[0].strip().lower().replace("-", "_"), ":".join(pieces[1:]) or None, options


def _known(name: str, path: str | None) -> Dataset:
    known = known_datasets()
    if name == "file" and path is not None:
        return Dataset(
            slug_of(Path(path).name.split(".")[0]) or "file",
            "a table",
            category=("category", "categories", OTHER),
            pair=("pair_id",),
            reference=("reference",),
        )
    if name not in known:
        hint = did_you_mean(name, [*known, OWN])
        raise ValueError(
            f"unknown data set {name!r}; data sets: {', '.join([*known, OWN])}, or 'file:PATH'."
            f"{hint}"
        )
    return known[name]


def _prompts_of_part(part: str) -> list[Prompt]:
    """Read one part of a joined text: a data set, or a path with nothing before it."""
    name, path, _ = _parse(part)
    if name in known_datasets() or name in ("file", OWN):
        return read_dataset(part)
    bare = ":".join(piece for piece in part.split(":") if not _OPTION.fullmatch(piece))
    if not (
        bare.lower().endswith((*SUFFIXES, ".gz", ".xz"))
        or "/" in bare
        or (bare and local_path(bare).exists())
    ):
        _known(name, path)
    return read_dataset(f"file:{part}")


def _read(dataset: Dataset, path: str | None, options: Mapping[str, str]) -> list[Prompt]:
    """Read the prompts of a local file, or of the set's own files."""
    split = options.get("split")
    if split is not None and split not in dataset.files:
        allowed = (
            f"splits: {', '.join(dataset.files) or 'none'}.{did_you_mean(split, dataset.files)}"
        )
        raise ValueError(f"{dataset.name!r} has no split {split!r}; {allowed}")
    first = next(iter(dataset.files), "")
    if path is not None:
        files = {split or first: local_path(path)}
    else:
        files = {
            each: _fetch(dataset, each)
            for each in ((split,) if split else dataset.splits or (first,))
        }
    rows = [
        (each, place, row)
        for each, file in files.items()
        for place, row in read_numbered_rows(file, text=options.get("text"))
    ]
    if not rows:
        raise ValueError(f"{path or dataset.name} holds no rows.")
    if not dataset.hub and rows[0][2].keys() >= set(COLUMNS):
        return _own_prompts([(place, row) for _, place, row in rows], options)
    asked: dict[str, Any] = {key: (options[key],) for key in _ROLES if key in options}
    present = dict.fromkeys(name for _, _, row in rows for name in row)
    if "reference" in asked and not find_column(asked["reference"], present):
        raise missing_column(path or dataset.name, asked["reference"], present)
    if "text" in asked:
        asked["context"] = ()
    with_split = [{**_with_turns(row, place), _SPLIT: each} for each, place, row in rows]
    return _prompts(replace(dataset, **asked), with_split, path or dataset.name)


def _own_prompts(rows: Numbered, options: Mapping[str, str]) -> list[Prompt]:
    """Read rows that have the columns of this project's own prompts, as ``load_prompts`` does.

    An option names another column for a field, or is its value in all rows.
    """
    present = list(dict.fromkeys(name for _, row in rows for name in row))
    for field_name in _ROLES:
        if field_name not in options:
            continue
        given = options[field_name]
        if given in present:
            rows = [(place, {**row, field_name: row.get(given)}) for place, row in rows]
        elif field_name == "category" and given in our_categories():
            more = {"category": given, "more_categories": ()}
            rows = [(place, {**row, **more}) for place, row in rows]
        elif field_name == "label" and given in LABELS:
            rows = [(place, {**row, "label": given}) for place, row in rows]
        else:
            constants = {"category": our_categories(), "label": LABELS}.get(field_name, ())
            raise missing_column("the table", [given], present, constants)
    return prompts_of_rows(rows)


def _with_turns(row: Row, place: str) -> Row:
    """Add the text, the earlier turns and the answer to a row that holds a list of messages."""
    column = find_column(MESSAGE_COLUMNS, row)
    messages = None if column is None else values_in(row[column])
    if not is_conversation(messages):
        return row
    return {**row, **read_turns(messages or [], place)._asdict()}


class _Roles(NamedTuple):
    """Hold the columns of a table by what they are for; "" or a constant where there is none."""

    text: str
    response: str
    category: str
    label: str
    reference: str
    context: str
    pair: str

    @classmethod
    def of(
        cls, dataset: Dataset, columns: Collection[str], present: Sequence[str], where: str
    ) -> _Roles:
        """Find the columns, each the first of its candidates that is there.

        Raises:
            ValueError: If there is none, and the last candidate may not stand for all rows.
        """

        def column(candidates: Sequence[str], constants: Collection[str] = ()) -> str:
            name = find_column(candidates, columns) or candidates[-1]
            if name not in columns and name not in constants:
                raise missing_column(where, candidates, present, constants)
            return name

        text = column(dataset.text)
        reference = find_column(dataset.reference, columns) or ""
        of_turns = "response" if "history" in columns and "response" in columns else ""
        return cls(
            text,
            column(dataset.response) if dataset.response else of_turns,
            column(dataset.category, our_categories()) if dataset.category else "",
            "" if isinstance(dataset.label, Mapping) else column(dataset.label, LABELS),
            "" if reference == text else reference,
            find_column(dataset.context, columns) or "",
            find_column(dataset.pair, columns) or text,
        )


def _prompts(dataset: Dataset, rows: Sequence[Row], where: str) -> list[Prompt]:
    """Turn raw rows into prompts: find columns, translate categories and labels, drop copies."""
    present = list(dict.fromkeys(key for row in rows for key in row if key != _SPLIT))
    if dataset.prepare:
        try:
            rows = [_PREPARE[dataset.prepare](row) for row in rows]
        except KeyError as error:
            raise missing_column(where, [error.args[0]], present) from error
    # "" is how an unnamed index is written, and below it stands for a column that is not there.
    columns = set().union(*rows) - {""}
    rows = [{key: value for key, value in row.items() if key in columns} for row in rows]
    roles = _Roles.of(dataset, columns, present, where)
    fixed: Mapping[str, str] = dataset.label if isinstance(dataset.label, Mapping) else {}
    prompts, pairs = [], []
    for number, row in enumerate(rows, start=1):
        place = f"{where}, row {number}"
        question, answer, good, more = (
            text_in(row.get(name), name, place)
            for name in (roles.text, roles.response, roles.reference, roles.context)
        )
        verdict = (
            label_in(row.get(roles.label), roles.label, place)
            if roles.label in columns
            else roles.label or fixed[row[_SPLIT]]
        )
        if not question or verdict is None:
            continue
        pair = row.get(roles.pair)
        pairs.append(question if roles.pair == roles.text or is_missing(pair) else str(pair))
        question = f"{question}\n\n{more}" if more else question
        risks = (
            all_categories_of(dataset.name, row.get(roles.category))
            if roles.category in columns or not roles.category
            else (roles.category,)
        )
        main, *others = _risks_of(verdict, risks)
        prompt = Prompt(
            "", question, answer or None, main, verdict, dataset.name, reference=good or None
        )
        history = tuple(values_in(row.get("history")))
        if others or history:
            prompt = replace(prompt, id="", history=history, more_categories=tuple(others))
        prompts.append(prompt)
    return _without_copies(prompts, pairs, where)


def _risks_of(label: str, categories: Sequence[str]) -> Sequence[str]:
    """Say which categories a prompt of a label can have: no harmless one where it is unsafe."""
    if label == "unsafe":
        return [name for name in categories if name not in (HARMLESS, HARD_SAFE)] or [OTHER]
    return [HARMLESS] if label == "neutral" and list(categories) == [OTHER] else categories


def _without_copies(prompts: Sequence[Prompt], pairs: Sequence[str], where: str) -> list[Prompt]:
    """Leave one prompt per id, and none where copies contradict each other.

    Each question gets one main category, each pair one pair_id, and a prompt all the categories of
    its copies.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    categories: dict[str, dict[str, None]] = defaultdict(dict)
    first: dict[str, tuple[Prompt, str]] = {}
    for prompt, pair in zip(prompts, pairs, strict=True):
        labels[prompt.id].add(prompt.label)
        categories[prompt.id] |= dict.fromkeys(prompt.categories)
        first.setdefault(prompt.id, (prompt, pair))
    consistent = [(prompt, pair) for prompt, pair in first.values() if len(labels[prompt.id]) == 1]
    if not consistent:
        raise ValueError(f"{where} holds no prompt with a text and a label.")
    size_of_pair = Counter(pair for _, pair in consistent)
    risks: dict[str, Counter[str]] = defaultdict(Counter)
    for prompt, _ in consistent:
        if prompt.label == "unsafe" and prompt.response is not None:
            risks[prompt.text][prompt.category] += 1
    result = []
    for prompt, pair in consistent:
        category = (
            risks[prompt.text].most_common(1)[0][0] if risks[prompt.text] else prompt.category
        )
        more = tuple(name for name in categories[prompt.id] if name not in (category, OTHER))
        pair_id = f"{prompt.source}-pair-{key_of(pair)[:12]}" if size_of_pair[pair] > 1 else None
        result.append(replace(prompt, category=category, pair_id=pair_id, more_categories=more))
    return result


def _fetch(dataset: Dataset, split: str) -> Path:
    """Download the split's file into a cache on disk.

    What is pinned to a commit is fetched once and then works offline.
    """
    try:
        url = dataset.url(split)
        return _from_github(url) if url.startswith(GITHUB) else _from_hub(dataset, split)
    except Exception as error:  # the libraries below raise a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        gated = ", or accept its terms on the hub and log in" if "gated" in dataset.what else ""
        raise ConnectionError(
            f"cannot fetch {dataset.name!r} from {dataset.hub} ({reason}); "
            f"read a local copy as '{dataset.name}:PATH'{gated}."
        ) from error


def _from_hub(dataset: Dataset, split: str) -> Path:
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords | {"disable": True})

    return Path(
        hf_hub_download(
            dataset.hub,
            dataset.files[split],
            repo_type="dataset",
            revision=dataset.revision,
            tqdm_class=NoBar,
        )
    )


def _from_github(url: str) -> Path:
    import platformdirs
    import pooch

    folder = Path(platformdirs.user_cache_dir("workbench")) / "datasets" / key_of(url)
    logger = pooch.get_logger()
    level_before = logger.level
    logger.setLevel("WARNING")  # else it tells on the terminal what it downloads
    try:
        # The address names a commit, so there is no hash of the file to compare.
        file = pooch.retrieve(
            url,
            known_hash=None,
            fname=url.rsplit("/", 1)[-1],
            path=folder,
            downloader=pooch.HTTPDownloader(timeout=60),
        )
    finally:
        logger.setLevel(level_before)
    return Path(file)


def _harms(row: Row) -> Row:
    """Give a row of BeaverTails the harms that are set as its categories.

    The order is that of data/categories.csv, where rarer harms come first.
    """
    if not isinstance(row["category"], Mapping):
        raise ValueError(
            "BeaverTails' category must be an object of yes or no per harm, "
            f"got {row['category']!r}."
        )
    harms = {slug_of(name) for name, is_set in row["category"].items() if is_set}
    order = [slug for dataset, slug in category_map() if dataset == "beavertails"]
    return {**row, "category": [slug for slug in order if slug in harms]}


def _harm_of_answer(row: Row) -> Row:
    """Give a row of WildGuardMix its answer's label, or the prompt's label without the answer."""
    of_answer, of_prompt = row["response"] and row["response_harm_label"], row["prompt_harm_label"]
    return {
        **row,
        "response_harm_label": of_answer or of_prompt,
        "response": row["response"] if of_answer else None,
    }


def _toxic(row: Row) -> Row:
    """Give a row of ToxicChat one label: either of two marks makes a prompt unsafe."""
    toxic, jailbreak = (str(row[name]).lower() in YES for name in ("toxicity", "jailbreaking"))
    kind = "jailbreaking" if jailbreak else "toxic" if toxic else None
    return {**row, "toxicity": "unsafe" if kind else "neutral", "jailbreaking": kind}


_PREPARE: Mapping[str, Callable[[Row], Row]] = {
    "harms": _harms,
    "harm_of_answer": _harm_of_answer,
    "toxic": _toxic,
    "contrast": lambda row: {
        "label": "unsafe" if row["type"].startswith("contrast") else "safe",
        **row,
    },
    "copyright": lambda row: (
        {"category": "copyright", **row} if row[_SPLIT] == "copyright" else row
    ),
}
