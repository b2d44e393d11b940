"""Rate answers with a reward model, as numbers on the five HelpSteer attributes.

Any sequence classifier on a decoder will do whose outputs are named: in its config.json, in
data/judge_models.yaml, or by you.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files.store import key_of
from workbench.judges._checkpoints import (
    Checkpoint,
    Frame,
    batches,
    encode_texts,
    frame_of,
    judge_models,
    left_padded,
    read_checkpoint,
)
from workbench.judges.base import is_empty, without_thoughts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor


ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""HelpSteer's attributes (Wang et al. 2023, arXiv:2311.09528).

They are rated 0 to 4 there; a model's numbers may fall outside.
"""


_NAMED = re.compile(rf"(?:helpsteer2?[-_ .:])?({'|'.join(ATTRIBUTES)})", re.IGNORECASE)


@dataclass(frozen=True)
class Rewards:
    """Hold five numbers that a reward model gives an answer, all None where it is unscored.

    Attributes:
        helpfulness: How well the answer serves the request.
        correctness: Whether it has what belongs to it, without errors.
        coherence: Whether it is consistent and clear.
        complexity: How much knowledge it takes to write it.
        verbosity: How much detail it has for what was asked.
        judge: Name and version of the model.
        reason: Why it is unscored, else empty.
    """

    helpfulness: float | None
    correctness: float | None
    coherence: float | None
    complexity: float | None
    verbosity: float | None
    judge: str
    reason: str = ""


def load_reward_model(
    name_or_path: str | Path,
    *,
    outputs: Sequence[str] | None = None,
    device: str | None = None,
    dtype: str = "bfloat16",
    revision: str | None = None,
    batch_size: int = 8,
) -> RewardJudge:
    """Load a reward model that rates the five HelpSteer attributes.

    Args:
        name_or_path: Hub name or local folder of a sequence classifier.
        outputs: What its outputs are, in order, where neither its config.json nor
            data/judge_models.yaml says so; the five attributes must be among them.
        device: Where it runs; a GPU if there is one, else the CPU.
        dtype: float32, bfloat16 (default) or float16.
        revision: Branch, tag or commit of a hub repository.
        batch_size: Answers rated at a time.

    Raises:
        ValueError: If it cannot be read, has fewer than five outputs, or does not say which is
            which.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    # A local copy is recognised by the name of its folder.
    by_folder = {hub.rpartition("/")[2]: row for hub, row in judge_models("rewards").items()}
    known: Mapping[str, Any] = by_folder.get(Path(name_or_path).name, {})
    named = outputs or known.get("outputs")
    options: dict[str, Any] = {"num_labels": len(named)} if named else {}
    if "head" in known:
        options["key_mapping"] = {rf"^{re.escape(known['head'])}\.": "score."}
    checkpoint = read_checkpoint(
        "AutoModelForSequenceClassification",
        name_or_path,
        device=device,
        dtype=dtype,
        revision=revision,
        **options,
    )
    if not hasattr(checkpoint.model, "score"):
        raise ValueError(
            f"{checkpoint.name!r} has no head named 'score' on a decoder; "
            "give a reward model that is a sequence classifier on a decoder."
        )
    config = checkpoint.model.config
    columns = _columns(
        checkpoint.name, named or [str(config.id2label[i]) for i in range(config.num_labels)]
    )
    scale = (float(known.get("scale", 1.0)), float(known.get("offset", 0.0)))
    return RewardJudge(checkpoint, frame_of(checkpoint), columns, scale, batch_size)


@dataclass(frozen=True, eq=False)
class RewardJudge:
    """Rate answers with a reward model; made by ``load_reward_model``.

    It is called like a judge and may be wrapped in ``cached(judge, path, result=Rewards)``.

    Attributes:
        checkpoint: Model and tokenizer.
        frame: Its input around the two texts.
        columns: Which output each of ``ATTRIBUTES`` is.
        scale: Factor and offset that bring the outputs to HelpSteer's scale.
        batch_size: Answers rated at a time.
    """

    checkpoint: Checkpoint
    frame: Frame
    columns: tuple[int, ...]
    scale: tuple[float, float]
    batch_size: int

    @property
    def name(self) -> str:
        """Name the checkpoint, with a key of weights, input and outputs."""
        key = key_of(
            [self.checkpoint.key, asdict(self.frame), list(self.columns), list(self.scale)]
        )
        return f"reward:{self.checkpoint.name}-{key[:8]}"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Rewards]:
        """Give one rating per answer, in order.

        An answer is unscored where it is empty or the texts do not fit the model's context.

        Raises:
            ValueError: If the two lists differ in length.
            TypeError: If one string is given in place of a list.
        """
        responses = without_thoughts(prompts, responses)
        name, limit = self.name, self.checkpoint.context
        ids = encode_texts(
            self.checkpoint,
            [self.frame.fill(*pair) for pair in zip(prompts, responses, strict=True)],
        )
        reasons = [
            "empty"
            if is_empty(response)
            else f"too long: {len(row)} tokens, room for {limit}"
            if len(row) > limit
            else ""
            for row, response in zip(ids, responses, strict=True)
        ]
        ratings = [Rewards(None, None, None, None, None, name, reason) for reason in reasons]
        fitting = [i for i, reason in enumerate(reasons) if not reason]
        for batch in batches([ids[i] for i in fitting], self.batch_size):
            rows = [fitting[b] for b in batch]
            for i, values in zip(rows, self._rate([ids[i] for i in rows]).tolist(), strict=True):
                if all(map(math.isfinite, values)):
                    ratings[i] = Rewards(**dict(zip(ATTRIBUTES, values, strict=True)), judge=name)
                else:
                    ratings[i] = replace(ratings[i], reason="the model's numbers are not finite")
        return ratings

    def _rate(self, rows: list[list[int]]) -> Float[Tensor, "batch attribute"]:
        """Apply the head at each row's last token.

        The classifier's own pooling is not used: it takes an end of turn for padding.
        """
        import torch

        model = self.checkpoint.model
        ids, mask = left_padded(self.checkpoint, rows)
        with torch.inference_mode():
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            hidden = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            )
            outputs = model.score(hidden.last_hidden_state[:, -1]).float()
        factor, offset = self.scale
        return outputs[:, list(self.columns)].cpu() * factor + offset


def _columns(name: str, outputs: Sequence[str]) -> tuple[int, ...]:
    """Find each attribute among the outputs."""
    if len(outputs) < len(ATTRIBUTES):
        raise ValueError(
            f"{name!r} has {len(outputs)} output(s), the five attributes "
            f"({', '.join(ATTRIBUTES)}) need one each; give a multi-attribute reward model."
        )
    named = [
        (match[1].lower(), i)
        for i, output in enumerate(outputs)
        if (match := _NAMED.fullmatch(output.strip()))
    ]
    names = [attribute for attribute, _ in named]
    if sorted(names) != sorted(ATTRIBUTES):
        raise ValueError(
            f"{name!r} does not say which of its {len(outputs)} outputs are "
            f"{', '.join(ATTRIBUTES)} (it names {', '.join(outputs[:5])} ...); "
            "pass outputs=[...] in its documented order."
        )
    return tuple(dict(named)[attribute] for attribute in ATTRIBUTES)
