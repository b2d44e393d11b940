"""Let a language model on this machine judge answers by a rubric, without writing a word.

The model is shown the rubric's words as options with letters, and a question with its answer; the
probabilities of the letters as next token are the verdict. A model prefers some places in a list,
so the options are shown in several orders and the probabilities averaged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.files.store import key_of
from workbench.judges._checkpoints import without_controls
from workbench.judges.base import Verdict, is_empty, without_thoughts
from workbench.judges.rubrics import Rubric, load_rubrics
from workbench.models.load import load_model, model_info
from workbench.models.next_token import next_token_logits
from workbench.models.tokens import encode_what_fits, token_ids
from workbench.prompts.prompt import Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.hooked_model import HookedModel
    from workbench.models.tokens import Encoded


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORDERS = 2
"""Orders in which options are shown: as they stand in the rubric, and the other way round."""


@dataclass(frozen=True, eq=False)
class LocalJudge:
    """Judge answers by a rubric with any language model; made by ``load_local_judge``.

    Attributes:
        reader: A hooked model that follows instructions. It need not be the one that answered.
        rubric: What it is asked: "framing", "unsafe", "refusal" or "on_topic" of
            data/judge_rubrics.yaml, or one of your own with criteria and meanings.
        orders: Orders of the options over which probabilities are averaged; each costs a pass.
        batch_size: Answers in a pass.
    """

    reader: HookedModel
    rubric: Rubric
    orders: int = ORDERS
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.orders <= 2 * len(self.rubric.answers):
            raise ValueError(
                f"orders must be from 1 to {2 * len(self.rubric.answers)}, got {self.orders!r}."
            )
        if set(self.rubric.meanings) != set(self.rubric.answers):
            raise ValueError(
                f"rubric {self.rubric.name!r} does not say what each of its words means; "
                "give a rubric with criteria and meanings."
            )

    def __repr__(self) -> str:
        return f"LocalJudge({self.name})"

    @property
    def name(self) -> str:
        """Name reader and rubric, with a key of weights, rubric and orders."""
        info = model_info(self.reader)
        rubric = self.rubric
        answers = {word: list(answer) for word, answer in rubric.answers.items()}
        content = [rubric.criteria, dict(rubric.meanings), answers, info.fingerprint, self.orders]
        return f"local:{info.name}:{rubric.name}-{key_of(content)[:8]}"

    def probabilities(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Float[Tensor, "answer option"]:
        """Give the probability of each of the rubric's words for each answer, in their order.

        A row is nan where an answer has no letter or digit, or does not fit the reader's context.

        Raises:
            TypeError: If one string is given in place of a list.
            ValueError: If the two lists differ in length, or the reader has no letters as tokens.
        """
        responses = without_thoughts(prompts, responses)
        words = list(self.rubric.answers)
        total = torch.zeros(len(responses), len(words))
        tokens = letter_tokens(self.reader, len(words))
        for order in _orders(len(words), self.orders):
            rows = as_read(
                self.reader, prompts, responses, self.rubric, [words[place] for place in order]
            )
            readable = [row for row in rows if row is not None]
            places = [i for i, row in enumerate(rows) if row is not None]
            ids = [token for of_letter in tokens for token in of_letter]
            logits = next_token_logits(self.reader, readable, ids, batch_size=self.batch_size)
            by_letter = torch.stack(
                [part.logsumexp(dim=1) for part in logits.split([len(t) for t in tokens], dim=1)],
                dim=1,
            )
            shown = torch.full((len(responses), len(words)), float("nan"))
            shown[places] = by_letter.softmax(dim=1)
            total[:, order] += shown
        return total / self.orders

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Judge each answer by the likeliest word; the score is the mean of the words' scores."""
        return self.verdicts(prompts, responses, self.probabilities(prompts, responses))

    def verdicts(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        probabilities: Float[Tensor, "answer option"],
    ) -> list[Verdict]:
        """Turn the probabilities of the words into verdicts, as a call does."""
        del prompts
        words = list(self.rubric.answers)
        scores = torch.tensor([self.rubric.answers[word][1] for word in words])
        return [
            self._verdict(words, row, float(row @ scores), response)
            for row, response in zip(probabilities, responses, strict=True)
        ]

    def _verdict(
        self, words: Sequence[str], row: Float[Tensor, " option"], score: float, response: str
    ) -> Verdict:
        if is_empty(response):
            return Verdict("degenerate", None, self.name, "empty")
        if row.isnan().any():
            reason = "question and answer do not fit the judge's context"
            return Verdict("unscored", None, self.name, reason)
        word = words[int(row.argmax())]
        reason = f"{word.replace('_', ' ')}, probability {float(row.max()):.2f}"
        framing = word if self.rubric.name == "framing" else None
        return Verdict(self.rubric.answers[word][0], score, self.name, reason, framing)


