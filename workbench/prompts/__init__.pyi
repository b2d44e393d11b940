from .benchmarks import (
    Dataset,
    category_of,
    known_datasets,
    list_datasets,
    prompts_from,
    read_dataset,
)
from .openings import answer_prompts, read_openings
from .prompt import (
    Folds,
    Prompt,
    categories_of,
    in_turn,
    load_prompts,
    prompts_key,
    save_prompts,
    select_prompts,
    split_prompts,
    text_key,
)

__all__ = [
    "Dataset",
    "Folds",
    "Prompt",
    "answer_prompts",
    "categories_of",
    "category_of",
    "in_turn",
    "known_datasets",
    "list_datasets",
    "load_prompts",
    "prompts_from",
    "prompts_key",
    "read_dataset",
    "read_openings",
    "save_prompts",
    "select_prompts",
    "split_prompts",
    "text_key",
]
