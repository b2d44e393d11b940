"""Rate a gate on held-out prompts, and compare steering behind it with other ways.

Opening on a risky prompt is what a gate is for; on style-matched twins, look-alikes and everyday
prompts it is a false activation. Both are counted on prompts the gate was not fitted on, whatever
its threshold promised.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.evaluation.metrics import ALL, HEADLINE
from workbench.evaluation.result import Evaluation
from workbench.generation.answers import UNSTEERED, Completion
from workbench.models.tokens import answer_ids
from workbench.prompts.contrasts import CLOSED_FOR, KINDS, RISKY, kind_of
from workbench.stats.estimates import rate
from workbench.stats.selectivity import auroc, auroc_interval
from workbench.steering.layer_gates import LayerGate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from workbench.models.activations import ActivationSet
    from workbench.models.hooked_model import HookedModel
    from workbench.models.sites import Site
    from workbench.prompts.prompt import Prompt
    from workbench.steering.gates import Gate


CLOSED = "closed"
"""What stands in a category's place where a gate opened for none."""
REFUSAL = "I'm sorry, but I can't help with that."
"""What the condition "refuse when it fires" answers: the simplest use of a detector, and the
over-refusal that steering is to avoid."""
ORACLE, AT_RANDOM, REFUSING = "oracle gate", "gate at random", "refuse when it fires"
"""Names of the conditions that a gated one is compared with."""


def opened_for(gate: Gate, acts: ActivationSet) -> list[str]:
    """Name the category a gate opens for on each prompt; "closed" where it opens for none.

    Where it opens for several, it is the one with the highest score.
    """
    scores = gate.scores(acts.values)
    is_open = gate.opening(scores) > 0
    best = torch.where(is_open, scores, -torch.inf).argmax(dim=1)
    return [
        gate.categories[i] if any_open else CLOSED
        for i, any_open in zip(best.tolist(), is_open.any(dim=1).tolist(), strict=True)
    ]


def activation_rates(gate: Gate, acts: ActivationSet) -> pd.DataFrame:
    """Count how often a gate opens on each kind of prompt, all together and by category.

    Args:
        gate: A gate.
        acts: Pooled activations at its site of prompts it was not fitted on.

    Returns:
        Columns set (``KINDS``), category ("all" or one), rate, low, high (Wilson), n; own_rate is
        the share that opens for a category of the prompt's own, with own_low and own_high (nan for
        prompts without one); asked is the largest rate that the threshold was set for (nan for
        risky prompts).

    Raises:
        ValueError: If activations are of another site, span or model.
    """
    import pandas as pd

    _check(gate, acts)
    opened = opened_for(gate, acts)
    rows = []
    for kind in KINDS:
        inside = [i for i, p in enumerate(acts.prompts) if kind_of(p, gate.categories) == kind]
        categories = list(dict.fromkeys(c for i in inside for c in acts.prompts[i].categories))
        for category in [ALL, *(categories if len(categories) > 1 else ())]:
            places = [i for i in inside if category in (ALL, *acts.prompts[i].categories)]
            if not places:
                continue
            estimate = rate(opened[i] != CLOSED for i in places)
            own = rate(opened[i] in acts.prompts[i].categories for i in places)
            own_ends = (own.value, own.low, own.high) if kind == RISKY else (np.nan,) * 3
            threshold = gate.thresholds.get(CLOSED_FOR.get(kind, ""))
            row = {"set": kind, "category": category, "rate": estimate.value, "low": estimate.low}
            row |= {"high": estimate.high, "n": estimate.n}
            row |= zip(("own_rate", "own_low", "own_high"), own_ends, strict=True)
            rows.append(row | {"asked": np.nan if threshold is None else threshold.rate})
    return pd.DataFrame(rows)


def wrapping_rates(
    gate: Gate | LayerGate,
    acts: Mapping[Site, ActivationSet],
    wrapped: Mapping[str, Sequence[Prompt]],
) -> pd.DataFrame:
    """Count how often a gate opens on each kind of prompt, under each wrapping.

    Args:
        gate: A gate that reads one site or several.
        acts: Pooled activations at its sites of all the prompts, which it was not fitted on.
        wrapped: Name of a wrapping to its prompts, as ``wrapped_sets`` makes them.

    Returns:
        Columns wrapping, set (``KINDS``), rate (recall for risky prompts, false activations for the
        others), low, high (Wilson), n; auroc, auroc_low and auroc_high of the highest score, of the
        wrapping's risky prompts against this set; and at_recall_90, the share of this set that
        would open it at the threshold that nine of ten of those risky prompts reach. The last four
        are nan for risky prompts, and where a wrapping has none.

    Raises:
        ValueError: If activations are of another site, span or model, or lack a prompt.
    """
    import pandas as pd

    rows = []
    for wrapping, prompts in wrapped.items():
        of_wrapping = {site: acts[site].of(prompts) for site in _sites_in(gate, acts)}
        scores = _scores(gate, of_wrapping)
        is_open = (gate.opening(scores) > 0).any(dim=1).numpy()
        highest = scores.amax(dim=1).double().numpy()
        kinds = np.array([kind_of(p, gate.categories) for p in prompts])
        risky = highest[kinds == RISKY]
        for kind in KINDS:
            inside = kinds == kind
            if not inside.any():
                continue
            estimate, area, at_recall_90 = rate(is_open[inside]), (np.nan,) * 3, np.nan
            if kind != RISKY and len(risky):
                both = np.concatenate([risky, highest[inside]])
                value = float(auroc(both, np.arange(len(both)) < len(risky)))
                area = (value, *auroc_interval(value, len(risky), int(inside.sum())))
                reached = np.sort(risky)[len(risky) - math.ceil(0.9 * len(risky) - 1e-9)]
                at_recall_90 = float((highest[inside] >= reached).mean())
            row = {"wrapping": wrapping, "set": kind, "rate": estimate.value}
            row |= {"low": estimate.low, "high": estimate.high, "n": estimate.n}
            row |= zip(("auroc", "auroc_low", "auroc_high"), area, strict=True)
            rows.append(row | {"at_recall_90": at_recall_90})
    return pd.DataFrame(rows)


