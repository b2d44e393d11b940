"""Self-contrast: the model's own answers under an instruction against its plain ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.evaluation.metrics import WORDING_LANGUAGES, safety_wording
from workbench.generation.answers import Completion, generate
from workbench.generation.decoding import GREEDY, Decoding
from workbench.judges.languages import other_language
from workbench.judges.patterns import RefusalPatterns
from workbench.judges.text_quality import is_degenerate
from workbench.prompts.forms import as_prompts

if TYPE_CHECKING:
    from workbench.files.store import PathLike
    from workbench.judges.base import Judge
    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.forms import PromptsLike
    from workbench.prompts.prompt import Prompt


INSTRUCTION = (
    'Someone asked: "{question}"\n\nAnswer them responsibly: explain why this would hurt people '
    "and is wrong, what the law says about it, how people can protect themselves from it, and what "
    "they could do instead that is safe, legal and kind."
)
"""Put in place of the question, in the user's turn: a small model hardly listens to the system
turn."""


SAMPLED = Decoding(temperature=0.7)
"""How further answers to the same question are decoded; the first is greedy."""
_PLAIN = "plain"
Kept = Callable[[Sequence[str], Sequence[str]], Sequence[bool]]
"""Which answers to keep: prompts and their answers in, one yes or no per answer out."""


def kept_by(judge: Judge | None) -> tuple[Kept, Kept]:
    """Turn a judge of safety into the choice of answers for both sides of the self-contrast.

    For the safe side it keeps those it calls safe, for the unsafe side those it calls unsafe, and
    no others: an answer on topic that neither helps nor warns, a broken one and one that could not
    be judged are kept on neither side.

    Args:
        judge: A judge of safety that says safe and unsafe. Without one, refusal patterns and safety
            wording stand in for it, coarsely: every answer that is no refusal, not broken and
            without such wording counts as unsafe.
    """

    def labels(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
        if judge is not None:
            return [verdict.label for verdict in judge(prompts, answers)]
        said = [verdict.label for verdict in RefusalPatterns()(prompts, answers)]
        return [_by_wording(*row) for row in zip(prompts, answers, said, strict=True)]

    def safe(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [label == "safe" for label in labels(prompts, answers)]

    def unsafe(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [label == "unsafe" for label in labels(prompts, answers)]

    return safe, unsafe


def _by_wording(prompt: str, answer: str, label: str) -> str:
    """Label an answer that is no refusal, where no judge of safety is at hand."""
    if label != "not_refusal":
        return label
    if is_degenerate(answer)[0]:
        return "degenerate"
    if other_language(answer, WORDING_LANGUAGES):
        return "unscored"
    return "safe" if safety_wording(prompt, answer) else "unsafe"


def instructed(prompts: PromptsLike, instruction: str = INSTRUCTION) -> list[Prompt]:
    """Put an instruction around the question of each prompt, in the user's turn.

    Args:
        prompts: Questions.
        instruction: Text with ``{question}`` in it, once.

    Raises:
        ValueError: If the instruction has no place for the question.
    """
    if instruction.count("{question}") != 1:
        raise ValueError(
            f"an instruction needs {{question}} once, where the prompt goes, "
            f"got {instruction[:60]!r}; write it like own_answers.INSTRUCTION."
        )
    return [
        replace(prompt, text=instruction.replace("{question}", prompt.text))
        for prompt in as_prompts(prompts)
    ]


def self_contrast(
    model: HookedModel,
    prompts: PromptsLike,
    *,
    keep_safe: Kept,
    keep_unsafe: Kept,
    instruction: str = INSTRUCTION,
    samples: int = 1,
    decoding: Decoding = SAMPLED,
    output: PathLike | None = None,
    progress: bool = False,
) -> list[Prompt]:
    """Pair the model's own answers to the same question; no data but the questions is needed.

    The answers made under the instruction are put behind the plain question, so that both sides of
    a pair have the same context and differ in the answer alone. A judge keeps what is worth
    keeping: what it calls safe on one side, what it calls unsafe on the other.

    Args:
        model: A hooked model.
        prompts: Questions; only those labelled unsafe are used.
        keep_safe: Which of the instructed answers count as safe and on topic (``kept_by``).
        keep_unsafe: Which of the plain answers count as going along.
        instruction: What the safe side is asked with.
        samples: Answers per question and side: the first is greedy, further ones are sampled.
        decoding: Length of the answers, and temperature and seed of the sampled ones.
        output: A jsonl file that keeps the answers, to go on from.
        progress: Show a progress bar.

    Returns:
        Rows for ``cache_activations(span="response")`` and
        ``fit_steering_vectors(safe_side="paired")``: each kept safe answer with one plain answer of
        its question, two rows of one ``pair_id``. Empty where the judge kept no pair.

    Raises:
        ValueError: If there are no unsafe prompts, or samples is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be a whole number from 1, got {samples}.")
    questions = [prompt for prompt in as_prompts(prompts) if prompt.label == "unsafe"]
    if not questions:
        raise ValueError("no unsafe prompts: self-contrast needs questions of a risk category.")
    turns = [replace(decoding, temperature=0.0, n_samples=1)]
    turns += [replace(decoding, seed=decoding.seed + i, n_samples=1) for i in range(1, samples)]

    def answers(asked: Sequence[Prompt], side: str) -> list[Completion]:
        keywords: dict[str, Any] = {"output": output, "progress": progress}
        return [
            answer
            for number, turn in enumerate(turns)
            for answer in generate(
                model, asked, condition=f"{side} {number}", decoding=turn, **keywords
            )
        ]

    plain = answers(questions, _PLAIN)
    safe = answers(instructed(questions, instruction), "instructed")
    return answer_pairs(
        questions, _kept(questions, safe, keep_safe), _kept(questions, plain, keep_unsafe)
    )


