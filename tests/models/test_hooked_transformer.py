"""A user's own HookedTransformer (TransformerLens 3.x) gives what the bridge gives, everywhere."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import gates, hooked_transformers
from helpers.activation_sets import PROMPTS
from helpers.encoders import WordEncoder
from helpers.hooked_transformers import hooked_transformer
from helpers.interventions import steering_vector
from helpers.runs import settings
from helpers.tiny_models import D_MLP, HEADS, LAYERS, planted_prompts, tiny_model

import workbench as wb
from workbench.evaluation.capability import Question, multiple_choice, text_perplexity
from workbench.generation.answers import Completion, LogProbs
from workbench.generation.likelihood import answer_kl, answer_log_probs, steered_log_probs
from workbench.models.activations import class_moments
from workbench.models.batches import pad
from workbench.models.forward import last_logits, plain
from workbench.models.load import load_model, model_info
from workbench.models.packaged import EMBEDDED, packaged_folder
from workbench.models.sites import KINDS, Site, sites_of_kind
from workbench.models.tokens import encode, pad_id
from workbench.neurons.attribution import writing_sites
from workbench.neurons.effects import neuron_effect, rank_curve
from workbench.neurons.patching import contrast_activations, patched_answers
from workbench.neurons.profiles import profile_neurons
from workbench.neurons.silencing import matching_statistics, neuron_reference
from workbench.neurons.splits import head_sources, split_mlp_gate
from workbench.prompts.prompt import load_prompts, select_prompts
from workbench.report.neuron_page import write_neuron_page
from workbench.safesteer.recipe import run
from workbench.safesteer.saved_run import gate_reading, side_by_side
from workbench.stats.selectivity import Threshold
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

if not hooked_transformers.exists():
    pytest.skip(hooked_transformers.REASON, allow_module_level=True)

FIT, HELD_OUT = planted_prompts(5), planted_prompts(4, start=20)
END, STEERED = Site(3, "resid_post"), Site(1, "resid_post")
UNSAFE, SAFE = (
    select_prompts(FIT, category="planted", label=label) for label in ("unsafe", "safe")
)
GREEDY = wb.Decoding(max_new_tokens=7)
FAMILIES = ("llama3", "gpt2", "pythia", "qwen2", "qwen3", "gemma2", "olmo2")


@pytest.fixture(scope="module")
def checkpoint(
    family_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Give the folder of a family's tiny checkpoint, as TransformerLens 3 can convert it."""

    @cache
    def path(family: str) -> Path:
        if family != "olmo2":
            return family_path(family)
        return tiny_model(family, tmp_path_factory.mktemp("own"), num_key_value_heads=HEADS)

    return path


@pytest.fixture(scope="module")
def own(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """Give the HookedTransformer of a family's tiny checkpoint, its weights as they are."""
    return cache(lambda family: hooked_transformer(checkpoint(family), d_mlp=D_MLP))


@pytest.fixture(scope="module")
def processed(family_path: Callable[[str], Path]) -> Callable[[str], Any]:
    """Give the same with layer norms folded and weights centred, as from_pretrained does."""
    return cache(
        lambda family: hooked_transformer(family_path(family), d_mlp=D_MLP, processed=True)
    )


def alike(found: Any, expected: Any, path: str = "", tolerance: float = 2e-4) -> None:
    """Compare results of any kind, number by number; names and fingerprints of models aside."""
    if dataclasses.is_dataclass(expected) and not isinstance(expected, wb.ModelInfo):
        for field in dataclasses.fields(expected):
            if isinstance(expected, LogProbs) and field.name == "of":
                continue  # the key of a model: the two lay out their weights in another way
            one, other = getattr(found, field.name), getattr(expected, field.name)
            alike(one, other, f"{path}.{field.name}", tolerance)
    elif isinstance(expected, torch.Tensor | np.ndarray | float):
        one, other = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
        torch.testing.assert_close(
            one,
            other,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text: f"{path}: {text}",
        )
    elif isinstance(expected, pd.DataFrame):
        alike(found.to_dict("list"), expected.to_dict("list"), path, tolerance)
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), path
        for key in expected:
            alike(found[key], expected[key], f"{path}[{key!r}]", tolerance)
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), path
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            alike(one, other, f"{path}[{place}]", tolerance)
    elif not isinstance(expected, wb.ModelInfo):
        assert found == expected, path


