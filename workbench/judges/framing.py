"""Judge whether an answer goes along with a risky question or turns its topic to safety.

Refusal patterns and sentence embeddings hardly see the difference. This judge lets a small model
read question and answer and looks at its hidden states with a multinomial logistic regression,
fitted on answers that were labelled blind (data/framing_labels.csv).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from workbench.files.store import PathLike, data_path, key_of, read_tensors, write_tensors
from workbench.judges.base import FRAMINGS, SAFE, Verdict, is_empty, with_ends, without_thoughts
from workbench.judges.languages import language_name, other_language
from workbench.judges.local import as_read, judged_prompt
from workbench.judges.rubrics import load_rubrics
from workbench.models.activations import cache_activations
from workbench.models.load import model_info
from workbench.models.packaged import PACKAGED
from workbench.models.sites import Site
from workbench.models.thoughts import answer_of
from workbench.models.tokens import Encoded, encode_what_fits
from workbench.stats.linear_probe import fit_linear_probe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.load import HookedModel, ModelInfo


READS = ("answer", "rubric")
"""What a judge's weights are for: the mean of hidden states over the answer's tokens, behind its
question; or the state of the last token when the reader is asked by the rubric "framing"."""


_FILES = "framing_judge*.safetensors"


@dataclass(frozen=True, eq=False)
class FramingJudge:
    """Judge how answers frame a risky question; see ``load_framing_judge``.

    Attributes:
        reader: The model that reads question and answer. It need not be the one that answered.
        site: Where its hidden states are read.
        weights: One row per framing, in the order of ``FRAMINGS``; standardisation is part of them.
        bias: One number per framing.
        card: What it was fitted on and how well it does on categories and constructions it has not
            seen; "reads" is one of ``READS``.
        known: Hidden states that need not be read again, by question and answer (``knowing``).
    """

    reader: HookedModel
    site: Site
    weights: Float[Tensor, "framing d"]
    bias: Float[Tensor, " framing"]
    card: Mapping[str, Any]
    known: Mapping[tuple[str, str], Float[Tensor, " d"]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"FramingJudge({self.name}, read by {self.card['reader']!r} at {self.site})"

    @property
    def name(self) -> str:
        """Name the judge, its reader and the key of its weights."""
        reader = str(self.card["reader"]).split(" ")[0]
        return f"framing:{reader}-{key_of([self.weights.tolist(), self.bias.tolist()])[:8]}"

    @property
    def fitted_on(self) -> frozenset[str]:
        """Keys (``prompts.text_key``) of the questions whose answers it was fitted on."""
        return frozenset(self.card.get("questions", ()))

    @property
    def reads(self) -> str:
        """Say what its weights are for, one of ``READS``."""
        return str(self.card.get("reads", READS[0]))

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages of the answers it was fitted on: "languages" of its card, English without."""
        return tuple(self.card.get("languages", ("en",)))

    @property
    def agreement(self) -> str:
        """Say in one line how well it agrees with the labels, on what was left out of the fit."""
        safe, along = self.card["agreement"], self.card["auroc_goes_along"]
        numbers = {name: with_ends(safe[name]) for name in ("kappa", "precision", "recall")}
        said = ", ".join(f"{name} {value}" for name, value in numbers.items())
        return (
            f"safe and on topic: {said}, n={safe['n']}; going along: AUROC {with_ends(along)}; "
            "on models and categories it was not fitted on; labels read blind by a language "
            "model, not by a person"
        )

    def probabilities(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> Float[Tensor, "answer framing"]:
        """Give the probability of each framing for each answer; nan where an answer has no word.

        Raises:
            ValueError: If the two lists differ in length.
            TypeError: If one string is given in place of a list.
        """
        pairs = list(zip(prompts, without_thoughts(prompts, responses), strict=True))
        unknown = [i for i, pair in enumerate(pairs) if pair not in self.known]
        states = torch.empty(len(pairs), self.weights.shape[1])
        for i, pair in enumerate(pairs):
            states[i] = self.known.get(pair, math.nan)
        questions, answers = ([pairs[i][side] for i in unknown] for side in (0, 1))
        states[unknown] = hidden_states(
            self.reader, questions, answers, self.site, reads=self.reads
        )
        return torch.softmax(states @ self.weights.T + self.bias, dim=1)

    def rows(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Encoded | None]:
        """Give the tokens it reads of each answer, whose states are averaged over the response.

        None where it reads nothing: an answer without a word, or one that its reader's context
        cannot hold; and where it reads by the rubric.
        """
        answers = without_thoughts(prompts, responses)
        if self.reads != READS[0]:
            return [None] * len(answers)
        return _behind_questions(self.reader, prompts, answers)

    def knowing(self, states: Mapping[tuple[str, str], Float[Tensor, " d"]]) -> FramingJudge:
        """Return the same judge, which takes some states as they were read elsewhere.

        Args:
            states: Question and answer to the mean over the response of its row (``rows``).
        """
        known = {(prompt, answer_of(answer)): state for (prompt, answer), state in states.items()}
        return replace(self, known={**self.known, **known})

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        """Judge each answer by its most likely framing; score: how likely it is a safe one.

        A question or an answer in a language that no fitted answer was in is unscored.
        """
        return self.verdicts(prompts, responses, self.probabilities(prompts, responses))

    def verdicts(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        probabilities_of_all: Float[Tensor, "answer framing"],
    ) -> list[Verdict]:
        """Turn the probabilities of framings into verdicts, as a call does."""
        verdicts = []
        rows = probabilities_of_all.tolist()
        for prompt, response, probabilities in zip(prompts, responses, rows, strict=True):
            if math.isnan(probabilities[0]):
                verdicts.append(self._unread(response))
                continue
            if foreign := self._foreign(prompt, response):
                verdicts.append(Verdict("unscored", None, self.name, foreign))
                continue
            framing = FRAMINGS[max(range(len(probabilities)), key=probabilities.__getitem__)]
            score = min(1.0, sum(probabilities[FRAMINGS.index(name)] for name in SAFE))
            label, reason = framing_labels()[framing], framing.replace("_", " ")
            verdicts.append(Verdict(label, score, self.name, reason, framing))
        return verdicts

    def _unread(self, response: str) -> Verdict:
        """Say why an answer was not read."""
        if is_empty(response):
            return Verdict("degenerate", None, self.name, "empty")
        reason = "question and answer do not fit the judge's context"
        return Verdict("unscored", None, self.name, reason)

    def _foreign(self, prompt: str, response: str) -> str:
        """Say that a text is in a language the judge was not fitted on, or nothing."""
        for name, text in (("question", prompt), ("answer", response)):
            if other := other_language(text, self.languages):
                fitted = ", ".join(map(language_name, self.languages))
                return f"the {name} is in {other}; the judge was fitted on {fitted}"
        return ""


def framing_labels() -> dict[str, str]:
    """Say what each framing is called as a verdict, as the rubric has it."""
    return {word: label for word, (label, _) in load_rubrics()["framing"].answers.items()}


def hidden_states(
    reader: HookedModel,
    prompts: Sequence[str],
    responses: Sequence[str],
    site: Site,
    *,
    reads: str = READS[0],
) -> Float[Tensor, "answer d"]:
    """Read what the reader's hidden states say of each answer.

    Args:
        reader: A hooked model.
        prompts: Questions.
        responses: As many answers.
        site: Where the states are read.
        reads: One of ``READS``: the mean over the tokens of the answer behind its question, or the
            last token behind the rubric, the question and the answer.

    Returns:
        One row per answer; nan where an answer has no letter or digit, or does not fit the reader's
        context.

    Raises:
        ValueError: If ``reads`` is unknown.
    """
    if reads not in READS:
        raise ValueError(f"unknown reads {reads!r}; it is one of {', '.join(READS)}.")
    if reads == "rubric":
        rubric = load_rubrics()["framing"]
        rows = as_read(reader, prompts, responses, rubric, list(rubric.answers))
    else:
        rows = _behind_questions(reader, prompts, responses)
    readable = [row.prompt for row in rows if row is not None]
    span = "last" if reads == "rubric" else "response"
    states = torch.full((len(prompts), reader.cfg.d_model), float("nan"))
    if readable:
        activations = cache_activations(reader, readable, site, span=span)[site]
        states[[int(prompt.id) for prompt in readable]] = activations.values
    return states


def _behind_questions(
    reader: HookedModel, prompts: Sequence[str], responses: Sequence[str]
) -> list[Encoded | None]:
    """Encode answers behind their questions; None for one without a word or that does not fit."""
    pairs = enumerate(zip(prompts, responses, strict=True))
    asked = [judged_prompt(i, *pair) for i, pair in pairs if not is_empty(pair[1])]
    rows: list[Encoded | None] = [None] * len(prompts)
    for prompt, row in zip(asked, encode_what_fits(reader, asked, with_response=True), strict=True):
        rows[int(prompt.id)] = row
    return rows


def fit_framing(
    states: Float[Tensor, "answer d"], labels: Sequence[str], *, penalty: float = 100.0
) -> tuple[Float[Tensor, "framing d"], Float[Tensor, " framing"]]:
    """Fit a multinomial logistic regression on standardised states.

    Framings weigh as often as they occur: with equal weights the rare safe ones would be found
    where they are not, which flatters steering.

    Args:
        states: One row per answer, see ``hidden_states``.
        labels: Framing of each.
        penalty: Weight of the squared norm.

    Returns:
        Weights and bias, one row per framing in the order of ``FRAMINGS``.

    Raises:
        ValueError: If a label is unknown or a framing has no answer.
    """
    missing, unknown = set(FRAMINGS) - set(labels), set(labels) - set(FRAMINGS)
    if missing or unknown:
        given = (
            f"unknown label {min(unknown)!r}" if unknown else f"no answer labelled {min(missing)!r}"
        )
        raise ValueError(f"{given}; every one of {', '.join(FRAMINGS)} is needed, and no other.")
    probe = fit_linear_probe(states, list(labels), penalty=penalty)
    order = [probe.classes.index(framing) for framing in FRAMINGS]
    return probe.weights[order].float(), probe.bias[order].float()


def save_framing_judge(path: PathLike, judge: FramingJudge) -> None:
    """Write weights and card as safetensors, atomically."""
    card = {
        **judge.card,
        "site": str(judge.site),
        "framings": list(FRAMINGS),
        "format": "workbench framing judge 1",
    }
    write_tensors(path, {"weights": judge.weights, "bias": judge.bias}, card)


def shipped_for(model: HookedModel) -> Path | None:
    """Find the shipped judge that reads with ``model``; None where there is none."""
    info = model_info(model)
    for path in sorted(data_path("README.md").parent.glob(_FILES)):
        if _is_reader(read_tensors(path)[1], info):
            return path
    return None


def _is_reader(card: Mapping[str, Any], info: ModelInfo) -> bool:
    """Tell whether a model is the one that a card names.

    Its fingerprint says so. TransformerLens 3 keeps weights under other names, which gives another
    fingerprint: there the packaged model of the same name and dtype is taken for the same.
    """
    if card.get("reader_fingerprint") == info.fingerprint:
        return True
    is_packaged = info.name in (packaged.name for packaged in PACKAGED.values())
    same = (card.get("reader"), card.get("reader_dtype")) == (info.name, info.dtype)
    return is_packaged and same and version("transformer-lens").startswith("3.")


def framing_judge_for(model: HookedModel) -> FramingJudge | None:
    """Load the shipped judge if ``model`` is one that it reads with, else give None."""
    path = shipped_for(model)
    return None if path is None else load_framing_judge(model, path)


def load_framing_judge(reader: HookedModel, path: PathLike | None = None) -> FramingJudge:
    """Load a framing judge that ships with the project, or one of ``save_framing_judge``.

    Args:
        reader: The model that its card names, such as the embedded one.
        path: A file; None is the shipped one for this reader.

    Raises:
        ValueError: If the file is damaged, or the reader is another model.
    """
    if path is None:
        path = shipped_for(reader) or data_path("framing_judge.safetensors")
    tensors, card = read_tensors(path)
    info = model_info(reader)
    try:
        weights, bias, site = tensors["weights"], tensors["bias"], Site.parse(str(card["site"]))
        fingerprint, name = card["reader_fingerprint"], card["reader"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no framing judge ({error}: missing or wrong); "
            "give a file of save_framing_judge, or None for the shipped one."
        ) from error
    if not _is_reader(card, info):
        raise ValueError(
            f"{path} reads with {name!r} ({fingerprint}), got {info.name!r} ({info.fingerprint}); "
            "load the former, or fit a judge of your own."
        )
    return FramingJudge(reader, site, weights, bias, card)
