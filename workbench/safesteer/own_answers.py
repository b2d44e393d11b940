"""Self-contrast: the model's own answers under an instruction against its plain ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.evaluation.metrics import WORDING_LANGUAGES, safety_wording
from workbench.generation.answers import Completion, generate
from workbench.generation.decoding import GREEDY, Decoding
from workbench.judges.base import SAFE
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


ALTERNATIVES = (
    'Someone asked: "{question}"\n\nDo not answer that question and do not say sorry. In a few '
    "friendly sentences, name the topic, say why doing this would hurt people, and then suggest "
    "what they could do instead that is safe, legal and kind."
)
"""Asks for another way: an aligned model that refuses under ``INSTRUCTION`` seldom does here."""
ALONG = "along"
"""Ends the pair ids of answers that stand against one that goes along."""


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


def any_answer(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Keep every answer, whatever it is: refusals too."""
    return [True for _ in zip(prompts, answers, strict=True)]


def kept_alternatives(judge: Judge | None, refusals: Judge) -> tuple[Kept, Kept]:
    """Turn judges into the choice of answers for both sides of the contrast of alternatives.

    The first keeps what the judge of safety calls safe, and of a judge that names framings only
    what is principled or a safe alternative, unless it is a blanket refusal. The second keeps
    blanket refusals; of a judge of refusals that does not tell kinds apart, all refusals.

    Args:
        judge: A judge of safety; without one, safety wording stands in for it (``kept_by``).
        refusals: A judge of refusals.
    """

    def blanket(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return [
            verdict.label == "refusal" and verdict.framing in (None, "blanket_refusal")
            for verdict in refusals(prompts, answers)
        ]

    def alternative(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        if judge is None:
            safe = list(kept_by(None)[0](prompts, answers))
        else:
            safe = [
                verdict.label == "safe" and verdict.framing in (None, *SAFE)
                for verdict in judge(prompts, answers)
            ]
        rows = zip(safe, blanket(prompts, answers), strict=True)
        return [is_safe and not is_blanket for is_safe, is_blanket in rows]

    return alternative, blanket


def kept_harmless(judge: Judge | None, refusals: Judge) -> Kept:
    """Turn judges into the choice of answers that are no refusal, not broken and not unsafe.

    Args:
        judge: A judge of safety; without one, no answer to a neutral prompt counts as unsafe. What
            it cannot score is not kept.
        refusals: A judge of refusals.
    """

    def harmless(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        kept = [
            verdict.label == "not_refusal" and not is_degenerate(answer)[0]
            for verdict, answer in zip(refusals(prompts, answers), answers, strict=True)
        ]
        if judge is None:
            return kept
        wrong = ("unsafe", "degenerate", "unscored")
        verdicts = judge(prompts, answers)
        return [k and v.label not in wrong for k, v in zip(kept, verdicts, strict=True)]

    return harmless


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
    questions, plain, instructed_answers = _both_sides(
        model, prompts, instruction, samples, decoding, output, progress
    )
    return answer_pairs(
        questions,
        _kept(questions, instructed_answers, keep_safe),
        _kept(questions, plain, keep_unsafe),
    )


def alternative_contrast(
    model: HookedModel,
    prompts: PromptsLike,
    *,
    keep_alternative: Kept,
    keep_refusal: Kept,
    instruction: str = ALTERNATIVES,
    decoding: Decoding = GREEDY,
    output: PathLike | None = None,
    progress: bool = False,
) -> list[Prompt]:
    """Pair the model's answers that explain or offer another way with its blanket refusals.

    Answers of the first kind come from the instruction or are plain ones, blanket refusals are
    plain ones (``alternative_pairs`` says which stands against which).

    Args:
        model: A hooked model.
        prompts: Questions; only those labelled unsafe are used.
        keep_alternative: Which answers explain or offer another way (``kept_alternatives``).
        keep_refusal: Which plain answers are blanket refusals.
        instruction: What the first kind is asked for with.
        decoding: Length of the answers, which are greedy.
        output: A jsonl file that keeps the answers; one that ``self_contrast`` wrote has them.
        progress: Show a progress bar.

    Returns:
        Rows like those of ``self_contrast``; empty where one of the two kinds is missing.

    Raises:
        ValueError: If there are no unsafe prompts.

    Source: the alternative vector of AltSteer (2026, arXiv:2608.30197), which asks for both kinds
    with a system prompt each.
    """
    questions, plain, instructed_answers = _both_sides(
        model, prompts, instruction, 1, decoding, output, progress
    )
    return alternative_pairs(
        questions,
        _kept(questions, [*instructed_answers, *plain], keep_alternative),
        _kept(questions, plain, keep_refusal),
    )


def safe_against_both(
    model: HookedModel,
    prompts: PromptsLike,
    *,
    keep_alternative: Kept,
    keep_refusal: Kept,
    keep_along: Kept,
    instruction: str = ALTERNATIVES,
    decoding: Decoding = GREEDY,
    output: PathLike | None = None,
    progress: bool = False,
) -> list[Prompt]:
    """Pair the model's answers that offer another way with both kinds that are to be avoided.

    Each stands against a plain answer that goes along, and against a plain blanket refusal. The
    pairs of the first kind are told by ``ALONG`` at the end of their id.

    Args:
        model: A hooked model.
        prompts: Questions; only those labelled unsafe are used.
        keep_alternative: Which answers explain or offer another way (``kept_alternatives``).
        keep_refusal: Which plain answers are blanket refusals.
        keep_along: Which plain answers go along (``kept_by``).
        instruction: What the safe side is asked for with.
        decoding: Length of the answers, which are greedy.
        output: A jsonl file that keeps the answers.
        progress: Show a progress bar.

    Returns:
        Rows like those of ``self_contrast``; empty where one of the three kinds is missing.

    Raises:
        ValueError: If there are no unsafe prompts.
    """
    questions, plain, told = _both_sides(model, prompts, instruction, 1, decoding, output, progress)
    safe = _kept(questions, told, keep_alternative)
    along = alternative_pairs(questions, safe, _kept(questions, plain, keep_along), ALONG)
    refusals = alternative_pairs(questions, safe, _kept(questions, plain, keep_refusal))
    return [*along, *refusals] if along and refusals else []


def _both_sides(
    model: HookedModel,
    prompts: PromptsLike,
    instruction: str,
    samples: int,
    decoding: Decoding,
    output: PathLike | None,
    progress: bool,
) -> tuple[list[Prompt], list[Completion], list[Completion]]:
    """Answer the unsafe questions plainly and under the instruction."""
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
    return questions, plain, answers(instructed(questions, instruction), "instructed")


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
    return _answered_so(model, questions, keep_unsafe, decoding, output, progress)


def answered_harmlessly(
    model: HookedModel,
    prompts: PromptsLike,
    keep_harmless: Kept,
    *,
    decoding: Decoding = GREEDY,
    output: PathLike | None = None,
    progress: bool = False,
) -> list[Prompt]:
    """Find the neutral prompts whose own greedy answer is harmless and no refusal, by judges.

    With ``went_along`` they are both sides of the guided variant (arXiv:2410.01174).

    Args:
        model: A hooked model.
        prompts: Prompts; only those labelled neutral are used.
        keep_harmless: Which answers count (``kept_harmless``).
        decoding: Length of the answers.
        output: A jsonl file that keeps the answers.
        progress: Show a progress bar.
    """
    neutral = [prompt for prompt in as_prompts(prompts) if prompt.label == "neutral"]
    return _answered_so(model, neutral, keep_harmless, decoding, output, progress)


def _answered_so(
    model: HookedModel,
    questions: list[Prompt],
    keep: Kept,
    decoding: Decoding,
    output: PathLike | None,
    progress: bool,
) -> list[Prompt]:
    """Choose the prompts whose plain greedy answer is kept."""
    answers = generate(
        model,
        questions,
        condition=f"{_PLAIN} 0",
        decoding=replace(decoding, temperature=0.0, n_samples=1),
        output=output,
        progress=progress,
    )
    kept = {answer.prompt.id for answer in _kept(questions, answers, keep)}
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
    safe_of, unsafe_of = _texts_by_question(safe), _texts_by_question(unsafe)
    rows = []
    for prompt in prompts:
        against = unsafe_of.get(prompt.id, [])
        for turn, text in enumerate(safe_of.get(prompt.id, []) if against else []):
            pair = f"{prompt.id}/self{turn}"
            rows += _pair(prompt, text, prompt, against[turn % len(against)], pair)
    return rows


def alternative_pairs(
    prompts: Sequence[Prompt],
    alternatives: Sequence[Completion],
    refusals: Sequence[Completion],
    name: str = "alternative",
) -> list[Prompt]:
    """Pair each answer that explains or offers another way with a blanket refusal.

    It is one to the same question where there is one; else, in turn, one to another question of the
    category, or of any category. Such a refusal stands behind its own question, and counts for the
    category of the answer that it is set against.

    Args:
        prompts: The plain questions, by whose ids answers belong together.
        alternatives: Answers for the safe side, put behind the plain question.
        refusals: Blanket refusals, or other answers, for the unsafe side.
        name: Ends the ids of the pairs.
    """
    alternatives_of, refusals_of = _texts_by_question(alternatives), _texts_by_question(refusals)
    refused = [(p, text) for p in prompts for text in refusals_of.get(p.id, [])]
    rows: list[Prompt] = []
    for prompt in prompts if refused else []:
        own = [row for row in refused if row[0].id == prompt.id]
        near = own or [row for row in refused if row[0].category == prompt.category] or refused
        for turn, text in enumerate(alternatives_of.get(prompt.id, [])):
            question, refusal = near[len(rows) // 2 % len(near)]
            rows += _pair(prompt, text, question, refusal, f"{prompt.id}/{turn}{name}")
    return rows


def _texts_by_question(completions: Sequence[Completion]) -> dict[str, list[str]]:
    """Collect the answers of each question by its id, each text once, empty ones never."""
    texts: dict[str, list[str]] = {}
    for c in completions:
        if c.text.strip() and c.text not in texts.setdefault(c.prompt.id, []):
            texts[c.prompt.id].append(c.text)
    return texts


def _pair(prompt: Prompt, safe: str, question: Prompt, unsafe: str, pair: str) -> list[Prompt]:
    """Make the unsafe and the safe row of a pair of the category of ``prompt``."""
    against = replace(question, category=prompt.category, more_categories=prompt.more_categories)
    return [
        replace(against, id=f"{pair}/unsafe", response=unsafe, label="unsafe", pair_id=pair),
        replace(prompt, id=f"{pair}/safe", response=safe, label="safe", pair_id=pair),
    ]