def writing(model: Any, prompts: Sequence[wb.Prompt]) -> dict[Site, wb.ActivationSet]:
    """Cache all that attribution at the last site reads."""
    return wb.cache_activations(model, prompts, [END, *writing_sites(model, END)])


def vectors(model: Any, site: Site = STEERED) -> dict[str, wb.SteeringVector]:
    """Fit a vector for each category."""
    acts = wb.cache_activations(model, FIT, site)[site]
    return wb.fit_steering_vectors(acts, safe_side="paired")


def steering(model: Any, **extent: Any) -> list[wb.Intervention]:
    """Push hard enough that answers change."""
    return [wb.add_vector(steering_vector(model, STEERED), rho=0.6, **extent)]


def answers(model: Any, **options: Any) -> list[Completion]:
    """Answer some prompts with steering, as rows of one batch."""
    return wb.generate(model, PROMPTS[:6], steering(model), GREEDY, **options)


def fixed_answers(model: Any) -> list[Completion]:
    """Put given answers of unlike length behind prompts."""
    texts = ("a recipe", "", "in two steps, for a friend", "x")
    return [
        Completion(prompt, text, wb.models.token_ids(model, text), "eos", "unsteered")
        for prompt, text in zip(PROMPTS, texts, strict=False)
    ]


def gate_of(model: Any, form: str = "hard") -> Any:
    """Make a gate that opens for some of the prompts only."""
    return dataclasses.replace(gates.half_open(model, gates.questions())[0], form=form)


def reference_of(model: Any) -> Any:
    acts = wb.cache_activations(model, FIT, sites_of_kind(model, "mlp_post"))
    return neuron_reference(acts, UNSAFE, SAFE)


def of_sides(function: Callable[..., Any], model: Any) -> Any:
    """Call what compares unsafe with safe prompts along a direction."""
    return function(model, UNSAFE, SAFE, torch.linspace(-1, 1, model.cfg.d_model))


def directions(model: Any) -> dict[str, dict[Site, torch.Tensor]]:
    """Measure a category's direction where weights read and where they write."""
    where = (END, Site(2, "resid_mid"), Site(0, "resid_mid"))
    return {"planted": {site: vectors(model, site)["planted"].vector for site in where}}


