"""The steered model as a model of the LM Evaluation Harness (lm_eval), so that its tasks run on it.

    from workbench.integrations.lm_eval import SteeredLM
    lm_eval.simple_evaluate(model=SteeredLM("runs/mine", steering="gated"), tasks=["arc_easy"])

Needs ``pip install lm_eval``. Contexts are user turns, as everywhere in workbench: a chat model is asked the way its users ask it.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM

from workbench.generation.answers import UNSTEERED, Completion, generate
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import steered_log_probs
from workbench.prompts.prompt import HARMLESS, Prompt
from workbench.safesteer.config import config_from
from workbench.safesteer.inputs import load_run_model
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import gated_steering_from, steering_from

MAX_NEW_TOKENS = 128


class SteeredLM(LM):
    """A run's model with its steering.

    Args:
        folder: Folder of a run.
        steering: "gated" (the run's gate decides), "off", or a risk category whose vectors are always on.
        batch_size: Rows a batch.
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
        self.rows = batch_size

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation behind its context, and whether greedy decoding would give it."""
        pairs = [request.args for request in requests]
        fixed = [
            self._fixed(i, context or " ", continuation)
            for i, (context, continuation) in enumerate(pairs)
        ]
        scored = steered_log_probs(
            self.hooked, fixed, [self.interventions] * len(fixed), batch_size=self.rows
        )
        greedy = self._greedy(fixed)
        return [
            (float(own.sum()), is_greedy) for own, is_greedy in zip(scored, greedy, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability of whole texts, as answers to "Continue."."""
        fixed = [self._fixed(i, "Continue.", request.args[0]) for i, request in enumerate(requests)]
        scored = steered_log_probs(
            self.hooked, fixed, [self.interventions] * len(fixed), batch_size=self.rows
        )
        return [float(own.sum()) for own in scored]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers, cut at the first stop text."""
        said: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        for places in alike.values():
            settings = requests[places[0]].args[1]
            completions = generate(
                self.hooked,
                [
                    Prompt(
                        f"request-{i}", requests[i].args[0], None, HARMLESS, "neutral", "lm_eval"
                    )
                    for i in places
                ],
                self.interventions,
                decoding=Decoding(
                    max_new_tokens=int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
                    temperature=float(settings.get("temperature", 0.0))
                    if settings.get("do_sample")
                    else 0.0,
                    batch_size=self.rows,
                ),
            )
            until = settings.get("until") or []
            for i, completion in zip(places, completions, strict=True):
                said[i] = completion.text
                for stop in filter(None, [until] if isinstance(until, str) else until):
                    said[i] = said[i].split(stop)[0]
        return [said[i] for i in range(len(requests))]

    def _greedy(self, fixed: list[Completion]) -> list[bool]:
        longest = max((len(c.tokens) for c in fixed), default=0)
        if longest == 0:
            return [False] * len(fixed)
        asked = {c.prompt.text: c.prompt for c in fixed}
        made = generate(
            self.hooked,
            list(asked.values()),
            self.interventions,
            decoding=Decoding(max_new_tokens=longest, batch_size=self.rows),
        )
        said = {c.prompt.text: c.tokens for c in made}
        return [said[c.prompt.text][: len(c.tokens)] == c.tokens for c in fixed]

    def _fixed(self, place: int, context: str, text: str) -> Completion:
        tokens = self.hooked.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = Prompt(f"request-{place}", context, None, HARMLESS, "neutral", "lm_eval")
        return Completion(prompt, text, tuple(int(i) for i in tokens), "eos", UNSTEERED)
