"""Tables of neurons and heads: planted truth is found, and shuffled labels find nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from helpers.tiny_models import (
    PLANTED_HEAD,
    PLANTED_NEURON,
    planted_model,
    planted_prompts,
    sentences,
)
from scipy.stats import mannwhitneyu, wilcoxon

from workbench.models.activations import ActivationSet, cache_activations
from workbench.models.load import load_model
from workbench.models.sites import Site, sites_of_kind
from workbench.neurons.attribution import writing_sites
from workbench.neurons.ranking import (
    NEURON_COLUMNS,
    _mann_whitney,
    _signed_rank_p,
    attribute_heads,
    attribute_neurons,
)
from workbench.neurons.summaries import (
    notable_neurons,
    overlap,
    overlap_against_chance,
    shared_neurons,
    stability,
    survivors,
)
from workbench.prompts.prompt import Prompt
from workbench.stats.estimates import benjamini_hochberg
from workbench.stats.selectivity import auroc, hedges_g

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SITE = Site(3, "resid_post")
QUICK = {"n_permutations": 50, "n_resamples": 20}
Fold = dict[Site, ActivationSet]
COLUMNS = [
    *("category", "layer", "neuron", "rank", "contribution", "contribution_share"),
    *("contribution_half_1", "contribution_half_2", "inclusion"),
    *("mean_unsafe", "mean_reference", "hedges_g", "p_fwer"),
    *("auroc_twins", "auroc_neutral", "auroc_other", "q_twins", "q_neutral", "q_other"),
    *("auroc_twins_fit", "auroc_neutral_fit", "auroc_other_fit"),
    *("q_twins_fit", "q_neutral_fit", "q_other_fit"),
    *("survives_twins", "survives_neutral", "survives_other", "survives_fwer"),
]


def fold_of(model: Any, prompts: Sequence[Prompt], site: Site = SITE) -> Fold:
    return cache_activations(
        model, prompts, [site, *writing_sites(model, site), *sites_of_kind(model, "mlp_post")]
    )


def relabelled(fold: Fold, prompts: Sequence[Prompt]) -> Fold:
    """The same activations under other labels."""
    return {site: replace(cached, prompts=tuple(prompts)) for site, cached in fold.items()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Fold, Fold]:
    """The planted model and two disjoint folds of its prompts."""
    model = load_model(planted_model(tmp_path_factory.mktemp("planted")), device="cpu")
    return model, fold_of(model, planted_prompts(16)), fold_of(model, planted_prompts(16, start=16))


@pytest.fixture(scope="module")
def table(planted: tuple[Any, Fold, Fold]) -> pd.DataFrame:
    return attribute_neurons(*planted, site=SITE, top=10)


def planted_row(table: pd.DataFrame, category: str = "planted") -> pd.Series:
    layer, neuron = PLANTED_NEURON
    return table[
        (table["category"] == category) & (table["layer"] == layer) & (table["neuron"] == neuron)
    ].iloc[0]


# --- planted truth


def test_the_planted_neuron_ranks_first(table: pd.DataFrame) -> None:
    row = planted_row(table)
    assert row["rank"] == 1
    assert (
        row["contribution"]
        > 5 * table[(table["category"] == "planted") & (table["rank"] == 2)]["contribution"].item()
    )
    assert row["inclusion"] == 1
    assert row["auroc_twins"] == row["auroc_neutral"] == row["auroc_other"] == 1
    assert row["p_fwer"] <= 0.05
    assert row[["survives_twins", "survives_neutral", "survives_other", "survives_fwer"]].all()


def test_the_planted_neuron_is_no_neuron_of_the_other_category(table: pd.DataFrame) -> None:
    row = planted_row(table, "decoy")
    assert abs(row["contribution"]) < 0.01 * planted_row(table)["contribution"]
    assert row["auroc_other"] == 0


def test_the_planted_head_ranks_first(planted: tuple[Any, Fold, Fold]) -> None:
    heads = attribute_heads(*planted, site=SITE, top=3)
    first = heads[(heads["category"] == "planted") & (heads["rank"] == 1)].iloc[0]
    assert (first["layer"], first["head"]) == PLANTED_HEAD
    assert first["inclusion"] == 1
    assert first["auroc_twins"] == first["auroc_neutral"] == first["auroc_other"] == 1
    assert first["q_twins"] <= 0.05
    assert first["mean_unsafe"] - first["mean_reference"] == pytest.approx(
        first["contribution"], rel=1e-4
    )


# --- shuffled labels


def test_shuffled_labels_find_nothing(family_model: Any) -> None:
    model = family_model("llama3")
    texts = [
        Prompt(str(i), text, None, "x", "neutral", "test") for i, text in enumerate(sentences(200))
    ]
    fit, held_out = (
        fold_of(model, texts[:100], Site(0, "resid_post")),
        fold_of(model, texts[100:], Site(0, "resid_post")),
    )
    roles = [("a", "unsafe"), ("a", "safe"), ("b", "unsafe"), ("b", "safe")]
    n_found = dict.fromkeys(("q_twins", "q_neutral", "q_other", "p_fwer", "survives"), 0)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        folds = []
        for fold in (fit, held_out):
            prompts = list(fold[Site(0, "resid_post")].prompts)
            for place, i in enumerate(rng.permutation(len(prompts))):
                if place < 80:  # twenty pairs of each of two categories; the rest stays neutral
                    category, label = roles[place % 4]
                    pair = f"{category}-{place // 4}"
                    prompts[i] = replace(prompts[i], category=category, label=label, pair_id=pair)
            folds.append(relabelled(fold, prompts))
        table = attribute_neurons(
            model,
            *folds,
            site=Site(0, "resid_post"),
            categories=["a"],
            n_permutations=39,
            n_resamples=1,
            seed=seed,
        )
        for name in ("q_twins", "q_neutral", "q_other", "p_fwer"):
            n_found[name] += bool((table[name] <= 0.05).any())
        n_found["survives"] += bool(
            table[["survives_twins", "survives_neutral", "survives_other"]].any(axis=None)
        )
    assert max(n_found[name] for name in ("q_twins", "q_neutral", "q_other", "survives")) <= 10, (
        n_found
    )
    # exact, so 5 % are expected: 17 of 200 is its 98th percentile
    assert n_found["p_fwer"] <= 17, n_found


# --- the table


def test_the_table_has_its_columns(table: pd.DataFrame) -> None:
    assert sorted(table.columns) == sorted(COLUMNS) == sorted(NEURON_COLUMNS)
    assert len(table) == 2 * 4 * 64
    assert not table.isna().any(axis=None)
    for _, rows in table.groupby("category"):
        assert sorted(rows["rank"]) == list(range(1, 257))
        assert rows.sort_values("rank")["contribution"].is_monotonic_decreasing


@pytest.mark.parametrize("family", ["llama3", "pythia", "gemma2"])
def test_neurons_heads_and_embedding_add_up(family_model: Any, family: str) -> None:
    model = family_model(family)
    fit, held_out = fold_of(model, planted_prompts(5)), fold_of(model, planted_prompts(5, start=5))
    neurons = attribute_neurons(model, fit, held_out, site=SITE, **QUICK)
    heads = attribute_heads(model, fit, held_out, site=SITE, n_resamples=20)
    for category, parts in neurons.attrs["parts"].items():
        of_category = [t[t["category"] == category] for t in (neurons, heads)]
        total = sum(rows["contribution"].sum() for rows in of_category) + parts["embedding"]
        assert total == pytest.approx(parts["total"], abs=1e-5 * parts["absolute"])
        shares = (
            sum(rows["contribution_share"].abs().sum() for rows in of_category)
            + abs(parts["embedding"]) / parts["absolute"]
        )
        assert shares == pytest.approx(1)


def test_neurons_above_the_site_contribute_nothing(planted: tuple[Any, Fold, Fold]) -> None:
    model = planted[0]
    folds = [
        fold_of(model, planted_prompts(4, start=start), Site(1, "resid_post")) for start in (0, 4)
    ]
    table = attribute_neurons(
        model, *folds, site=Site(1, "resid_post"), categories=["planted"], **QUICK
    )
    above = table["layer"] > 1
    assert (table.loc[above, ["contribution", "contribution_half_1", "inclusion"]] == 0).all(
        axis=None
    )
    assert (table.loc[~above, "contribution"] != 0).all()
    assert table.loc[above, "auroc_twins"].nunique() > 5


def test_the_direction_is_of_the_fit_fold_and_the_rest_of_the_other(
    planted: tuple[Any, Fold, Fold],
) -> None:
    model, fit, held_out = planted
    flipped = {"unsafe": "safe", "safe": "unsafe", "neutral": "neutral"}
    turned = relabelled(fit, [replace(p, label=flipped[p.label]) for p in fit[SITE].prompts])
    plain = attribute_neurons(model, fit, held_out, site=SITE, categories=["planted"], **QUICK)
    other = attribute_neurons(model, turned, held_out, site=SITE, categories=["planted"], **QUICK)
    np.testing.assert_allclose(other["contribution"], -plain["contribution"], rtol=1e-6)
    for name in ("mean_unsafe", "hedges_g", "auroc_twins", "q_other"):
        np.testing.assert_array_equal(other[name], plain[name])
    np.testing.assert_allclose(other["auroc_twins_fit"], 1 - plain["auroc_twins_fit"])
    assert not planted_row(other)[
        "survives_twins"
    ]  # selected on one side, confirmed on the other: not confirmed


def test_tests_are_those_of_scipy(planted: tuple[Any, Fold, Fold], table: pd.DataFrame) -> None:
    _, _, held_out = planted
    prompts = held_out[SITE].prompts
    x = np.concatenate(
        [held_out[Site(layer, "mlp_post")].values.numpy() for layer in range(4)], axis=1
    ).astype(float)
    rows = {
        "unsafe": [
            i for i, p in enumerate(prompts) if p.category == "decoy" and p.label == "unsafe"
        ],
        "twins": [i for i, p in enumerate(prompts) if p.category == "decoy" and p.label == "safe"],
        "neutral": [i for i, p in enumerate(prompts) if p.label == "neutral"],
        "other": [
            i for i, p in enumerate(prompts) if p.category == "planted" and p.label == "unsafe"
        ],
    }
    decoys = table[table["category"] == "decoy"]
    for against in ("twins", "neutral", "other"):
        both = np.concatenate([x[rows["unsafe"]], x[rows[against]]])
        labels = np.arange(len(both)) < len(rows["unsafe"])
        np.testing.assert_allclose(decoys[f"auroc_{against}"], auroc(both, labels), atol=1e-12)
        if against == "twins":
            p = wilcoxon(x[rows["unsafe"]] - x[rows["twins"]], axis=0, method="exact").pvalue
            np.testing.assert_allclose(decoys["hedges_g"], hedges_g(both, labels), rtol=1e-5)
        else:
            p = mannwhitneyu(
                x[rows["unsafe"]], x[rows[against]], axis=0, method="asymptotic"
            ).pvalue
        np.testing.assert_allclose(decoys[f"q_{against}"], benjamini_hochberg(p), rtol=1e-3)
    np.testing.assert_allclose(decoys["mean_unsafe"], x[rows["unsafe"]].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(decoys["mean_reference"], x[rows["twins"]].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("n", [2, 9, 24, 50, 60])
def test_the_test_of_pairs_is_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    differences = rng.standard_normal((n, 40)) + rng.normal(size=40)
    method = "exact" if n <= 50 else "asymptotic"
    np.testing.assert_allclose(
        _signed_rank_p(differences), wilcoxon(differences, axis=0, method=method).pvalue, rtol=1e-9
    )
    rounded = np.round(differences)  # ties and zeros: the approximation
    rounded[0], rounded[1] = 0, 1
    np.testing.assert_allclose(
        _signed_rank_p(rounded), wilcoxon(rounded, axis=0, method="asymptotic").pvalue, rtol=1e-9
    )
    assert (_signed_rank_p(np.zeros((n, 3))) == 1).all()


@pytest.mark.parametrize("n", [12, 30, 64])
def test_ties_in_some_columns_change_the_test_of_these_alone(n: int) -> None:
    rng = np.random.default_rng(n)
    differences = rng.standard_normal((n, 40)) + rng.normal(size=40)
    differences[:, ::3] = np.round(differences[:, ::3])
    p = _signed_rank_p(differences)
    for column in range(40):
        method = "asymptotic" if n > 50 or column % 3 == 0 else "exact"
        expected = wilcoxon(differences[:, column], method=method).pvalue
        assert p[column] == pytest.approx(expected, abs=1e-10)


def test_the_test_of_groups_is_scipys_and_too_careful_where_there_are_ties() -> None:
    rng = np.random.default_rng(0)
    unsafe, others = rng.standard_normal((14, 60)) + rng.normal(size=60), rng.normal(size=(25, 60))
    for digits, has_ties in ((None, False), (0, True)):
        a, b = (x if digits is None else np.round(x, digits) for x in (unsafe, others))
        wins = (a[:, None] > b).sum(axis=(0, 1)) + (a[:, None] == b).sum(axis=(0, 1)) / 2
        area, p = _mann_whitney(wins[None], np.array([[14]]), 25)
        theirs = mannwhitneyu(a, b, axis=0, method="asymptotic")
        np.testing.assert_allclose(area[0] * 14 * 25, theirs.statistic, atol=1e-10)
        if has_ties:
            assert (p[0] >= theirs.pvalue - 1e-12).all()
            assert (p[0] > theirs.pvalue + 1e-6).any()
        else:
            np.testing.assert_allclose(p[0], theirs.pvalue, atol=1e-10)


def test_a_dead_neuron_tells_nothing_apart(planted: tuple[Any, Fold, Fold]) -> None:
    model = planted[0]
    site, dead = (
        Site(2, "resid_post"),
        Site(3, "mlp_post"),
    )  # above the site, so that the parts still add up
    cached = [fold_of(model, planted_prompts(4, start=start), site) for start in (0, 4)]
    for fold in cached:
        values = fold[dead].values.clone()
        values[:, :5] = 0
        fold[dead] = replace(fold[dead], values=values)
    table = attribute_neurons(model, *cached, site=site, categories=["planted"], **QUICK)
    dead_rows = table[(table["layer"] == 3) & (table["neuron"] < 5)]
    for against in ("twins", "neutral", "other"):
        assert (dead_rows[f"auroc_{against}"] == 0.5).all()
        assert (dead_rows[f"q_{against}"] == 1).all()
    assert (dead_rows["p_fwer"] == 1).all()
    assert (dead_rows["hedges_g"] == 0).all()


def test_the_same_seed_gives_the_same_table(planted: tuple[Any, Fold, Fold]) -> None:
    first, again, other = (
        attribute_neurons(*planted, site=SITE, categories=["planted"], seed=seed, **QUICK)
        for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(first, again)
    assert not np.array_equal(first["contribution_half_1"], other["contribution_half_1"])
    np.testing.assert_array_equal(first["contribution"], other["contribution"])


def test_neutral_prompts_can_be_the_reference(planted: tuple[Any, Fold, Fold]) -> None:
    table = attribute_neurons(
        *planted, site=SITE, reference="neutral", categories=["planted"], **QUICK
    )
    assert planted_row(table)["rank"] == 1
    assert table.attrs["reference"] == "neutral"
    row = planted_row(table)
    assert row["p_fwer"] <= 0.05


def test_what_a_fold_does_not_hold_is_nan(planted: tuple[Any, Fold, Fold]) -> None:
    model, *folds = planted
    short = [
        {
            site: cached.of([p for p in cached.prompts if p.category == "planted"])
            for site, cached in fold.items()
        }
        for fold in folds
    ]
    table = attribute_neurons(model, *short, site=SITE, **QUICK)
    assert table[["auroc_neutral", "q_neutral", "auroc_other", "q_other"]].isna().all(axis=None)
    assert not table[["survives_neutral", "survives_other"]].any(axis=None)
    assert planted_row(table)["survives_twins"]
    assert survivors(table).set_index("test").loc["neutral", "n_survived"] == 0


# --- errors


def test_folds_that_do_not_fit_are_refused(
    planted: tuple[Any, Fold, Fold], family_model: Any
) -> None:
    model, fit, held_out = planted

    def error(
        match: str, of: Any = model, first: Fold = fit, second: Fold = held_out, **options: Any
    ) -> None:
        with pytest.raises(ValueError, match=match):
            attribute_neurons(of, first, second, **{"site": SITE, **QUICK, **options})

    same_text = [replace(p, id=f"{p.id}-again") for p in fit[SITE].prompts]
    error("the folds overlap: prompt 'planted-0-unsafe'", second=fit)
    error("the folds overlap", second=relabelled(fit, same_text))
    error("not of this model", of=family_model("llama3"))
    error(
        r"no unsafe prompts of category 'plantd' in both folds; .* Did you mean 'planted'\?",
        categories=["plantd"],
    )
    error("no category", categories=[])
    error("unknown reference 'safe'; allowed: twins, neutral", reference="safe")
    error(r"measure it in the residual stream", site=Site(2, "attn_out"))
    error(r"no activations at L2\.resid_post in the fit fold", site=Site(2, "resid_post"))
    error(
        r"no activations at L1\.z",
        second={site: cached for site, cached in held_out.items() if site != Site(1, "z")},
    )
    error(
        r"no activations at L1\.mlp_post in the fit fold",
        first={s: cached for s, cached in fit.items() if s != Site(1, "mlp_post")},
    )
    error(
        "another span",
        second=relabelled(
            {s: replace(a, span="last") for s, a in held_out.items()}, held_out[SITE].prompts
        ),
    )
    error(
        "other prompts",
        second={**held_out, Site(1, "z"): held_out[Site(1, "z")].select(category="planted")},
    )
    alone = [replace(p, pair_id=None) for p in held_out[SITE].prompts]
    error("0 unsafe prompts and 0 twins in the held-out fold", second=relabelled(held_out, alone))
    error("top and n_resamples must be at least 1", top=0)


def test_no_head_writes_to_what_enters_the_first_block(planted: tuple[Any, Fold, Fold]) -> None:
    with pytest.raises(ValueError, match=r"no head writes to L0\.resid_pre"):
        attribute_heads(*planted, site=Site(0, "resid_pre"))


# --- what the table says as a whole


def made_up(orders: dict[str, tuple[Sequence[int], Sequence[int]]]) -> pd.DataFrame:
    """A table whose halves rank the neurons in given orders; all of it follows the first half."""
    rows = []
    for category, (first, second) in orders.items():
        for neuron in range(len(first)):
            halves = [len(order) - list(order).index(neuron) for order in (first, second)]
            rank = list(first).index(neuron) + 1
            rows.append(
                (
                    category,
                    0,
                    neuron,
                    rank,
                    float(halves[0]),
                    float(halves[0]),
                    float(halves[1]),
                    1.0 if rank <= 2 else 0.0,
                )
            )
    names = [
        "category",
        "layer",
        "neuron",
        "rank",
        "contribution",
        "contribution_half_1",
        "contribution_half_2",
        "inclusion",
    ]
    return pd.DataFrame(rows, columns=names)


UP, DOWN = list(range(10)), list(range(10))[::-1]


def test_halves_that_agree_are_stable() -> None:
    rows = stability(made_up({"same": (UP, UP), "turned": (UP, DOWN)}), k=2).set_index("category")
    assert rows.loc["same"].to_dict() == {
        "split_half_correlation": pytest.approx(1),
        "split_half_overlap": 1,
        "chance_overlap": 0.2,
        "inclusion": 1,
        "n_always": 2,
    }
    assert rows.loc["turned", "split_half_correlation"] == pytest.approx(-1)
    assert rows.loc["turned", "split_half_overlap"] == 0


def test_overlap_has_its_ceiling_on_the_diagonal() -> None:
    shares = overlap(made_up({"a": (UP, UP), "b": (UP, DOWN), "c": (DOWN, DOWN)}), k=3)
    assert shares.loc["a", "a"] == 1
    assert shares.loc["b", "b"] == 0
    assert shares.loc["a", "b"] == shares.loc["b", "a"] == 0.5  # one of b's halves ranks as a does
    assert shares.loc["a", "c"] == 0


def rankings(*contributions: np.ndarray) -> pd.DataFrame:
    """Rankings of 1000 neurons of two layers by their contributions."""
    layer, neuron = np.divmod(np.arange(1000), 500)
    columns = {"layer": layer, "neuron": neuron, "inclusion": 0.0, "rank": 1}
    halves = ("contribution", "contribution_half_1", "contribution_half_2")
    return pd.concat(
        pd.DataFrame(columns | dict.fromkeys(halves, values)).assign(category=str(i))
        for i, values in enumerate(contributions)
    )


def test_rankings_that_share_neurons_by_chance_alone_lie_inside_the_interval() -> None:
    rng = np.random.default_rng(0)
    table = rankings(*(rng.normal(size=1000) for _ in range(12)))
    shared = overlap_against_chance(table, k=100)
    assert len(shared) == 66
    assert set(shared["chance"]) == {10.0}
    inside = shared["n_shared"].between(shared["chance_low"], shared["chance_high"])
    assert inside.mean() > 0.85
    assert shared["p"].between(0.01, 1).mean() > 0.9


def test_rankings_of_one_direction_share_their_top_and_loud_neurons_both_ends() -> None:
    rng = np.random.default_rng(1)
    common, loud = rng.normal(size=1000), rng.lognormal(sigma=2, size=1000)
    alike = rankings(common + rng.normal(size=1000) / 2, common + rng.normal(size=1000) / 2)
    [row] = overlap_against_chance(alike, k=50).to_dict("records")
    assert row["n_shared"] > row["chance_high"]
    assert row["p"] < 1e-6
    assert row["n_opposite"] <= row["chance_high"]
    signs = rng.choice([-1, 1], size=(2, 1000))
    [row] = overlap_against_chance(rankings(*(signs * loud)), k=50).to_dict("records")
    assert row["n_shared"] > row["chance_high"]  # more than chance, but as many at opposite ends
    assert row["n_opposite"] == pytest.approx(row["n_shared"], rel=0.6)


def test_units_above_the_site_do_not_count_as_chances_to_differ() -> None:
    order = np.concatenate([np.arange(1.0, 501), np.zeros(500)])
    [row] = overlap_against_chance(rankings(order, order), k=50).to_dict("records")
    assert (row["n_units"], row["n_shared"], row["n_opposite"]) == (500, 50, 0)
    assert row["chance"] == pytest.approx(5)


def test_common_neurons_come_before_those_of_one_category() -> None:
    shared = shared_neurons(
        made_up({"a": ([3, 1, 0, 2], UP[:4]), "b": ([3, 2, 0, 1], UP[:4])}), k=2
    )
    assert list(shared["neuron"]) == [3, 1, 2]
    assert list(shared["n_categories"]) == [2, 1, 1]
    assert shared.loc[0, "categories"] == ("a", "b")


def test_survivors_are_counted_by_test(table: pd.DataFrame) -> None:
    counts = survivors(table).set_index(["category", "test"])
    assert set(counts.index.get_level_values("test")) == {
        "twins",
        "neutral",
        "other",
        "fwer",
        "all",
    }
    for (category, test), row in counts.iterrows():
        assert row["n_neurons"] == 256
        assert row["n_survived"] <= row["n_selected"]
        if test in ("twins", "neutral", "other"):
            assert (
                row["n_survived"] == table[table["category"] == category][f"survives_{test}"].sum()
            )
    assert counts.loc[("planted", "all"), "n_survived"] >= 1


def test_notable_rows_are_both_ends_and_the_survivors(table: pd.DataFrame) -> None:
    notable = notable_neurons(table, 3)
    assert len(notable) < len(table)
    for category, rows in notable.groupby("category"):
        assert {1, 2, 3, 254, 255, 256} <= set(rows["rank"])
        assert (
            rows["survives_fwer"].sum()
            == table[table["category"] == category]["survives_fwer"].sum()
        )
    assert len(notable_neurons(made_up({"a": (UP, UP), "b": (UP, DOWN)}), 2)) == 8


def test_a_table_read_back_from_a_file_says_the_same(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "neurons.csv", index=False)
    back = pd.read_csv(tmp_path / "neurons.csv")
    for summary in (stability, overlap, survivors, shared_neurons):
        pd.testing.assert_frame_equal(summary(back), summary(table))


def test_heads_are_summed_up_like_neurons(planted: tuple[Any, Fold, Fold]) -> None:
    heads = attribute_heads(*planted, site=SITE, n_resamples=20)
    assert stability(heads, 3).shape == (2, 6)
    assert overlap(heads, 3).shape == (2, 2)
    assert "head" in shared_neurons(heads, 3).columns


def test_another_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table of attribute_neurons"):
        stability(pd.DataFrame({"category": ["a"]}))
    with pytest.raises(ValueError, match="k must be at least 1"):
        overlap(made_up({"a": (UP, UP)}), k=0)
