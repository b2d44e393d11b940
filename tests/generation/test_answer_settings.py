"""Samples, top-k, stop texts, thoughts and template keywords of answers, in any batch."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from helpers.gates import gate, through
from helpers.thinking import OPENED, SWITCH, thinking_model
from helpers.tiny_models import sentences

from workbench.files.store import read_jsonl
from workbench.generation._choice import _first, _most_likely
from workbench.generation._decode_loop import DecodeLoop
from workbench.generation._endings import Endings
from workbench.generation.answers import generate, sweep
from workbench.generation.decoding import Decoding
from workbench.generation.likelihood import answer_log_probs, steered_log_probs
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.models.tokens import decode, encode, token_ids
from workbench.prompts.prompt import Prompt
from workbench.steering.interventions import Intervention

SAMPLED = Decoding(max_new_tokens=8, temperature=1.0, n_samples=3)


def questions(n):
    texts = sentences(n)
    return [Prompt(f"p{i}", texts[i], None, "fraud", "unsafe", "test") for i in range(n)]


# Samples


@pytest.mark.parametrize("batch_size", [1, 2, 7, None])
def test_sample_i_of_a_prompt_is_the_same_in_any_batch_and_number(tiny, batch_size) -> None:
    prompts = questions(4)
    many = generate(tiny, prompts, decoding=dataclasses.replace(SAMPLED, batch_size=batch_size))
    assert [(c.prompt.id, c.sample) for c in many] == [
        (f"p{i}", k) for i in range(4) for k in range(3)
    ]
    alone = generate(tiny, prompts[2:3], decoding=SAMPLED)
    assert [c.tokens for c in alone] == [c.tokens for c in many[6:9]]
    one = generate(tiny, prompts, decoding=dataclasses.replace(SAMPLED, n_samples=1))
    assert [c.tokens for c in one] == [c.tokens for c in many[::3]]
    assert all(len({c.tokens for c in many[i : i + 3]}) == 3 for i in (0, 3, 6, 9))


def test_samples_are_paired_over_conditions(tiny) -> None:
    nothing = [Intervention(Site(1, "resid_post"), lambda activation: activation)]
    answers = sweep(tiny, questions(2), {"unsteered": (), "idle": nothing}, SAMPLED)
    assert [c.tokens for c in answers[:6]] == [c.tokens for c in answers[6:]]


def test_more_samples_go_on_from_fewer_in_the_same_file(tiny, tmp_path) -> None:
    output, prompts = tmp_path / "out.jsonl", questions(2)
    two = generate(tiny, prompts, decoding=dataclasses.replace(SAMPLED, n_samples=2), output=output)
    assert len(read_jsonl(output)) == 4
    three = generate(tiny, prompts, decoding=SAMPLED, output=output)
    assert len(read_jsonl(output)) == 6
    assert [c.text for c in three if c.sample < 2] == [c.text for c in two]
    assert three == generate(tiny, prompts, decoding=SAMPLED)


def test_several_greedy_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples at temperature 0 are one answer over and over"):
        Decoding(n_samples=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_samples": 0}, "n_samples must be a whole number of at least 1, got 0"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 1, got 2.5"),
        ({"stop": ("",)}, "stop must be texts that are not empty"),
        ({"template_keywords": {"a": object()}}, "must be a mapping from names to JSON values"),
        ({"template_keywords": 3}, "must be a mapping from names to JSON values, got 3"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        Decoding(**settings)


def test_settings_can_be_compared_and_hashed() -> None:
    one, same = (Decoding(template_keywords={"b": [1], "a": False}) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Decoding(template_keywords={"a": True, "b": [1]})
    assert dataclasses.replace(one, seed=1).template_keywords == {"a": False, "b": [1]}
    assert Decoding(stop="x").stop == Decoding(stop=["x"]).stop == ("x",)


# Top-k


def test_top_k_keeps_the_likeliest_and_top_p_counts_among_them() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    assert _first(p, 2).tolist() == [pytest.approx([0, 4 / 7, 0, 3 / 7])]
    assert _first(p, 9).tolist() == [pytest.approx(p[0].tolist())]
    assert _most_likely(_first(p, 2), 0.5).tolist() == [pytest.approx([0, 4 / 7, 0, 0])]


def test_one_likeliest_token_is_greedy_decoding(tiny) -> None:
    greedy = generate(tiny, questions(3), decoding=Decoding(max_new_tokens=8))
    first = generate(
        tiny, questions(3), decoding=Decoding(max_new_tokens=8, temperature=2.0, top_k=1)
    )
    assert [c.tokens for c in first] == [c.tokens for c in greedy]
    many = generate(tiny, questions(3), decoding=Decoding(max_new_tokens=8, temperature=2.0))
    assert [c.tokens for c in many] != [c.tokens for c in greedy]


# Stop texts


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", ["llama3", "gpt2"])
def test_an_answer_is_cut_before_a_stop_text_also_across_tokens(
    family_model, family, batch_size
) -> None:
    model, prompts = family_model(family), questions(4)
    sampled = Decoding(max_new_tokens=24, temperature=1.5, batch_size=batch_size)
    whole = generate(model, prompts, decoding=sampled)
    borders = [len(decode(model, whole[1].tokens[:n])) for n in range(8)]
    stop = whole[1].text[borders[5] - 1 : borders[6] + 1]  # parts of three tokens
    assert len(stop) > 2
    passes = []
    counting = model.hooks(
        fwd_hooks=[("blocks.0.hook_resid_pre", lambda a, hook: passes.append(a.shape[1]))]
    )
    with counting:
        cut = generate(model, prompts, decoding=dataclasses.replace(sampled, stop=(stop, "\0")))
    for before, after in zip(whole, cut, strict=True):
        place = before.text.find(stop)
        assert after.text == (before.text if place < 0 else before.text[:place])
        assert after.finish == (before.finish if place < 0 else "stop")
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert len(decode(model, after.tokens)) <= len(after.text)
    assert cut[1].finish == "stop"
    if batch_size == 1:  # its row ends as soon as the stop text is there
        assert passes.count(1) < sum(max(0, len(c.tokens) - 1) for c in whole)


def test_the_first_of_several_stop_texts_counts(tiny) -> None:
    decoding = Decoding(stop=("cd", "bc", "x"))
    written = Endings.of(tiny, decoding).written(token_ids(tiny, "abcd x"), "eos")
    assert (written.text, written.finish) == ("a", "stop")
    untouched = Endings.of(tiny, decoding).written(token_ids(tiny, "acbd"), "eos")
    assert (untouched.text, untouched.finish) == ("acbd", "eos")


def test_stop_texts_and_top_k_are_part_of_the_keys(tiny, tmp_path) -> None:
    output, prompts = tmp_path / "out.jsonl", questions(1)
    base = Decoding(max_new_tokens=4, temperature=1.0)
    changes = ({}, {"stop": ("a",)}, {"stop": ("b",)}, {"top_k": 3}, {"top_k": 4})
    for n, change in enumerate(changes, 1):
        for _ in range(2):
            decoding = dataclasses.replace(base, **change)
            generate(tiny, prompts, decoding=decoding, output=output)
            assert len(read_jsonl(output)) == n


# Thoughts


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    folder = thinking_model(tmp_path_factory.mktemp("switch"), SWITCH)
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = thinking_model(tmp_path_factory.mktemp("opened"), OPENED)
    return load_model(folder, device="cpu")


@pytest.fixture
def writes(monkeypatch):
    """Return ``writes(model, words)``, under which the model writes these words over and over."""

    def set_words(model, words):
        ids = itertools.cycle(token_ids(model, words))
        monkeypatch.setattr(DecodeLoop, "_choose", lambda self, *_: torch.tensor([next(ids)]))

    return set_words


def test_thoughts_are_kept_apart_in_the_answer_and_in_the_file(thinking, writes, tmp_path) -> None:
    words = "<think>\nThey ask.\n</think>\n\nAn answer."
    n = len(token_ids(thinking, words))
    on = Decoding(max_new_tokens=n, template_keywords={"enable_thinking": True})
    output = tmp_path / "out.jsonl"
    writes(thinking, words)
    (answer,) = generate(thinking, questions(1), decoding=on, output=output)
    assert (answer.thinking, answer.text, answer.finish) == ("They ask.", "An answer.", "length")
    assert answer.tokens == token_ids(thinking, words)
    assert not answer.is_cut_in_thoughts
    (line,) = read_jsonl(output)
    assert (line["thinking"], line["text"]) == ("They ask.", "An answer.")
    assert generate(thinking, questions(1), decoding=on, output=output) == [answer]


def test_an_answer_cut_in_its_thoughts_is_empty_and_said(opened, writes) -> None:
    writes(opened, "They ask and ask")
    with pytest.warns(UserWarning, match="1 of 1 answers were cut at 3 tokens while the model was"):
        (answer,) = generate(opened, questions(1), decoding=Decoding(max_new_tokens=3))
    assert answer.text == ""
    assert answer.thinking
    assert (answer.finish, answer.is_cut_in_thoughts) == ("length", True)


def test_a_stop_text_inside_thoughts_ends_nothing(opened, writes) -> None:
    words = "They stop here.</think>Go on and stop here."
    decoding = Decoding(max_new_tokens=len(token_ids(opened, words)), stop=(" stop",))
    writes(opened, words)
    (answer,) = generate(opened, questions(1), decoding=decoding)
    assert (answer.text, answer.finish) == ("Go on and", "stop")
    assert answer.thinking == "They stop here."


def test_keywords_change_what_is_answered_and_its_key(thinking, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    for n, keywords in enumerate(({}, {"enable_thinking": True}), 1):
        decoding = Decoding(max_new_tokens=4, template_keywords=keywords)
        generate(thinking, questions(2), decoding=decoding, output=output)
        assert len(read_jsonl(output)) == 2 * n


def test_answers_are_scored_behind_the_prompt_they_were_asked_with(thinking) -> None:
    asked = {"system_prompt": "Be kind.", "template_keywords": {"enable_thinking": True}}
    decoding = Decoding(max_new_tokens=5, **asked)
    answers = generate(thinking, questions(3), decoding=decoding)
    assert {c.finish for c in answers} <= {"length", "eos"}
    told = answer_log_probs(thinking, answers, **asked)
    steered = steered_log_probs(thinking, answers, [()] * 3, **asked)
    plain = steered_log_probs(thinking, answers, [()] * 3)
    (row,) = encode(thinking, [answers[0].prompt], **asked)
    ids = torch.tensor([[*row.ids, *answers[0].tokens]])
    logits = thinking.original_model(ids).logits[0, len(row.ids) - 1 : -1].log_softmax(-1)
    by_hand = logits.gather(1, ids[0, len(row.ids) :, None])[:, 0]
    for one in (told[0], steered[0]):
        assert one.tolist() == pytest.approx(by_hand.tolist(), abs=1e-4)
    assert plain[0].tolist() != pytest.approx(by_hand.tolist(), abs=1e-3)


def test_a_gate_that_was_fitted_under_other_words_says_so(tiny) -> None:
    edits = through(tiny, gate(tiny, asked_as='{"system_prompt": "Be kind."}'))
    with pytest.warns(UserWarning, match=r"was fitted under .*Be kind.* under no system prompt"):
        generate(tiny, questions(1), edits, Decoding(max_new_tokens=2))
