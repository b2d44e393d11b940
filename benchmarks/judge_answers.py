"""Make the answers of two Qwen models again that were read blind for the judges.

    python benchmarks/judge_answers.py --model qwen2.5-coder-0.5b --out runs/0.5b.jsonl
    python benchmarks/judge_answers.py --model qwen2.5-coder-1.5b --out runs/1.5b.jsonl

Forty tune-fold questions of all categories, under seven conditions: plain, instructed, steered by
four constructions, and under a random direction. They were read blind and shuffled, twice;
data/framing_labels.csv holds ids, hashes and labels, no text. The last line says how many of the
labelled answers came out with the same text: another processor may change some.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from labels import digest, read_labels

import workbench as wb
from workbench.files.store import write_jsonl
from workbench.safesteer.own_answers import instructed, self_contrast
from workbench.steering.combine import pooled, summed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workbench.steering.interventions import Intervention
    from workbench.steering.vectors import SteeringVector

DEPTHS = (0.34, 0.41, 0.48, 0.55)
"""Where the four steered layers stand, as shares of all."""
PER_CATEGORY, FIT_PER_CATEGORY = 4, 8
RHO, SUM_RHO = 0.10, 0.06
ByCategory = dict[str, "SteeringVector"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="qwen2.5-coder-0.5b or qwen2.5-coder-1.5b")
    parser.add_argument("--dtype", default="float32", help="the larger model was in bfloat16")
    parser.add_argument("--out", required=True, help="jsonl file of the answers")
    options = parser.parse_args()
    model = wb.load_model(options.model, dtype=options.dtype)
    fit, tune, _ = wb.split_prompts(wb.load_prompts(), seed=0)
    questions = wb.select_prompts(tune, label="unsafe", limit=PER_CATEGORY)
    conditions = steered_conditions(model, fit)
    answers = wb.sweep(model, questions, conditions, progress=True)
    told = wb.generate(model, instructed(questions), condition="instruction", progress=True)
    answers += [replace(a, prompt=q) for a, q in zip(told, questions, strict=True)]
    rows = [
        {
            "prompt_id": answer.prompt.id,
            "category": answer.prompt.category,
            "model": options.model,
            "condition": answer.condition,
            "prompt": answer.prompt.text,
            "text": answer.text,
            "sha256": digest(answer.prompt.id, answer.text),
        }
        for answer in answers
    ]
    write_jsonl(options.out, rows)
    known = {row["sha256"] for row in read_labels() if row["model"] == options.model}
    again = len(known & {row["sha256"] for row in rows})
    print(f"{len(rows)} answers in {options.out}; {again} of {len(known)} labelled ones came again")


def steered_conditions(model: Any, fit: Sequence[wb.Prompt]) -> dict[str, Any]:
    """Name the conditions in which nothing but a vector is added."""
    sites = [wb.Site(int(depth * model.cfg.n_layers), "resid_post") for depth in DEPTHS]
    risky = wb.select_prompts(fit, label="unsafe", limit=FIT_PER_CATEGORY)
    own = self_contrast(
        model,
        risky,
        keep_safe=keep_all,
        keep_unsafe=keep_all,
        decoding=wb.Decoding(48, 0.7),
        progress=True,
    )
    by_own = wb.cache_activations(model, own, sites, span="response")
    by_openings = wb.cache_activations(model, wb.answer_prompts(fit), sites, span="response")
    by_prompt = wb.cache_activations(model, fit, sites)
    categories = list(dict.fromkeys(prompt.category for prompt in risky))
    vectors: dict[tuple[str, wb.Site], Mapping[str, SteeringVector]] = {}
    for site in sites:
        how: Any = {"residual": by_prompt[site], "safe_side": "paired"}
        openings = wb.fit_steering_vectors(by_openings[site], method="openings", **how)
        own_vectors = wb.fit_steering_vectors(by_own[site], method="self", **how)
        one_of = {
            name: replace(next(iter(pooled(of).values())), category="any")
            for name, of in (("openings", openings), ("self", own_vectors))
        }
        for name, vector in one_of.items():
            vectors[name, site] = {c: replace(vector, category=c) for c in categories}
        vectors["both", site] = {
            c: replace(summed(list(one_of.values())), category=c) for c in categories
        }
        vectors["prompts", site] = wb.fit_steering_vectors(by_prompt[site])
        vectors["random", site] = {
            c: replace(wb.random_vector(one_of["self"], seed=site.layer), category=c)
            for c in categories
        }
    rhos = {"openings": RHO, "self": RHO, "both": SUM_RHO, "prompts": RHO, "random": RHO}
    return {"unsteered": (), **{n: _steer(vectors, n, rho, sites) for n, rho in rhos.items()}}


def _steer(
    vectors: Mapping[tuple[str, wb.Site], Mapping[str, SteeringVector]],
    name: str,
    rho: float,
    sites: Sequence[wb.Site],
) -> dict[str, list[Intervention]]:
    return {
        category: [wb.add_vector(vectors[name, site][category], rho=rho) for site in sites]
        for category in vectors[name, sites[0]]
    }


def keep_all(_prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Keep every answer, whatever it says: no judge picks what the vectors are fitted on."""
    return [True for _ in answers]


if __name__ == "__main__":
    main()
