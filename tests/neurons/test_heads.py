"""Changed heads equal those overwritten by hand; controls are other heads of the layer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.tiny_models import sentences

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import ActivationSet, cache_activations
from workbench.models.sites import Site, sites_of_kind
from workbench.models.tokens import encode
from workbench.neurons.attribution import write_matrix
from workbench.neurons.heads import (
    MATCHED_HEADS,
    HeadReference,
    head_interventions,
    head_reference,
    head_statistics,
)
from workbench.neurons.silencing import matched_controls
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTS = [
    Prompt(f"p{i}", text, None, "fraud", ("unsafe", "safe")[i % 2], "test")
    for i, text in enumerate(sentences(10))
]
UNSAFE, SAFE = PROMPTS[::2], PROMPTS[1::2]
HELD_OUT = [Prompt(f"h{i}", text) for i, text in enumerate(sentences(14)[10:])]


@pytest.fixture(scope="module")
def model(family_model: Callable[[str], Any]) -> Any:
    return family_model("qwen2")


@pytest.fixture(scope="module")
def activations(model: Any) -> dict[Site, ActivationSet]:
    return cache_activations(model, PROMPTS, sites_of_kind(model, "z"))


@pytest.fixture(scope="module")
def reference(model: Any, activations: dict[Site, ActivationSet]) -> HeadReference:
    return head_reference(model, activations, UNSAFE, SAFE)


def last_logits(model: Any, prompt: Prompt, hooks: list[Any] = ()) -> torch.Tensor:
    [row] = encode(model, [prompt])
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(torch.tensor([row.ids]))[0, -1]


@pytest.mark.parametrize("method", ["zero", "clamp"])
def test_changed_heads_equal_heads_overwritten_by_hand(
    model: Any, reference: HeadReference, method: str
) -> None:
    heads = [(1, 2), (1, 0), (3, 3)]
    means = reference.safe.double().mean(dim=0).float()

    def overwrite(layer: int) -> Any:
        def hook(z: torch.Tensor, hook: object) -> torch.Tensor:
            by_head = z.reshape(*z.shape[:2], 4, -1).clone()
            for at, head in heads:
                if at == layer:
                    by_head[:, :, head] = 0 if method == "zero" else means[layer, head]
            return by_head.reshape(z.shape)

        return hook

    by_hand = [(Site(layer, "z").hook_name, overwrite(layer)) for layer in (1, 3)]
    for prompt in HELD_OUT:
        [row] = encode(model, [prompt])
        with torch.no_grad(), intervene(model, head_interventions(reference, heads, method)):
            changed = model(torch.tensor([row.ids]))[0, -1]
        torch.testing.assert_close(changed, last_logits(model, prompt, by_hand))
        assert not torch.allclose(changed, last_logits(model, prompt), atol=1e-6)


def test_a_silenced_head_writes_nothing_and_the_others_keep_every_bit(
    model: Any, reference: HeadReference
) -> None:
    seen: list[torch.Tensor] = []

    def keep(z: torch.Tensor, hook: object) -> None:
        seen.append(z.reshape(*z.shape[:2], 4, -1).clone())

    [row] = encode(model, HELD_OUT[:1])
    name = Site(2, "z").hook_name
    for heads in ([], [(2, 1)]):
        changes = head_interventions(reference, heads)
        with torch.no_grad(), intervene(model, changes), model.hooks(fwd_hooks=[(name, keep)]):
            model(torch.tensor([row.ids]))
    plain, silenced = seen
    assert not silenced[:, :, 1].any()
    others = [0, 2, 3]
    assert torch.equal(silenced[:, :, others], plain[:, :, others])


def test_no_head_is_no_intervention_and_all_of_them_change_answers(
    model: Any, reference: HeadReference
) -> None:
    assert head_interventions(reference, []) == []
    short = Decoding(max_new_tokens=6)
    every = [(layer, head) for layer in range(4) for head in range(4)]
    plain = generate(model, HELD_OUT, (), short)
    silent = generate(model, HELD_OUT, head_interventions(reference, every), short)
    assert [a.text for a in plain] != [a.text for a in silent]


def test_the_norm_of_a_head_is_that_of_what_it_writes(
    model: Any, activations: dict[Site, ActivationSet], reference: HeadReference
) -> None:
    table = head_statistics(model, reference)
    assert len(table) == 16
    z = activations[Site(2, "z")].values.double()
    d_head = z.shape[1] // 4
    for head in range(4):
        columns = slice(head * d_head, (head + 1) * d_head)
        written = z[:, columns] @ write_matrix(model, Site(2, "z")).double()[columns]
        [norm] = table.query("layer == 2 and head == @head")["norm"]
        assert norm == pytest.approx(float(written.norm(dim=1).mean()), rel=1e-6)


def test_controls_of_heads_are_other_heads_of_their_layers(
    model: Any, reference: HeadReference
) -> None:
    target = [(0, 1), (2, 0), (2, 3)]
    statistics = head_statistics(model, reference)
    drawn = matched_controls(statistics, target, n_sets=8, by=MATCHED_HEADS)
    for members in drawn.sets:
        assert not set(members) & set(target)
        assert Counter(layer for layer, _ in members) == {0: 1, 2: 2}
    with pytest.raises(ValueError, match="layer 1 has 1 heads besides the 3 of the target"):
        matched_controls(statistics, [(1, 0), (1, 1), (1, 2)], by=MATCHED_HEADS)
    with pytest.raises(ValueError, match=r"no head \(9, 0\) in the table"):
        matched_controls(statistics, [(9, 0)], by=MATCHED_HEADS)


def test_what_does_not_fit_is_refused_in_one_line(
    model: Any, activations: dict[Site, ActivationSet], reference: HeadReference
) -> None:
    with pytest.raises(ValueError, match=r"no head \(1, 4\): the model has 4 layers of 4"):
        head_interventions(reference, [(1, 4)])
    with pytest.raises(ValueError, match="unknown method 'mean' for heads; methods: clamp, zero"):
        head_interventions(reference, [(1, 0)], "mean")  # type: ignore[arg-type]
    without = {site: acts for site, acts in activations.items() if site.layer != 2}
    with pytest.raises(ValueError, match="no heads of layer 2: cache sites_of_kind"):
        head_reference(model, without, UNSAFE, SAFE)
    with pytest.raises(ValueError, match="needs unsafe and safe prompts, got 0 and 5"):
        head_reference(model, activations, [], SAFE)
    assert repr(reference).startswith("HeadReference(5 unsafe + 5 safe prompts")