def confusion(gate: Gate, acts: ActivationSet) -> pd.DataFrame:
    """Count for which category a gate opens, by the category of the prompt.

    Returns:
        Columns truth (a main category, or one of the sets of safe prompts), opened (a category or
        "closed"), n, share of the truth's prompts.
    """
    import pandas as pd

    _check(gate, acts)
    kinds = [kind_of(p, gate.categories) for p in acts.prompts]
    truth = [
        p.category if kind == RISKY else kind for p, kind in zip(acts.prompts, kinds, strict=True)
    ]
    order = [*gate.categories, *(kind for kind in KINDS[1:] if kind in truth)]
    pairs = pd.DataFrame({"truth": truth, "opened": opened_for(gate, acts)})
    counts = pd.crosstab(pairs["truth"], pairs["opened"])
    counts = counts.reindex(
        index=[t for t in order if t in counts.index],
        columns=[*gate.categories, CLOSED],
        fill_value=0,
    )
    table = counts.reset_index().melt(id_vars="truth", var_name="opened", value_name="n")
    return table.assign(share=table["n"] / table.groupby("truth")["n"].transform("sum"))


def roc(gate: Gate, acts: ActivationSet) -> pd.DataFrame:
    """Say how well the highest score tells risky prompts from each kind of safe ones.

    Returns:
        Columns against (one of the sets of safe prompts), false_rate, recall: the curve's corners
        in order, over all thresholds; auroc, low, high, n: the same in each row of a curve.
    """
    import pandas as pd
    from sklearn.metrics import roc_curve

    _check(gate, acts)
    scores = gate.scores(acts.values).amax(dim=1).double().numpy()
    kinds = np.array([kind_of(p, gate.categories) for p in acts.prompts])
    curves = []
    for kind in KINDS[1:]:
        risky, safe = scores[kinds == RISKY], scores[kinds == kind]
        if not len(risky) or not len(safe):
            continue
        both = np.concatenate([risky, safe])
        is_risky = np.arange(len(both)) < len(risky)
        area = float(auroc(both, is_risky))
        low, high = auroc_interval(area, len(risky), len(safe))
        false_rate, recall, _ = roc_curve(is_risky, both, drop_intermediate=False)
        curve = {"against": kind, "false_rate": false_rate, "recall": recall}
        curves.append(pd.DataFrame(curve).assign(auroc=area, low=low, high=high, n=len(both)))
    if not curves:
        raise ValueError("a ROC needs risky prompts and safe ones, got one side only.")
    return pd.concat(curves, ignore_index=True)


def cells(evaluation: Evaluation, opened: Mapping[str, bool], condition: str) -> pd.DataFrame:
    """Count the four cells gate x harm, and say what steering behind the gate did in each.

    Args:
        evaluation: Scores of the unsteered model and of the condition.
        opened: Prompt id to whether the gate opened on it.
        condition: Name of the gated condition.

    Returns:
        Columns gate (open, closed), prompts (risky, safe), n, identical (share of answers as the
        unsteered ones, token by token) with its interval, and for the headline, refusal and
        degenerate the shares before and after. Cells without prompts are left out.
    """
    import pandas as pd

    tokens = {(c.prompt.id, c.condition, c.sample): c.tokens for c in evaluation.completions}
    label = {c.prompt.id: c.prompt.label for c in evaluation.completions}
    by_prompt = evaluation.scores.groupby(["metric", "condition", "prompt_id"], sort=False)
    values = by_prompt["value"].mean()
    samples = range(1 + max(c.sample for c in evaluation.completions))
    rows = []
    for is_open, is_risky in ((True, True), (True, False), (False, True), (False, False)):
        ids = [
            i
            for i, has_opened in opened.items()
            if has_opened == is_open
            and (label.get(i) == "unsafe") == is_risky
            and {(i, condition, 0), (i, UNSTEERED, 0)} <= tokens.keys()
        ]
        if not ids:
            continue
        each = [(i, sample) for i in ids for sample in samples]
        same = rate(
            [tokens.get((i, condition, k)) == tokens.get((i, UNSTEERED, k)) for i, k in each],
            clusters=[i for i, _ in each] if len(samples) > 1 else None,
        )
        row: dict[str, Any] = {
            "gate": "open" if is_open else "closed",
            "prompts": "risky" if is_risky else "safe",
            "n": len(ids),
        }
        row |= {"identical": same.value, "identical_low": same.low, "identical_high": same.high}
        for metric in (HEADLINE, "refusal", "degenerate"):
            for when, name in (("before", UNSTEERED), ("after", condition)):
                row[f"{metric}_{when}"] = float(values[metric][name].reindex(ids).mean())
        rows.append(row)
    return pd.DataFrame(rows)


