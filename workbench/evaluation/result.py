"""Hold the scores of answers and summarise them, with intervals and paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.evaluation.metrics import ALL, HARD_SAFE, MARGINS, RATES
from workbench.files.hints import did_you_mean
from workbench.stats import estimates

if TYPE_CHECKING:
    import pandas as pd

    from workbench.generation.answers import Completion


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Hold scores of answers, one row per prompt, condition and metric.

    Attributes:
        scores: Columns condition, category, label, prompt_id, metric, value; value is nan where it
            could not be scored. Where prompts have several answers there is a column sample, too.
        baseline: Condition that the others are compared with.
        completions: What was scored.
        judge: Name of the refusal judge.
        safety_judge: Name of the judge of safety; "safety_wording" where a list of phrases stood in
            for one.
        second_judge: Name of the second judge of safety, "" without one.
        reward_judge: Name of the reward model, "" without one.
    """

    scores: pd.DataFrame
    baseline: str
    completions: tuple[Completion, ...]
    judge: str
    safety_judge: str = "safety_wording"
    second_judge: str = ""
    reward_judge: str = ""

    def __repr__(self) -> str:
        conditions = ", ".join(dict.fromkeys(self.scores["condition"]))
        n = self.scores["prompt_id"].nunique()
        return f"Evaluation({n} prompts; {conditions}; baseline={self.baseline!r})"

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the tidy scores."""
        return self.scores.copy()

    def only(self, conditions: Sequence[str]) -> Evaluation:
        """Keep some of the conditions, the baseline always among them.

        Raises:
            ValueError: If one is unknown.
        """
        known = list(dict.fromkeys(self.scores["condition"]))
        for name in conditions:
            if name not in known:
                raise ValueError(
                    f"no condition {name!r}; conditions: {', '.join(known)}."
                    f"{did_you_mean(name, known)}"
                )
        names = {self.baseline, *conditions}
        return replace(
            self,
            scores=self.scores[self.scores["condition"].isin(names)].reset_index(drop=True),
            completions=tuple(c for c in self.completions if c.condition in names),
        )

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield one row per answer: what was asked, what was said, and its scores by metric.

        A score is None where the answer could not be scored; turns before the question are there,
        and a reference answer where there were any.
        """
        scores: dict[tuple[str, str, int], dict[str, float | None]] = {}
        table = self.scores if "sample" in self.scores else self.scores.assign(sample=0)
        for prompt_id, condition, sample, metric, value in table[
            ["prompt_id", "condition", "sample", "metric", "value"]
        ].itertuples(index=False):
            scores.setdefault((prompt_id, condition, sample), {})[metric] = (
                None if math.isnan(value) else value
            )
        for c in self.completions:
            turns = [{"role": m.role, "content": m.content} for m in c.prompt.history]
            yield {
                "prompt_id": c.prompt.id,
                "category": c.prompt.category,
                "label": c.prompt.label,
                **({"history": turns} if turns else {}),
                "prompt": c.prompt.text,
                **({"reference": c.prompt.reference} if c.prompt.reference else {}),
                "condition": c.condition,
                "sample": c.sample,
                "thinking": c.thinking,
                "text": c.text,
                "finish": c.finish,
                "scores": scores[c.prompt.id, c.condition, c.sample],
            }

    def summary(
        self,
        *,
        seed: int = 0,
        margins: Mapping[str, tuple[float, float]] | None = None,
        pooled: bool = False,
    ) -> pd.DataFrame:
        """Summarise every condition, category and metric, and compare it with the baseline.

        Rates have Wilson intervals and McNemar's exact p, means a bootstrap interval and its p;
        differences are bootstrapped over prompts. Only unsafe prompts are part of "all": neutral
        ones are a category of their own ("harmless"), and so are safe ones that look risky, twins
        and others together ("hard_safe"): a refusal there is an over-refusal. Several answers to a
        prompt are no independent ones: they are averaged first, n counts prompts, and p of rates is
        that of the bootstrap over prompts. A prompt of several categories counts in each of them.

        Args:
            seed: Seed of the bootstrap.
            margins: Metric to the largest change that counts as no loss, as a pair (from, to);
                ``MARGINS`` by default. Two one-sided tests are made (``tost_paired``): a change
                that is merely not significant does not show that nothing was lost, and with a
                margin of .02 fewer than 149 prompts never do (``stats.pairs_for_no_loss``).
            pooled: Summarise all unsafe prompts together alone, and no category.

        Returns:
            Columns condition, category, metric, value, low, high, n, n_unscored, difference,
            difference_low, difference_high, p, p_holm (corrected over the conditions of a category
            and metric), no_loss_p (nan for metrics without a margin).
        """
        import pandas as pd

        unsafe = self.scores["label"] == "unsafe"
        named = self.scores["category"].where(self.scores["label"] != "safe", HARD_SAFE)
        more = {c.prompt.id: c.prompt.categories[1:] for c in self.completions}
        others = self.scores["prompt_id"].map(lambda prompt_id: more.get(prompt_id, ()))
        further = self.scores.assign(category=others)[unsafe & others.map(bool)]
        both = pd.concat(
            [
                self.scores[unsafe].assign(category=ALL),
                *([] if pooled else [self.scores.assign(category=named)]),
                *([] if pooled else [further.explode("category")]),
            ],
            ignore_index=True,
        )
        groups = dict(list(both.groupby(["condition", "category", "metric"], sort=False)))
        margins = MARGINS if margins is None else margins
        table = pd.DataFrame(
            [self._row(key, rows, groups, margins, seed) for key, rows in groups.items()]
        )
        family = table.groupby(["category", "metric"], sort=False)["p"]
        table.insert(
            table.columns.get_loc("p") + 1,
            "p_holm",
            family.transform(lambda p: estimates.holm(p.to_numpy())),
        )
        return table

    def _row(
        self,
        key: Any,
        rows: pd.DataFrame,
        groups: Mapping[Any, pd.DataFrame],
        margins: Mapping[str, tuple[float, float]],
        seed: int,
    ) -> dict[str, Any]:
        """Summarise one condition, category and metric, with the baseline's answers as pairs."""
        condition, category, metric = key
        values = [None if math.isnan(v) else v for v in rows["value"]]
        answer = ["prompt_id", "sample"] if "sample" in rows else ["prompt_id"]
        clusters = list(rows["prompt_id"]) if "sample" in rows else None
        if metric in RATES:
            yes_no = [None if v is None else bool(v) for v in values]
            estimate: Any = estimates.rate(yes_no, clusters=clusters)
        else:
            estimate = estimates.mean(values, clusters=clusters, seed=seed)
        row = {"condition": condition, "category": category, "metric": metric}
        row |= {
            name: getattr(estimate, name) for name in ("value", "low", "high", "n", "n_unscored")
        }
        row |= dict.fromkeys(
            ("difference", "difference_low", "difference_high", "p", "no_loss_p"), math.nan
        )
        base = groups.get((self.baseline, category, metric))
        if condition == self.baseline or base is None:
            return row
        paired = base.set_index(answer)["value"].reindex(rows.set_index(answer).index)
        before = [None if math.isnan(v) else v for v in paired]
        difference = estimates.paired_difference(before, values, clusters=clusters, seed=seed)
        row |= {
            "difference": difference.value,
            "difference_low": difference.low,
            "difference_high": difference.high,
        }
        if metric in RATES and clusters is None:
            row["p"] = estimates.mcnemar(
                [None if v is None else bool(v) for v in before],
                [None if v is None else bool(v) for v in values],
            ).p
        else:
            row["p"] = difference.p
        if metric in margins:
            no_loss = estimates.tost_paired(before, values, margins[metric], clusters=clusters)
            row["no_loss_p"] = no_loss.p
        return row
