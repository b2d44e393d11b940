"""Set the threshold of a stepwise gate, which looks at a prompt and at every token of its answer.

``fit_gate`` promises a rate for one look. A gate that looks again at each generated token passes
more often, so its threshold is set here on the highest score of a whole answer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from workbench.models.activations import token_activations
from workbench.models.errors import CannotBeDone
from workbench.prompts.contrasts import rows_that_must_not_open
from workbench.stats.selectivity import conformal_threshold

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

    from workbench.models.hooked_model import HookedModel
    from workbench.prompts.prompt import Prompt
    from workbench.steering.gates import Gate


def calibrate_over_answers(
    model: HookedModel,
    gate: Gate,
    prompts: Sequence[Prompt],
    *,
    neutral_rate: float = 0.02,
    hard_rate: float = 0.10,
    system_prompt: str | None = None,
) -> Gate:
    """Set a stepwise gate's thresholds so that whole answers, not single looks, keep the rates.

    Args:
        model: The model it was fitted on.
        gate: A gate of form "stepwise".
        prompts: Safe and neutral prompts it was not fitted on, each with the answer that the
            unsteered model gives as its ``response``. Answers as long as those to come: more
            tokens are more looks.
        neutral_rate: Largest share of neutral prompts whose answer may open the gate at any token.
        hard_rate: The same of twins and look-alikes.
        system_prompt: Words for the system turn.

    Returns:
        The gate with other thresholds.

    Raises:
        ValueError: If the gate looks once only, or a prompt has no response.
        CannotBeDone: If no prompt is safe or neutral.
    """
    if gate.form != "stepwise":
        raise ValueError(
            f"a gate of form {gate.form!r} looks at the prompt alone: fit_gate has set its "
            "threshold; give one of form 'stepwise'."
        )
    rates = {"neutral": neutral_rate, "hard_safe": hard_rate}
    thresholds = {
        name: conformal_threshold(
            highest_scores(model, gate, [prompts[i] for i in rows], system_prompt=system_prompt),
            rates[name],
        )
        for name, rows in rows_that_must_not_open(prompts).items()
        if rows
    }
    if not thresholds:
        raise CannotBeDone("no safe or neutral prompts: nothing to set a gate's threshold on.")
    return replace(gate, thresholds=thresholds)


def highest_scores(
    model: HookedModel, gate: Gate, prompts: Sequence[Prompt], *, system_prompt: str | None = None
) -> Float[np.ndarray, " prompt"]:
    """Compute the highest running score of any category over each prompt and its response.

    The running score is that of ``intervene``: the prompt's own, of which each further token keeps
    the share ``gate.memory``.

    Raises:
        ValueError: If a prompt has no response.
    """
    highest = []
    for prompt in prompts:
        row, activations = token_activations(model, prompt, gate.site, system_prompt=system_prompt)
        begin, end = row.span("response")
        first, last = row.span("content") if gate.span == "content" else (begin - 1, begin)
        score = gate.scores(activations[first:last].mean(dim=0))
        top = float(score.max())
        for token in gate.scores(activations[begin:end]):
            score = gate.memory * score + (1 - gate.memory) * token
            top = max(top, float(score.max()))
        highest.append(top)
    return np.array(highest)