CASES: dict[str, Callable[[Any], Any]] = {
    "cache_activations": lambda m: wb.cache_activations(
        m, PROMPTS, [s for k in KINDS for s in sites_of_kind(m, k) if k != "resid_mid"]
    ),
    "activations of answers": lambda m: wb.cache_activations(m, PROMPTS, END, span="response"),
    "class_moments": lambda m: class_moments(m, PROMPTS, END, span="last"),
    "token_activations": lambda m: wb.token_activations(m, PROMPTS[0], STEERED),
    "fit_steering_vectors": vectors,
    "layer_separability": lambda m: wb.layer_separability(
        wb.cache_activations(m, FIT + HELD_OUT, sites_of_kind(m, "resid_post")), FIT, HELD_OUT
    ),
    "generate": lambda m: wb.generate(m, PROMPTS[:6], decoding=GREEDY),
    "generate, steered": answers,
    "generate, sampled": lambda m: wb.generate(
        m, PROMPTS[:4], decoding=wb.Decoding(max_new_tokens=7, temperature=1.0, top_p=0.9)
    ),
    "generate, going on": lambda m: answers(m, continue_response=True),
    "sweep": lambda m: wb.sweep(
        m,
        PROMPTS[:5],
        {
            "plain": (),
            "later": steering(m, positions="generated"),
            "neurons": wb.clamp_neurons([(1, 3), (2, 5)], [4.0, -4.0]),
            "ablated": wb.ablate_direction(steering_vector(m, STEERED)),
        },
        GREEDY,
    ),
    "side_by_side": lambda m: side_by_side(m, "a stolen card", steering(m), GREEDY),
    "a hard gate": lambda m: wb.generate(
        m, gates.questions(), gates.through(m, gate_of(m)), GREEDY
    ),
    "a stepwise gate": lambda m: wb.generate(
        m, gates.questions(), gates.through(m, gate_of(m, "stepwise")), GREEDY
    ),
    "fit_gate": lambda m: wb.fit_gate(
        *(wb.cache_activations(m, fold, STEERED)[STEERED] for fold in (FIT, HELD_OUT))
    ),
    "gate_reading": lambda m: gate_reading(m, gate_of(m), "a stolen card"),
    "answer_log_probs": lambda m: answer_log_probs(m, fixed_answers(m)),
    "steered_log_probs": lambda m: steered_log_probs(m, fixed_answers(m), [steering(m)] * 4),
    "answer_kl": lambda m: answer_kl(m, fixed_answers(m), {"steered": [steering(m)] * 4}),
    "multiple_choice": lambda m: multiple_choice(
        m, [Question("q", "What is it?", ("one", "two things"), 1)], {"steered": steering(m)}
    ),
    "text_perplexity": lambda m: text_perplexity(
        m, ["The garden is full of dogs.", "A card."], {"steered": steering(m)}
    ),
    "evaluate": lambda m: wb.evaluate(
        m, PROMPTS[:6], {"steered": steering(m)}, GREEDY, encoder=WordEncoder()
    ).summary(),
    "attribute_neurons": lambda m: wb.attribute_neurons(
        m, writing(m, FIT), writing(m, HELD_OUT), site=END, n_permutations=20, n_resamples=10
    ),
    "attribute_heads": lambda m: wb.attribute_heads(
        m, writing(m, FIT), writing(m, HELD_OUT), site=END, n_resamples=10
    ),
    "head_sources": lambda m: of_sides(head_sources, m),
    "neuron_effect": lambda m: neuron_effect(
        m,
        select_prompts(HELD_OUT, label="unsafe"),
        {"some": [(2, 17), (1, 3)]},
        reference_of(m),
        [vectors(m, END)["planted"]],
        neutral=select_prompts(HELD_OUT, label="neutral"),
        max_new_tokens=4,
    ),
    "rank_curve": lambda m: rank_curve(
        m,
        select_prompts(HELD_OUT, label="unsafe"),
        [(layer, neuron) for layer in range(LAYERS) for neuron in range(D_MLP)],
        reference_of(m),
        [vectors(m, END)["planted"]],
        n_slices=2,
        n_sets=2,
    ),
    "matching_statistics": lambda m: matching_statistics(
        m, reference_of(m), vectors(m, END)["planted"]
    ),
    "patched_answers": lambda m: patched_answers(
        m, PROMPTS[:4], {"some": [(2, n) for n in range(20)]}, steering(m), max_new_tokens=5
    ),
    "contrast_activations": lambda m: contrast_activations(m, answers(m), steering(m)),
    "profile_neurons": lambda m: profile_neurons(
        m,
        [(2, 17), (0, 3)],
        PROMPTS,
        site=END,
        directions=directions(m),
    ),
}


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_every_function_gives_what_it_gives_with_the_bridge(
    own: Any, family_model: Any, family: str, case: str
) -> None:
    # Where a neuron is among the random ones, rounding decides which of the two has the larger p.
    tolerance = 0.02 if case == "profile_neurons" else 2e-4
    alike(CASES[case](own(family)), CASES[case](family_model(family)), tolerance=tolerance)


