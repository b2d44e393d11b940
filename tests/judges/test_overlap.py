"""BLEU and ROUGE-L of texts in scripts without spaces, and BLEU of a corpus.

All texts were written for these tests.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from workbench.judges.overlap import bleu, bleu_counts, bleu_of_counts, rouge_l

PAIRS = {
    "zh": [
        ("他说:“你好。”然后走了……", "她说:“你好！”然后又走了。"),
        ("《花园》(第二版)很好看——真的。", "《花园》(第一版)不好看——真的!"),
        ("价格是３０元，约 4.5 美元。", "价格是３５元，约 5.5 美元。"),
        ("猫坐在垫子上看 GPT-2 的书。", "猫坐在椅子上看 GPT-3 的书。"),
    ],
    "ja": [
        ("「パン」を焼きます。水と塩を混ぜる。", "「パン」を作ります。水を混ぜる。"),
        ("猫は椅子の上で、本を読んでいます。", "犬は椅子の下で、本を読んでいた。"),
    ],
    # No marks above or below the letters: sacrebleu's "char" would cut those off.
    "th": [("ขนมปงกบนมสด", "ขนมปงและนมสด"), ("แมวนอนบนโตะ", "แมวนอนในสวน")],
}
SACREBLEUS = {"zh": "zh", "ja": "char", "th": "char"}
LETTERS = [
    *"猫狗坐在椅子上看书天气很好，。！？、：“”‘’（）《》—… 「」％１Ａ·℃①-",
    "GPT",
    "3.5",
    "42",
]


@pytest.mark.parametrize("language", PAIRS)
def test_bleu_is_of_characters_where_a_script_has_no_spaces(language):
    references, texts = (list(side) for side in zip(*PAIRS[language], strict=True))
    metric = BLEU(effective_order=True, tokenize=SACREBLEUS[language])
    expected = [
        metric.sentence_score(text, [reference]).score for reference, text in PAIRS[language]
    ]
    assert bleu(references, texts) == pytest.approx(expected)
    assert all(5 < score < 95 for score in expected)


@given(*[st.lists(st.sampled_from(LETTERS), max_size=30).map("".join)] * 2)
def test_any_chinese_text_has_the_bleu_of_sacrebleus_own_cut(first, second):
    reference, text = f"书{first}", f"看{second}"
    expected = BLEU(effective_order=True, tokenize="zh").sentence_score(text, [reference]).score
    assert bleu([reference], [text]) == pytest.approx([expected])


@given(*[st.text(st.sampled_from("abc .,'-–“”…é☀5"), min_size=1, max_size=40)] * 2)
def test_other_text_has_the_bleu_of_13a(reference, text):
    expected = BLEU(effective_order=True).sentence_score(text, [reference]).score
    assert bleu([reference], [text]) == (pytest.approx([expected]) if reference.strip() else [None])


@pytest.mark.parametrize(
    ("reference", "text", "common", "lengths"),
    [
        ("猫坐在垫子上。", "猫坐在椅子上！", 5, (6, 6)),
        ("水を沸かす", "水を飲む", 2, (5, 4)),
        ("ที่นี่", "ที่โน่น", 1, (2, 4)),  # letters with their marks
    ],
)
def test_rouge_l_is_of_characters_where_a_script_has_no_spaces(reference, text, common, lengths):
    recall, precision = (common / n for n in lengths)
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l([reference], [text]) == pytest.approx([expected])


def test_the_counts_of_texts_add_up_to_sacrebleus_corpus_bleu():
    english = [
        ("Mix flour and water and bake the bread.", "Mix the flour and water, then bake it."),
        ("A cat sat on the mat.", "A dog sat on the mat."),
        ("Eggs need eight minutes in boiling water.", ""),
    ]
    for pairs, tokens in ((english, "13a"), (PAIRS["zh"], "zh")):
        references, texts = (list(side) for side in zip(*pairs, strict=True))
        counts = bleu_counts(references, texts)
        assert counts.shape == (len(pairs), 10)
        expected = BLEU(tokenize=tokens).corpus_score(texts, [references]).score
        assert bleu_of_counts(counts.sum(axis=0)) == pytest.approx(expected)
        assert expected != pytest.approx(sum(bleu(references, texts)) / len(pairs), abs=0.5)
    assert bleu_of_counts(bleu_counts(["one two"], ["three four"])[0]) == 0
    assert bleu_counts([], []).shape == (0, 10)
    with pytest.raises(ValueError, match="references and texts must pair up, got 1 and 0"):
        bleu_counts(["a"], [])