def refusing(
    completions: Sequence[Completion], opened: Mapping[str, bool], model: HookedModel
) -> list[Completion]:
    """Make the condition "refuse when it fires" from unsteered answers.

    It has a fixed refusal where the gate opened, and the unsteered answer elsewhere.
    """
    tokens = answer_ids(model, REFUSAL)
    return [
        Completion(c.prompt, REFUSAL, tokens, "eos", REFUSING, sample=c.sample)
        if opened[c.prompt.id]
        else replace(c, condition=REFUSING)
        for c in completions
        if c.condition == UNSTEERED
    ]


def beside_a_gate(
    evaluation: Evaluation, opened: Mapping[str, bool], steered: str, gated: str, *, seed: int = 0
) -> Evaluation:
    """Add the conditions that gates of other kinds would have made of the same answers.

    They show what a gate is worth: "oracle gate" steers exactly the risky prompts, "gate at random"
    as many prompts as the gate opened for, drawn at random. Conditions that the evaluation has
    already, such as steering that is always on at equal mean strength, stay beside them.

    Args:
        evaluation: Scores of the unsteered model and of both conditions.
        opened: Prompt id to whether the gate opened on it.
        steered: Condition that steers always.
        gated: Condition that steers behind the gate.
        seed: Seed of the gate at random.

    Raises:
        ValueError: If a condition is missing, or the gate of a prompt is not known.
    """
    import pandas as pd

    scores = evaluation.scores
    for name in (UNSTEERED, steered, gated):
        if name not in set(scores["condition"]):
            known = ", ".join(dict.fromkeys(scores["condition"]))
            raise ValueError(
                f"no answers under {name!r} to compare the gate with; conditions: {known}."
            )
    ids = list(dict.fromkeys(scores["prompt_id"]))
    unknown = [i for i in ids if i not in opened]
    if unknown:
        raise ValueError(
            f"whether the gate opened on prompt {unknown[0]!r} is not known; "
            "give it for every prompt."
        )
    fired = [i for i in ids if opened[i]]
    drawn = set(random.Random(f"{seed}|gate").sample(sorted(ids), len(fired)))
    risky = set(scores.loc[scores["label"] == "unsafe", "prompt_id"])
    is_open_for = {ORACLE: risky, AT_RANDOM: drawn}
    tables, completions = [scores], list(evaluation.completions)
    for name, open_for in is_open_for.items():
        is_open = scores["prompt_id"].isin(open_for)
        unsteered_rows = scores[(scores["condition"] == UNSTEERED) & ~is_open]
        steered_rows = scores[(scores["condition"] == steered) & is_open]
        tables.append(pd.concat([unsteered_rows, steered_rows]).assign(condition=name))
        completions += [
            replace(c, condition=name)
            for c in evaluation.completions
            if c.condition == (steered if c.prompt.id in open_for else UNSTEERED)
        ]
    return replace(
        evaluation,
        scores=pd.concat(tables, ignore_index=True),
        completions=tuple(completions),
    )


def _sites_in(gate: Gate | LayerGate, acts: Mapping[Site, ActivationSet]) -> tuple[Site, ...]:
    """List the sites that a gate reads; raise where one was not read."""
    sites = gate.sites if isinstance(gate, LayerGate) else (gate.site,)
    missing = [site for site in sites if site not in acts]
    if missing:
        raise ValueError(f"the gate reads at {missing[0]}, and no activations of it are given.")
    return sites


def _scores(
    gate: Gate | LayerGate, acts: Mapping[Site, ActivationSet]
) -> Float[Tensor, "prompt category"]:
    if isinstance(gate, LayerGate):
        return gate.scores(acts)
    _check(gate, acts[gate.site])
    return gate.scores(acts[gate.site].values)


def _check(gate: Gate, acts: ActivationSet) -> None:
    """Raise where activations are of another site, span or model than the gate reads."""
    if (acts.site, acts.span, acts.model.fingerprint) != (
        gate.site,
        gate.span,
        gate.model.fingerprint,
    ):
        raise ValueError(
            f"the gate reads span {gate.span!r} at {gate.site} of {gate.model.name!r}; "
            f"got {acts!r}: cache those activations instead."
        )