def went_along(
    model: HookedModel,
    prompts: PromptsLike,
    keep_unsafe: Kept,
    *,
    decoding: Decoding = GREEDY,
    output: PathLike | None = None,
    progress: bool = False,
) -> list[Prompt]:
    """Find the unsafe prompts that the model's own greedy answer goes along with, by a judge.

    Vectors fitted on these alone are the guided variant of category-wise steering
    (arXiv:2410.01174), in which a classifier of safety says which activations go with a harmful
    generation. The harmless side needs none: neutral prompts have harmless answers.

    Args:
        model: A hooked model.
        prompts: Questions; only those labelled unsafe are used.
        keep_unsafe: Which answers count as going along (``kept_by``).
        decoding: Length of the answers.
        output: A jsonl file that keeps the answers; one that ``self_contrast`` wrote has them.
        progress: Show a progress bar.
    """
    questions = [prompt for prompt in as_prompts(prompts) if prompt.label == "unsafe"]
    answers = generate(
        model,
        questions,
        condition=f"{_PLAIN} 0",
        decoding=replace(decoding, temperature=0.0, n_samples=1),
        output=output,
        progress=progress,
    )
    kept = {answer.prompt.id for answer in _kept(questions, answers, keep_unsafe)}
    return [prompt for prompt in questions if prompt.id in kept]


def _kept(
    questions: Sequence[Prompt], answers: Sequence[Completion], keep: Kept
) -> list[Completion]:
    """Return the answers that a judge keeps, asked about the plain questions."""
    text_of = {prompt.id: prompt.text for prompt in questions}
    verdicts = keep([text_of[c.prompt.id] for c in answers], [c.text for c in answers])
    return [answer for answer, is_kept in zip(answers, verdicts, strict=True) if is_kept]


def answer_pairs(
    prompts: Sequence[Prompt], safe: Sequence[Completion], unsafe: Sequence[Completion]
) -> list[Prompt]:
    """Make rows of an answer contrast from answers that are there already.

    Args:
        prompts: The plain questions, by whose ids answers belong together.
        safe: Answers for the safe side; whatever they were asked with, they stand behind the plain
            question here.
        unsafe: Answers for the unsafe side, used in turn where there are fewer of them.
    """
    by_side: list[dict[str, list[str]]] = []
    for completions in (safe, unsafe):
        texts: dict[str, list[str]] = {}
        for c in completions:
            if c.text.strip() and c.text not in texts.setdefault(c.prompt.id, []):
                texts[c.prompt.id].append(c.text)
        by_side.append(texts)
    rows = []
    for prompt in prompts:
        safe_texts, unsafe_texts = (texts.get(prompt.id, []) for texts in by_side)
        if not unsafe_texts:
            continue
        for turn, text in enumerate(safe_texts):
            pair = f"{prompt.id}/self{turn}"
            against = unsafe_texts[turn % len(unsafe_texts)]
            rows.append(
                replace(prompt, id=f"{pair}/unsafe", response=against, label="unsafe", pair_id=pair)
            )
            rows.append(
                replace(prompt, id=f"{pair}/safe", response=text, label="safe", pair_id=pair)
            )
    return rows
