"""Measure how far a text overlaps with a reference: ROUGE-L, and BLEU of sentences and corpora."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

from workbench.judges.text_quality import UNSPACED, check_pair_up, letter_marks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from jaxtyping import Int


_CHINESE = r"\u2e80-\u33ff\uf900-\ufaff\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef"
"""Marks and full-width forms of Chinese and Japanese, each a token in sacrebleu's "zh"."""


_SYMBOLS = r"\u2010-\u2a6d"
"""Dashes, quotation marks and symbols of all languages, each a token in sacrebleu's "zh"."""


def rouge_l(references: Sequence[str], texts: Sequence[str]) -> list[float | None]:
    """Compute ROUGE-L F1 of each text against its reference, in [0, 1].

    It is that of rouge-score, without stemming. The library's own tokenizer keeps a-z and 0-9 only;
    here words with other letters count too, and each letter of a script without spaces.

    Args:
        references: What each text is compared with; an empty one cannot be and gives None.
        texts: As many texts, in the same order; an empty one scores 0.

    Raises:
        ValueError: If the two lists differ in length.
        TypeError: If one string is given in place of a list.
    """
    check_pair_up("references", references, "texts", texts)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_RougeTokens())
    return [
        float(scorer.score(reference, text)["rougeL"].fmeasure) if reference.strip() else None
        for reference, text in zip(references, texts, strict=True)
    ]


def bleu(references: Sequence[str], texts: Sequence[str]) -> list[float | None]:
    """Compute sentence BLEU of each text against its reference, in [0, 100].

    It is that of sacrebleu, with effective order and 13a tokens. Where one of the two texts has
    letters of a script written without spaces (Chinese, Japanese, Thai, ...), each such letter and
    each mark between them is a token, as in sacrebleu's "zh".

    Args:
        references: What each text is compared with; an empty one cannot be and gives None.
        texts: As many texts, in the same order; an empty one scores 0.

    Raises:
        ValueError: If the two lists differ in length.
        TypeError: If one string is given in place of a list.
    """
    check_pair_up("references", references, "texts", texts)
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)  # without it every text under four words scores 0
    pairs = (_spaced(*pair) for pair in zip(references, texts, strict=True))
    return [
        float(metric.sentence_score(text, [reference]).score) if reference.strip() else None
        for reference, text in pairs
    ]


def bleu_counts(references: Sequence[str], texts: Sequence[str]) -> Int[np.ndarray, "text 10"]:
    """Count what corpus BLEU is made of; the counts of a corpus are the sums of its texts' rows.

    Tokens are those of ``bleu``.

    Args:
        references: What each text is compared with; none may be empty.
        texts: As many texts, in the same order.

    Returns:
        Columns: n-grams of 1 to 4 tokens that match the reference, all n-grams of 1 to 4 tokens,
        tokens of the text, tokens of the reference.

    Raises:
        ValueError: If the two lists differ in length.
        TypeError: If one string is given in place of a list.
    """
    check_pair_up("references", references, "texts", texts)
    import numpy as np
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)
    rows = []
    for pair in zip(references, texts, strict=True):
        reference, text = _spaced(*pair)
        score = metric.sentence_score(text, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.int64).reshape(len(rows), 10)


def bleu_of_counts(counts: Sequence[int]) -> float:
    """Compute corpus BLEU, in [0, 100], from a corpus' sums of ``bleu_counts``."""
    from sacrebleu.metrics.bleu import BLEU

    *grams, length, reference_length = (int(count) for count in counts)
    score = BLEU.compute_bleu(grams[:4], grams[4:], length, reference_length, smooth_method="exp")
    return float(score.score)


class _RougeTokens:
    """Cut texts for ROUGE: as rouge-score does where they are ASCII, and elsewhere alike."""

    def tokenize(self, text: str) -> list[str]:
        """List the words of a text, without apostrophes."""
        return _rouge_word().findall(unicodedata.normalize("NFC", text.lower()))


@cache
def _rouge_word() -> re.Pattern[str]:
    return re.compile(rf"[{UNSPACED}][{letter_marks()}]*|(?:[^\W_{UNSPACED}][{letter_marks()}]*)+")


def _spaced(*texts: str) -> list[str]:
    """Put spaces around letters and marks of scripts written without them, if a text has any."""
    texts = tuple(unicodedata.normalize("NFC", text) for text in texts)
    if not any(re.search(f"[{UNSPACED}{_CHINESE}]", text) for text in texts):
        return list(texts)
    single = re.compile(rf"[{UNSPACED}][{letter_marks()}]*|[{_CHINESE}{_SYMBOLS}]")
    return [single.sub(r" \g<0> ", text) for text in texts]
