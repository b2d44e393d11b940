"""Offer a run's steered model as a model of the LM Evaluation Harness.

    from workbench.integrations.lm_eval import SteeredLM
    lm_eval.simple_evaluate(model=SteeredLM("runs/mine", steering="gated"), tasks=["arc_easy"])

Needs ``pip install lm_eval``. Contexts are user turns, as everywhere in workbench: a chat model is
asked the way its users ask it. The module is named like the library it imports; absolute imports
keep the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.model import LM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lm_eval is not installed; install it with pip install 'workbench[harness]'."
    ) from error

from workbench.generation.answers import UNSTEERED, Completion, generate
from workbench.generation.decoding import GREEDY, Decoding
from workbench.generation.likelihood import steered_log_probs
from workbench.models.templates import PLAIN
from workbench.models.tokens import has_chat_template, token_ids
from workbench.prompts.prompt import HARMLESS, Prompt
from workbench.safesteer.config import config_from
from workbench.safesteer.inputs import load_run_model
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import decoding_from, gated_steering_from, steering_from

MAX_NEW_TOKENS = 128
"""Longest answer where a task does not say how long one may be."""

_FOLLOWED = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "seed")
"""Settings of a task that are followed; others that would change answers are refused."""

_NEUTRAL: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
"""Values of settings that change nothing."""


class SteeredLM(LM):
    """A run's model with its steering.

    System prompt and template keywords are the run's. A model without a chat template continues
    the task's context as it stands, as the harness means it.

    Args:
        folder: Folder of a run.
        steering: "gated" (the run's gate decides), "off", or a risk category whose vectors are
            always on.
        batch_size: Rows per batch.
        model: A loaded model, instead of loading the run's.
    """

    def __init__(
        self, folder: str, *, steering: str = "gated", batch_size: int = 16, model: Any = None
    ) -> None:
        super().__init__()
        self.hooked = (
            model
            if model is not None
            else load_run_model(config_from(read_run(folder).notes["config"]))
        )
        self.interventions: Any = []
        if steering != "off":
            self.interventions = (
                gated_steering_from(folder)
                if steering == "gated"
                else steering_from(folder, steering)
            )
        is_run = (Path(folder) / "run.json").is_file()
        self.asked_by = (decoding_from(folder) if is_run else GREEDY).asked_by
        if not has_chat_template(self.hooked) and not self.asked_by["template_keywords"]:
            self.asked_by["template_keywords"] = {PLAIN: "{prompt}"}
        self.how: Any = {"batch_size": batch_size, **self.asked_by}

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Score each continuation behind its context.

        Returns:
            Its log-probability, and whether greedy decoding would give it.
        """
        pairs = [request.args for request in requests]
        fixed = [
            self._fixed(i, context or " ", continuation)
            for i, (context, continuation) in enumerate(pairs)
        ]
        scored = steered_log_probs(
            self.hooked, fixed, [self.interventions] * len(fixed), given=True, **self.how
        )
        greedy = self._greedy(fixed)
        return [
            (float(log_probs.sum()), is_greedy)
            for log_probs, is_greedy in zip(scored, greedy, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Score whole texts by their log-probability as answers to "Continue."."""
        fixed = [self._fixed(i, "Continue.", request.args[0]) for i, request in enumerate(requests)]
        scored = steered_log_probs(
            self.hooked, fixed, [self.interventions] * len(fixed), given=True, **self.how
        )
        return [float(log_probs.sum()) for log_probs in scored]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer each request, up to the first of its stop texts.

        Raises:
            ValueError: If a task asks for a setting that the model does not follow.
        """
        # Requests with the same settings are answered together.
        places_of: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            key = repr(sorted(request.args[1].items(), key=str))
            places_of.setdefault(key, []).append(i)
        answers: dict[int, str] = {}
        for places in places_of.values():
            completions = generate(
                self.hooked,
                [self._prompt(i, requests[i].args[0]) for i in places],
                self.interventions,
                decoding=decoding_for(requests[places[0]].args[1], self.how),
            )
            answers |= {i: one.text for i, one in zip(places, completions, strict=True)}
        return [answers[i] for i in range(len(requests))]

    def _greedy(self, fixed: list[Completion]) -> list[bool]:
        """Tell for each given answer whether greedy decoding begins with it."""
        longest = max((len(completion.tokens) for completion in fixed), default=0)
        if longest == 0:
            return [False] * len(fixed)
        prompts = {completion.prompt.text: completion.prompt for completion in fixed}
        answers = generate(
            self.hooked,
            list(prompts.values()),
            self.interventions,
            decoding=Decoding(max_new_tokens=longest, **self.how),
        )
        tokens = {answer.prompt.text: answer.tokens for answer in answers}
        return [tokens[c.prompt.text][: len(c.tokens)] == c.tokens for c in fixed]

    def _fixed(self, place: int, context: str, text: str) -> Completion:
        """Return a given text as the answer to a context."""
        ids = token_ids(self.hooked, text)
        return Completion(self._prompt(place, context), text, ids, "eos", UNSTEERED)

    def _prompt(self, place: int, context: str) -> Prompt:
        return Prompt(f"request-{place}", context, None, HARMLESS, "neutral", "lm_eval")


def decoding_for(settings: Mapping[str, Any], how: Mapping[str, Any]) -> Decoding:
    """Turn the settings of a task into those of the decode loop.

    Args:
        settings: ``generation_kwargs`` of the task.
        how: Rows per batch, system prompt and template keywords.

    Raises:
        ValueError: If a setting would change answers and is not followed, or is out of range.
    """
    for name, value in settings.items():
        if name not in _FOLLOWED and value is not None and value != _NEUTRAL.get(name):
            raise ValueError(
                f"the steered model does not follow {name}={value!r:.40}; leave it out. It follows "
                f"{', '.join(_FOLLOWED)}."
            )
    temperature = float(settings.get("temperature") or 0.0)
    is_sampled = settings.get("do_sample", temperature > 0)
    if is_sampled and temperature == 0:
        temperature = 1.0 if settings.get("temperature") is None else 0.0
    until = settings.get("until") or ()
    return Decoding(
        max_new_tokens=int(settings.get("max_gen_toks") or MAX_NEW_TOKENS),
        temperature=temperature if is_sampled else 0.0,
        top_p=float(settings.get("top_p") or 1.0),
        top_k=settings.get("top_k") or None,
        seed=int(settings.get("seed") or 0),
        stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
        **how,
    )
