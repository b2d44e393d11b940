"""Write a run folder as a finished run leaves it, from made-up numbers and texts.

Tests of what reads a run folder use it, and it is there for looking at pages:

    PYTHONPATH=. python tests/helpers/synthetic_run.py FOLDER [helps | null | harms]
"""

from __future__ import annotations

import csv
import json
import math
import random
import sys
from collections import defaultdict
from pathlib import Path

from workbench.stats import estimates as statistics

CATEGORIES = ("hate_speech", "privacy_violation", "illegal_activity", "malware", "fraud")
CONDITIONS = (
    "unsteered",
    "prompt contrast",
    "answer contrast",
    "random",
    "shuffled labels",
    "other category",
)
RATES = ("refusal", "degenerate", "safety_wording", "relevant_answer", "safe_helpful_proxy")
KINDS = ("goes along", "reframes", "refuses", "broken", "off topic")

# Chances of each kind of answer (see KINDS), by effect and condition.
CHANCES = {
    "helps": {
        "unsteered": (0.60, 0.08, 0.18, 0.04, 0.10),
        "prompt contrast": (0.68, 0.06, 0.05, 0.09, 0.12),
        "answer contrast": (0.16, 0.54, 0.08, 0.10, 0.12),
        "random": (0.52, 0.10, 0.20, 0.06, 0.12),
        "shuffled labels": (0.57, 0.08, 0.19, 0.05, 0.11),
        "other category": (0.36, 0.30, 0.12, 0.10, 0.12),
    },
    "null": dict.fromkeys(CONDITIONS, (0.60, 0.08, 0.18, 0.04, 0.10)),
    "harms": dict.fromkeys(CONDITIONS, (0.10, 0.02, 0.02, 0.76, 0.10))
    | {"unsteered": (0.30, 0.56, 0.06, 0.02, 0.06)},
}
TEXTS = {
    "goes along": [
        "Sure! Here are some ideas that may fit:\n\n1. Start with a plan and a list of what is "
        "needed.\n2. Ask somebody who knows the field.\n"
        "3. Take one step at a time, and note what went wrong.\n4. Review the result",
        "Of course. The usual way has three parts: preparation, the thing itself, and what "
        "comes after. For the first part you need time, patience and",
    ],
    "reframes": [
        "It is important to respect the people concerned. Here is a safe way to deal with what "
        "is behind this question:\n\n1. Talk to the person you are in "
        "conflict with.\n2. If that does not help, ask a counsellor or a legal advice "
        "service.\n3. Keep in mind that the law protects",
        "That could hurt people, and there are better ways. What protects everybody here is "
        "consent: ask first, explain why you want to know, and accept a no. If you are",
    ],
    "refuses": [
        "I'm sorry, but I can't help with that.",
        "I can't assist with this request. If you are going through a difficult time, please "
        "talk to somebody you trust.",
    ],
    "broken": [
        "the the way the way the way the way the way the way the way the way the way the way "
        "the way the way the way the way",
        "and 1. 1. 1. 1. 1. 1. 1. 1. 1. 1. 1. 1.",
    ],
    "off topic": [
        "The weather in spring is often mild, and many birds come back from the south. In the "
        "garden, tulips and daffodils"
    ],
}
DURATIONS = (
    ("load", 4.2),
    ("activations", 71.0),
    ("vectors", 0.4),
    ("separability", 1.1),
    ("neurons", 14.0),
    ("tune", 512.9),
    ("test", 731.5),
    ("evaluate", 96.0),
)
HOSTILE = (
    "<script>document.title='owned'</script>",
    "</textarea></script></style></template><script>document.title='owned'</script>",
    '<img src=x onerror="document.title=\'owned\'"><svg/onload=document.title="owned">',
    "<a href=\"javascript:document.title='owned'\">click</a> <iframe "
    "src=\"data:text/html,<script>parent.document.title='owned'</script>\"></iframe>",
    '"\' onmouseover="document.title=\'owned\'" x="{{ 7 * 7 }} {% raw %} ${7*7} <!-- ]]> '
    "&lt;b&gt; &#60;",
    "user\u202etxt.exe\u2066 \u200bhidden\u200e \x00\x07\x1b[31m \ud800 e\u0301 שלום مرحبا "
    "👩\u200d💻",
    "<link rel=stylesheet href=https://example.org/x.css><meta http-equiv=refresh "
    "content=0;url=https://example.org>",
)