def test_gated_mlps_are_split_as_in_the_bridge(own: Any, family_model: Any) -> None:
    found, expected = (of_sides(split_mlp_gate, m("llama3")) for m in (own, family_model))
    alike(found, expected)
    with pytest.raises(ValueError, match="not gated"):
        of_sides(split_mlp_gate, own("gpt2"))


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_norms_behind_sublayers_are_those_of_the_bridge(
    own: Any, checkpoint: Any, family: str
) -> None:
    bridge = load_model(checkpoint(family), device="cpu")
    cases = ["cache_activations", "generate, steered", "attribute_neurons", "attribute_heads"]
    for case in [*cases, "head_sources"]:
        alike(CASES[case](own(family)), CASES[case](bridge))
    alike(of_sides(split_mlp_gate, own(family)), of_sides(split_mlp_gate, bridge))
    alike(CASES["profile_neurons"](own(family)), CASES["profile_neurons"](bridge), tolerance=0.02)


@pytest.mark.parametrize("case", ["cache_activations", "generate, steered", "attribute_heads"])
def test_folded_and_centred_weights_run_and_say_so(
    processed: Any, own: Any, family_model: Any, case: str
) -> None:
    """Folding RMS norms leaves the residual stream of a Llama as it was."""
    alike(CASES[case](processed("llama3")), CASES[case](family_model("llama3")))
    for family in ("llama3", "gpt2"):
        assert model_info(processed(family)).weights == "compatibility"
        assert model_info(own(family)).weights == "raw"
    CASES[case](processed("gpt2"))