def load_local_judge(
    model: str | HookedModel,
    rubric: str | Rubric = "framing",
    *,
    device: str | None = None,
    dtype: str = "auto",
    orders: int = ORDERS,
    batch_size: int = 16,
) -> LocalJudge:
    """Load a language model as a judge that answers with a letter.

    Args:
        model: A hub name, folder, .gguf file or packaged model, see ``load_model``; or a hooked
            model that is there already.
        rubric: One of data/judge_rubrics.yaml, or your own.
        device: Where it runs; a GPU if there is one, else the CPU.
        dtype: float32, bfloat16, float16, or "auto" for the checkpoint's own.
        orders: Orders of the options over which probabilities are averaged.
        batch_size: Answers in a pass.

    Raises:
        ValueError: If the rubric is unknown or the model cannot be loaded.
    """
    if isinstance(rubric, str):
        if rubric not in load_rubrics():
            raise ValueError(f"unknown rubric {rubric!r}; rubrics: {', '.join(load_rubrics())}.")
        rubric = load_rubrics()[rubric]
    reader = load_model(model, device=device, dtype=dtype) if isinstance(model, str) else model
    return LocalJudge(reader, rubric, orders, batch_size)


def as_read(
    reader: HookedModel,
    prompts: Sequence[str],
    responses: Sequence[str],
    rubric: Rubric,
    words: Sequence[str],
) -> list[Encoded | None]:
    """Put rubric, question and answer into the reader's chat template, as token ids.

    Everything stands in the user's turn: not every template has a system turn. The texts stand in
    JSON and hold no control token of the reader's, so that none can end its turn.

    Args:
        reader: A hooked model.
        prompts: Questions.
        responses: Their answers.
        rubric: What is asked.
        words: Its words, in the order in which they get letters.

    Returns:
        One row per answer; None where an answer is empty or does not fit the reader's context.
    """
    options = [
        f"{letter}: {rubric.meanings[word]}" for letter, word in zip(LETTERS, words, strict=False)
    ]
    head = "\n".join([rubric.criteria, "Options:", *options])
    tail = "Reply with the letter of the option that fits best, and nothing else."
    places, texts = [], []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if is_empty(response):
            continue
        pair = json.dumps({"request": prompt, "answer": response}, ensure_ascii=False)
        places.append(i)
        texts.append(f"{head}\n\n{without_controls(reader.tokenizer, pair)}\n\n{tail}")
    rows: list[Encoded | None] = [None] * len(responses)
    asked = [judged_prompt(*of_row) for of_row in zip(places, texts, strict=True)]
    for i, row in zip(places, encode_what_fits(reader, asked), strict=True):
        rows[i] = row
    return rows


def judged_prompt(i: int, text: str, response: str | None = None) -> Prompt:
    """Make the prompt of a judge's reader: its id is the place of the answer."""
    kind: dict[str, Any] = {"category": "any", "label": "neutral", "source": "judged"}
    return Prompt(id=str(i), text=text, response=response, **kind)


def letter_tokens(reader: HookedModel, n: int) -> list[list[int]]:
    """List the tokens that stand for each of the first letters: alone, and behind a space.

    Raises:
        ValueError: If a letter is no token of its own, or two letters share one.
    """
    tokens = []
    for letter in LETTERS[:n]:
        ids = [token_ids(reader, text) for text in (letter, f" {letter}")]
        tokens.append(sorted({row[0] for row in ids if len(row) == 1}))
    flat = [token for of_letter in tokens for token in of_letter]
    if not all(tokens) or len(set(flat)) < len(flat):
        raise ValueError(
            f"the tokenizer of {model_info(reader).name!r} has no token for each of the letters "
            f"{LETTERS[0]} to {LETTERS[n - 1]}; take another model as judge."
        )
    return tokens


def _orders(n: int, count: int) -> list[list[int]]:
    """List orders of n options: as they stand, turned round, and both rotated ever further."""
    orders = []
    for number in range(count):
        shift = (number // 2) * max(1, 2 * n // count)
        places = [(place + shift) % n for place in range(n)]
        orders.append(places if number % 2 == 0 else places[::-1])
    return orders
