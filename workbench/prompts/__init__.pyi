from .attacks import (
    attack_names,
    attack_templates,
    in_second_turn,
    question_id,
    wrap,
    wrap_in_turn,
    wrapped_sets,
)
from .benchmarks import (
    Dataset,
    known_datasets,
    list_datasets,
    prompts_from,
    read_dataset,
)
from .categories import all_categories_of, category_of
from .choices import choice_prompts
from .contrasts import Sides, has_twins, kind_of, rows_against, sides_of, sides_to_fit
from .forms import PromptsLike, as_prompts
from .openings import answer_prompts, read_openings
from .prompt import (
    Folds,
    Message,
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
    "Message",
    "Prompt",
    "PromptsLike",
    "Sides",
    "all_categories_of",
    "answer_prompts",
    "as_prompts",
    "attack_names",
    "attack_templates",
    "categories_of",
    "category_of",
    "choice_prompts",
    "has_twins",
    "in_second_turn",
    "in_turn",
    "kind_of",
    "known_datasets",
    "list_datasets",
    "load_prompts",
    "prompts_from",
    "prompts_key",
    "question_id",
    "read_dataset",
    "read_openings",
    "rows_against",
    "save_prompts",
    "select_prompts",
    "sides_of",
    "sides_to_fit",
    "split_prompts",
    "text_key",
    "wrap",
    "wrap_in_turn",
    "wrapped_sets",
]