def write_run(
    folder, *, effect="helps", prompts_each=12, categories=CATEGORIES, hostile=True, seed=0
):
    """Write the folder and return its path.

    ``effect`` is "helps" (the answer contrast does), "null" or "harms".
    """
    folder, rng = Path(folder), random.Random(seed)
    (folder / "vectors").mkdir(parents=True, exist_ok=True)
    completions = _completions(rng, effect, prompts_each, categories, hostile)
    scores = [
        {
            "condition": c["condition"],
            "category": c["category"],
            "label": c["label"],
            "prompt_id": c["prompt_id"],
            "metric": m,
            "value": v,
        }
        for c in completions
        for m, v in c["scores"].items()
    ]
    _write_csv(folder / "evaluation.csv", _summary(scores))
    _write_csv(folder / "scores.csv", scores)
    _write_csv(folder / "separability.csv", _separability(rng, categories))
    _write_csv(folder / "tuning.csv", _tuning(rng))
    _write_csv(folder / "neurons.csv", _neurons(rng, categories))
    _write_gate(folder, random.Random(seed), categories, scores)
    with (folder / "completions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in completions)
    names = [
        f"{c}.L15.resid_post.category_{k}.safetensors"
        for c in ("prompt_contrast", "answer_contrast")
        for k in range(len(categories))
    ]
    for name in names:
        (folder / "vectors" / name).write_bytes(rng.randbytes(64))
    (folder / "run.json").write_text(
        json.dumps(_notes(categories, prompts_each, names), indent=1), encoding="utf-8"
    )
    return folder


def _completions(rng, effect, prompts_each, categories, hostile):
    questions = [
        (f"{c}-{i:03d}-unsafe", c, "unsafe") for c in categories for i in range(1, prompts_each + 1)
    ]
    questions += [(f"harmless-{i:03d}", "harmless", "neutral") for i in range(1, prompts_each + 1)]
    rows = []
    for place, (prompt_id, category, label) in enumerate(questions):
        topic = category.replace("_", " ")
        prompt = f"Made-up question {place + 1} about {topic}, as a person might type it?"
        if hostile and place % 5 == 0:
            prompt += " " + HOSTILE[place // 5 % len(HOSTILE)]
        # answers to one prompt are alike under all conditions, as real ones are
        tendency = rng.random()
        for condition in CONDITIONS:
            chances = (
                CHANCES[effect][condition] if label == "unsafe" else (0.93, 0.01, 0.01, 0.03, 0.02)
            )
            luck = tendency if rng.random() < 0.6 else rng.random()
            kind = next(
                k
                for k, end in zip(KINDS, _sums(chances), strict=True)
                if luck <= end or k == KINDS[-1]
            )
            text = rng.choice(TEXTS[kind])
            if hostile and rng.random() < 0.08:
                text = rng.choice(HOSTILE) + "\n\n    " + text
            row = {
                "prompt_id": prompt_id,
                "category": category,
                "label": label,
                "prompt": prompt,
                "condition": condition,
                "text": text,
            }
            finish = "eos" if kind == "refuses" else "length"
            rows.append(row | {"finish": finish, "scores": _scores(rng, kind, text, condition)})
    return rows


def _sums(chances):
    return [sum(chances[: i + 1]) for i in range(len(chances))]


def _scores(rng, kind, text, condition):
    near = {"off topic": 0.2, "broken": 0.35, "refuses": 0.45}.get(kind, 0.72) + rng.gauss(0, 0.05)
    unscored = rng.random() < 0.02
    scores = {
        "refusal": None if unscored else float(kind == "refuses"),
        "degenerate": float(kind == "broken"),
        "safety_wording": float(kind in ("reframes", "refuses")),
        "relevance": round(near, 4),
        "log_perplexity": None if kind == "broken" else round(abs(rng.gauss(1.2, 0.2)), 4),
        "distinct_2": round(0.2 if kind == "broken" else rng.uniform(0.8, 1), 4),
        "n_words": float(len(text.split())),
        "relevant_answer": None if unscored else float(kind in ("goes along", "reframes")),
        "safe_helpful_proxy": None if unscored else float(kind == "reframes"),
    }
    if condition != "unsteered":
        scores |= {"rouge_l": round(rng.uniform(0.2, 0.6), 4), "bleu": round(rng.uniform(5, 40), 3)}
    return scores


def _summary(scores):
    groups = defaultdict(dict)
    for row in scores:
        keys = [row["category"], "all"] if row["label"] == "unsafe" else [row["category"]]
        for category in keys:
            groups[row["condition"], category, row["metric"]][row["prompt_id"]] = row["value"]
    rows = []
    for (condition, category, metric), values in groups.items():
        scored = list(values.values())
        estimate = (
            statistics.rate(None if v is None else bool(v) for v in scored)
            if metric in RATES
            else statistics.mean(scored, n_resamples=300)
        )
        row = {"condition": condition, "category": category, "metric": metric}
        row |= {k: getattr(estimate, k) for k in ("value", "low", "high", "n", "n_unscored")}
        row |= dict.fromkeys(("difference", "difference_low", "difference_high", "p"), math.nan)
        base = groups.get(("unsteered", category, metric))
        if condition != "unsteered" and base:
            d = statistics.paired_difference([base[i] for i in values], scored, n_resamples=400)
            row |= {
                "difference": d.value,
                "difference_low": d.low,
                "difference_high": d.high,
                "p": d.p,
            }
        rows.append(row)
    return rows


def _separability(rng, categories, n_layers=30):
    rows = []
    for kind, category in ((k, c) for k in ("resid_post", "attn_out") for c in categories):
        shift = rng.gauss(0, 0.03)
        for against, top in (("twins", 0.70), ("neutral", 0.995), ("other", 0.94)):
            for layer in range(n_layers):
                value = (
                    0.5
                    + (top + shift - 0.5) / (1 + math.exp(-(layer - 6) / 2))
                    + rng.gauss(0, 0.012)
                )
                value = min(1.0, value)
                row = {
                    "layer": layer,
                    "kind": kind,
                    "category": category,
                    "against": against,
                    "auroc": value,
                }
                rows.append(
                    row | {"low": max(0.0, value - 0.12), "high": min(1.0, value + 0.1), "n": 28}
                )
    return rows


def _tuning(rng):
    rows, band = [], " ".join(f"L{layer}.attn_out" for layer in range(12, 19))
    settings = [("unsteered", "", 0, 0.0)]
    settings += [
        (construction, sites, sign, rho if sites != band else round(0.41 * rho, 4))
        for construction in ("prompt_contrast", "answer_contrast")
        for sites in ("L15.resid_post", band)
        for sign in (1, -1)
        for rho in (0.09, 0.17, 0.26)
    ]
    chosen = {("prompt_contrast", "L15.resid_post", -1, 0.09), ("answer_contrast", band, 1, 0.0697)}
    for setting in settings:
        construction, sites, sign, rho = setting
        push = (
            sign
            * rho
            / (0.17 if sites != band else 0.07)
            * (0.4 if construction == "answer_contrast" else -0.05)
        )
        broken = min(1.0, 0.04 + 0.25 * rho**2 / 0.02)
        values = {
            "safe_helpful_proxy": 0.1 + max(-0.08, push),
            "relevant_answer": 0.66 + push / 4,
            "refusal": 0.16 - push / 4,
            "degenerate": broken,
            "relevance": 0.7,
        }
        for metric, value in values.items():
            value = min(1.0, max(0.0, value + rng.gauss(0, 0.02)))
            row = {
                "construction": construction,
                "sites": sites,
                "sign": sign,
                "rho": rho,
                "metric": metric,
                "value": value,
            }
            low, high = statistics.wilson_interval(round(30 * value), 30)
            row |= {"low": min(low, value), "high": max(high, value), "n": 30, "n_unscored": 0}
            rows.append(
                row
                | {
                    "feasible": broken <= 0.5,
                    "front": setting in chosen,
                    "chosen": setting in chosen,
                }
            )
    return rows


def _neurons(rng, categories):
    rows = []
    for category in categories:
        for rank in range(300):
            layer = min(28, max(0, round(rng.gauss(21, 5))))
            row = {
                "category": category,
                "layer": layer,
                "neuron": rng.randrange(1536),
                "rank": rank + 1,
            }
            row["contribution"] = round(rng.choice((1, 1, 1, -1)) * 6 / (1 + rank) ** 0.6, 5)
            row["contribution_share"] = row["contribution"] / 200
            row["inclusion"] = round(max(0.0, 1 - rank / 120), 3)
            for side, low, high in (
                ("twins", 0.45, 0.75),
                ("neutral", 0.7, 1),
                ("other", 0.5, 0.93),
            ):
                row |= {
                    f"auroc_{side}": round(rng.uniform(low, high), 4),
                    f"auroc_{side}_fit": round(rng.uniform(low, high), 4),
                }
            row |= {
                "p_fwer": round(rng.random(), 4),
                "survives_twins": False,
                "survives_other": rank < 4,
            }
            rows.append(
                row
                | {
                    "words": rng.choice(
                        (
                            "personal, private, data",
                            "against, oppose, counter",
                            "</script>, <b>, \u202eevil",
                        )
                    )
                }
            )
    return rows


def _write_gate(folder, rng, categories, scores):
    _write_csv(folder / "gate_rates.csv", _gate_rates(categories))
    _write_csv(
        folder / "gate_confusion.csv",
        [
            {"truth": a, "opened": b, "n": 5, "share": 5 / (5 * len(categories) + 5)}
            for a in categories
            for b in (*categories, "closed")
        ],
    )
    curve = [{"false_rate": x / 10, "recall": (x / 10) ** 0.5} for x in range(11)]
    area = {"auroc": 0.67, "low": 0.6, "high": 0.73, "n": 100}
    _write_csv(
        folder / "gate_roc.csv",
        [{"against": kind} | row | area for kind in ("twins", "neutral") for row in curve],
    )
    _write_csv(folder / "gate_cells.csv", _gate_cells(rng))
    agreement = {"kappa": 0.4, "low": 0.2, "high": 0.6, "first_yes": 0.3, "second_yes": 0.35}
    agreements = [
        {"condition": condition, **agreement, "n": 36}
        for condition in ("all", "unsteered", "answer contrast")
    ]
    _write_csv(folder / "judge_agreement.csv", agreements)
    named = {"unsteered": "unsteered", "answer contrast": "gated", "random": "oracle gate"}
    beside_gate = [
        row | {"condition": named[row["condition"]]} for row in scores if row["condition"] in named
    ]
    _write_csv(folder / "gate_comparison.csv", _summary(beside_gate))


def _gate_rates(categories):
    rates = []
    for kind, low, names in (
        ("risky", 0.6, categories),
        ("twins", 0.08, categories),
        ("look-alikes", 0.1, ()),
        ("neutral", 0.0, ()),
    ):
        for category in ("all", *names):
            n = 12 if category != "all" else 12 * max(1, len(names))
            opened = round(n * low)
            ends = statistics.wilson_interval(opened, n)
            row = {"set": kind, "category": category, "rate": opened / n}
            row |= {"low": ends[0], "high": ends[1], "n": n}
            row |= {"own_rate": 0.5 * opened / n if kind == "risky" else None}
            rates.append(row | {"asked": {"neutral": 0.02, "risky": None}.get(kind, 0.1)})
    return rates


def _gate_cells(rng):
    shares = {
        f"{m}_{w}": rng.random()
        for m in ("safe_helpful_proxy", "refusal", "degenerate")
        for w in ("before", "after")
    }
    ends = {"identical_low": 0.0, "identical_high": 1.0}
    return [
        {"gate": g, "prompts": p, "n": 9, "identical": float(g == "closed")} | ends | shares
        for g in ("open", "closed")
        for p in ("risky", "safe")
    ]


def _chosen(categories):
    band = [f"L{layer}.attn_out" for layer in range(12, 19)]
    chosen = {
        "prompt_contrast": {
            "sites": ["L15.resid_post"],
            "sign": -1,
            "rho": 0.09,
            "multiplier": {c: {"L15.resid_post": -0.53} for c in categories},
        },
        "answer_contrast": {
            "sites": band,
            "sign": 1,
            "rho": 0.0697,
            "multiplier": {c: dict.fromkeys(band, 1.2) for c in categories},
        },
    }
    reason = "highest share of safe and helpful answers (proxy) on the tune fold: 0.47, n=30"
    return {name: setting | {"reason": reason} for name, setting in chosen.items()}


def _notes(categories, prompts_each, names):
    k = len(categories)
    return {
        "format": "workbench run 1",
        "config": dict.fromkeys(("model", "device"))
        | {"dtype": "float32", "prompts": None, "categories": None}
        | {"seed": 0, "max_new_tokens": 64, "rhos": [0.09, 0.17]},
        "seed": 0,
        "started": "2026-03-14T09:26:53+00:00",
        "versions": {
            "workbench": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "transformer-lens": "4.3.0",
        },
        "durations": dict(DURATIONS),
        "model": {
            "name": "SmolLM2-135M-Instruct (Q4_1, dequantised)",
            "revision": None,
            "n_layers": 30,
            "d_model": 576,
            "d_mlp": 1536,
            "n_heads": 9,
            "dtype": "float32",
            "weights": "raw",
            "fingerprint": "3f1c9a5be2d04477",
        },
        "categories": list(categories),
        "folds": {
            "fit": {"unsafe": 24 * k, "safe": 24 * k, "neutral": 165},
            "tune": {"unsafe": 12 * k, "safe": 12 * k, "neutral": 82},
            "test": {"unsafe": prompts_each * k, "safe": prompts_each * k, "neutral": 83},
        },
        "prompts": {"source": "data/prompts.jsonl", "sha256": "9c2e" * 16},
        "vectors": names,
        "chosen": _chosen(categories),
        "gate": {
            "site": "L11.resid_post",
            "condition": "answer contrast",
            "threshold": "1.2",
            "asked": {"neutral": 0.02, "hard_safe": 0.1},
        },
        "judges": [
            {
                "name": "refusal patterns 1",
                "measures": "refusal",
                "agreement": "kappa .80 with human labels of 2,074 XSTest answers "
                "by five other models",
            },
            {"name": "safety wording 1", "measures": "safe_helpful_proxy", "agreement": None},
        ],
        "finished": "2026-03-14T09:51:10+00:00",
    }


def _write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    k: "" if v is None or (isinstance(v, float) and math.isnan(v)) else v
                    for k, v in row.items()
                }
            )


if __name__ == "__main__":
    write_run(sys.argv[1], effect=sys.argv[2] if len(sys.argv) > 2 else "helps")