def test_centred_weights_alone_are_no_raw_ones(family_path: Any) -> None:
    model = hooked_transformer(family_path("gpt2"), d_mlp=D_MLP)
    for block in model.blocks:
        block.attn.W_O.data -= block.attn.W_O.data.mean(dim=-1, keepdim=True)
    assert model_info(model).weights == "compatibility"


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_equal_single_prompts(own: Any, family: str) -> None:
    model = own(family)
    batch, single = wb.Decoding(max_new_tokens=7), wb.Decoding(max_new_tokens=7, batch_size=1)
    for interventions in ((), steering(model), steering(model, positions="generated")):
        together, alone = (
            wb.generate(model, PROMPTS[:6], interventions, how) for how in (batch, single)
        )
        assert together == alone
        with plain(model):
            assert wb.generate(model, PROMPTS[:6], interventions, batch) == together
    given, edits = fixed_answers(model), [steering(model)] * 4
    scores = steered_log_probs(model, given, edits)
    alike(scores, steered_log_probs(model, given, edits, batch_size=1))
    assert not torch.allclose(scores[0], answer_log_probs(model, given)[0], atol=0.1)
    site = Site(2, "mlp_post")
    alike(
        wb.cache_activations(model, PROMPTS, site)[site].values,
        wb.cache_activations(model, PROMPTS, site, batch_size=1)[site].values,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_no_logit(own: Any, family: str, side: str) -> None:
    model = own(family)
    rows = encode(model, PROMPTS[:5])
    batch = pad(rows, pad_id=pad_id(model), side=side)
    with torch.no_grad():
        logits, _ = last_logits(model, batch.tokens, batch.mask, batch.tokens.shape[1])
        for row, (ids, start) in enumerate(zip(rows, batch.starts.tolist(), strict=True)):
            alone = model(torch.tensor([ids.ids]))[0]
            alike(logits[row, start : start + len(ids.ids)], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_continues_as_if_all_were_run_again(own: Any, family: str) -> None:
    model = own(family)
    batch = pad(encode(model, PROMPTS[:4]), pad_id=pad_id(model), side="left")
    more = torch.randint(10, 250, (4, 5), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([batch.tokens, more], dim=1)
    mask = torch.cat([batch.mask, torch.ones_like(more, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        whole, none = last_logits(model, tokens, mask, 6)
        assert none is None
        first, kept = last_logits(model, batch.tokens, batch.mask, 1, use_cache=True)
        steps = [first]
        for place in range(5):
            width = batch.tokens.shape[1] + place + 1
            logits, kept = last_logits(
                model, more[:, place : place + 1], mask[:, :width], 1, cache=kept, use_cache=True
            )
            steps.append(logits)
    alike(torch.cat(steps, dim=1), whole)


def test_logits_are_computed_for_the_columns_that_are_read_only(own: Any) -> None:
    model, widths = own("llama3"), []
    handle = model.unembed.register_forward_hook(lambda *call: widths.append(call[2].shape[1]))
    tokens = torch.arange(10, 30)[None]
    last_logits(model, tokens, torch.ones_like(tokens, dtype=torch.bool), 2)
    handle.remove()
    assert widths == [2]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_local_attn": True, "attn_types": ["global", "local"] * 2, "window_size": 9},
        {"positional_embedding_type": "alibi"},
    ],
    ids=["window", "alibi"],
)
def test_no_padding_stands_between_tokens_whose_distance_is_counted(
    family_path: Any, changes: dict[str, Any]
) -> None:
    """Columns are counted: behind a shared prefix, padding would make the distance longer."""
    model = hooked_transformer(family_path("llama3"), d_mlp=D_MLP, **changes)
    single = wb.Decoding(max_new_tokens=7, batch_size=1)
    assert wb.generate(model, PROMPTS[:6], (), GREEDY) == wb.generate(
        model, PROMPTS[:6], (), single
    )
    assert [a.tokens for a in wb.generate(model, PROMPTS[:6], (), GREEDY)] != [
        a.tokens
        for a in wb.generate(hooked_transformer(family_path("llama3")), PROMPTS[:6], (), GREEDY)
    ]


def test_heads_taken_apart_are_run_without_a_cache(own: Any, family_path: Any) -> None:
    apart = hooked_transformer(family_path("llama3"), d_mlp=D_MLP)
    apart.set_ungroup_grouped_query_attention(True)
    for case in ("cache_activations", "generate", "answer_log_probs", "head_sources"):
        alike(CASES[case](apart), CASES[case](own("llama3")))


def test_sixteen_bits_are_kept_in_the_cache(own: Any) -> None:
    model = copy.deepcopy(own("llama3")).to(torch.bfloat16)
    tokens = torch.arange(10, 30)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        _, kept = last_logits(model, tokens[:, :9], mask[:, :9], 1, use_cache=True)
        found, kept = last_logits(model, tokens[:, 9:], mask, 11, cache=kept, use_cache=True)
        whole, _ = last_logits(model, tokens, mask, 11)
    assert kept.layers[2].keys.dtype == found.dtype == torch.bfloat16
    alike(found, whole, tolerance=0.1)
    assert all(a.tokens for a in wb.generate(model, PROMPTS[:3], steering(model), GREEDY))


@pytest.mark.parametrize("cached", [True, False])
def test_intervene_steers_the_models_own_generate(own: Any, cached: bool) -> None:
    model = own("llama3")
    prompt, how = PROMPTS[0], {"do_sample": False, "verbose": False, "max_new_tokens": 7}
    for positions in ("all", "prompt", "generated"):
        edits = steering(model, positions=positions)
        [expected] = wb.generate(model, [prompt], edits, GREEDY)
        [row] = encode(model, [prompt])
        with intervene(model, edits):
            out = model.generate(torch.tensor([row.ids]), use_past_kv_cache=cached, **how)
        assert out[0, len(row.ids) :].tolist()[: len(expected.tokens)] == list(expected.tokens)


def test_intervene_sees_texts_and_lists_of_them(own: Any) -> None:
    model, edits = own("llama3"), steering(own("llama3"))
    texts = ["a stolen card", "write a poem for beginners, please"]
    gate = dataclasses.replace(
        gates.gate(model, Threshold(-math.inf, 0.02, 0.0, 1.0, 3)), span="last"
    )
    for interventions in (edits, gates.through(model, gate)):
        with torch.no_grad(), intervene(model, interventions) as seen:
            alone = [model(text)[0] for text in texts]
        for side in ("left", "right"):
            with torch.no_grad(), intervene(model, interventions) as seen:
                together = model(texts, padding_side=side)
            for row, expected in enumerate(alone):
                n = len(expected)
                alike(together[row, -n:] if side == "left" else together[row, :n], expected)
            assert seen.n_prompt == together.shape[1]
    with torch.no_grad():
        assert not torch.allclose(model(texts[0])[0], alone[0], atol=0.1)


def test_an_edit_inside_the_block_reaches_the_residual_stream(own: Any, tiny: Any) -> None:
    """In the bridge such an edit would reach the MLP only, and is refused there."""
    inside = wb.Intervention(Site(1, "resid_mid"), steering(tiny)[0].edit)
    with pytest.raises(ValueError, match="read but not edited"), intervene(tiny, [inside]):
        pass
    model, tokens = own("llama3"), torch.arange(10, 25)[None]
    before = wb.Intervention(Site(1, "attn_out"), inside.edit)
    logits = []
    for edit in (inside, before):
        with torch.no_grad(), intervene(model, [edit]):
            logits.append(model(tokens))
    alike(logits[0], logits[1])


def test_vectors_of_the_bridge_are_taken_over_when_that_is_said(own: Any, tiny: Any) -> None:
    model, edits = own("llama3"), steering(tiny)
    with pytest.raises(ValueError, match="transfer=True"):
        wb.generate(model, PROMPTS[:2], edits, GREEDY)
    found = wb.generate(model, PROMPTS[:2], edits, GREEDY, transfer=True)
    assert found == wb.generate(tiny, PROMPTS[:2], edits, GREEDY)


def test_a_model_without_tokenizer_is_refused_in_words(family_path: Any) -> None:
    model = hooked_transformer(family_path("llama3"), d_mlp=D_MLP)
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        wb.generate(model, PROMPTS[:1])


def test_nothing_is_left_in_the_model(own: Any) -> None:
    model = own("llama3")

    def state() -> list[Any]:
        modules = list(model.modules())
        return [[len(m._forward_hooks), len(m._forward_pre_hooks)] for m in modules]

    before = state()
    answers(model)
    with pytest.raises(RuntimeError, match="out of memory"), intervene(model, steering(model)):
        raise RuntimeError("out of memory")
    assert state() == before


def test_a_whole_run_finishes_and_agrees_with_the_bridges(
    own: Any, tiny: Any, finished: Path, few_prompts: Path, tmp_path: Path
) -> None:
    folder = run(settings(few_prompts), tmp_path / "run", model=own("llama3"))
    names = {path.name for path in finished.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    for name in ("neurons.csv", "evaluation.csv"):
        found, expected = (pd.read_csv(where / name) for where in (folder, finished))
        alike(found, expected, name, tolerance=1e-3)
    steered = [
        side_by_side(model, "a stolen card", wb.gated_steering_from(where), GREEDY)
        for model, where in ((own("llama3"), folder), (tiny, finished))
    ]
    alike(steered[0], steered[1])
    assert write_neuron_page(folder, "fraud", top=2, model=own("llama3")).is_file()


@pytest.mark.slow
def test_vectors_of_the_real_model_agree_to_1e_4(real_model: Any) -> None:
    model = hooked_transformer(packaged_folder(EMBEDDED))
    prompts = [p for p in load_prompts() if p.category in ("fraud", "malware", "harmless")][::12]
    sites = [Site(layer, "resid_post") for layer in (0, 10, 15, 28)]
    acts, expected = (wb.cache_activations(m, prompts, sites) for m in (model, real_model))
    for site in sites:
        found, bridge = (
            wb.fit_steering_vectors(a[site], safe_side="generic") for a in (acts, expected)
        )
        for category, vector in bridge.items():
            difference = (found[category].vector - vector.vector).norm() / vector.norm
            assert float(difference) < 1e-4, (site, category)
