"""Read checkpoints that judge answers, and put prompt and answer into their input.

Guards and rewards share this. The tokenizer here is the judge's own; ``workbench.models.tokens`` is
for the model under study.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from workbench.files.hints import one_line
from workbench.files.store import data_path, local_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Int
    from torch import Tensor


JUDGE_MODELS_FILE = "judge_models.yaml"


# They stand for the texts while a template is rendered.
_PROMPT, _RESPONSE = "\u2063the-prompt\u2063", "\u2063the-response\u2063"


@cache
def judge_models(kind: str) -> dict[str, dict[str, Any]]:
    """Read the ``"guards"`` or the ``"rewards"`` of data/judge_models.yaml, by name.

    The file documents itself.
    """
    content: dict[str, dict[str, Any]] = yaml.safe_load(
        data_path(JUDGE_MODELS_FILE).read_text(encoding="utf-8")
    )
    return content[kind]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Hold a model that judges, and its tokenizer.

    Attributes:
        model: Any transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        name: Hub name, or the folder's own name (never a path).
        key: Eight hexadecimal digits that change with the weights, their dtype and the chat
            template.
    """

    model: Any
    tokenizer: Any
    name: str
    key: str

    def __repr__(self) -> str:
        return f"Checkpoint({self.name}-{self.key})"

    @property
    def context(self) -> int:
        """Count the tokens the model can read at once."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 10**9)


@dataclass(frozen=True)
class Frame:
    """Hold a judge's input without the two texts.

    Attributes:
        before: What stands before the prompt.
        between: What stands between the prompt and the response.
        after: What stands after the response.
        controls: Strings in which the tokenizer would see control tokens.
    """

    before: str
    between: str
    after: str
    controls: tuple[str, ...] = ()

    def fill(self, prompt: str, response: str) -> str:
        """Fill in the texts.

        Control tokens in them are broken up: an answer must not be able to end its own turn.
        """
        return (
            self.before
            + self._harmless(prompt)
            + self.between
            + self._harmless(response)
            + self.after
        )

    def _harmless(self, text: str) -> str:
        return _broken_up(text.strip(), self.controls)


def without_controls(tokenizer: Any, text: str) -> str:
    """Break up what the tokenizer would read as control tokens, of its own or its template's."""
    return _broken_up(text, _controls(tokenizer, str(getattr(tokenizer, "chat_template", ""))))


def _broken_up(text: str, controls: Sequence[str]) -> str:
    for control in controls:  # longest first
        text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


def read_checkpoint(
    auto: str,
    source: str | Path,
    *,
    device: str | None = None,
    dtype: str = "bfloat16",
    revision: str | None = None,
    **options: Any,
) -> Checkpoint:
    """Read a checkpoint: safetensors only, never remote code, no weight left at random.

    Args:
        auto: The transformers class that reads it, such as ``"AutoModelForCausalLM"``.
        source: A hub name or a local folder.
        device: Where the weights go; a GPU if there is one, else the CPU.
        dtype: float32, bfloat16 or float16.
        revision: Branch, tag or commit of a hub repository.
        options: Passed on to ``from_pretrained``.

    Raises:
        ValueError: If it cannot be read, or lacks weights, with what to do.
    """
    import torch

    from workbench.models.checkpoints import on_hub_or_cached
    from workbench.models.hooked_model import quantization
    from workbench.models.load import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; dtypes: {', '.join(DTYPES)}.")
    local = local_path(source).is_dir()
    source = local_path(source) if local else source
    name = Path(source).resolve().name if local else str(source)
    if not local:
        # Where the hub cannot be reached this says so at once; transformers takes half a minute.
        on_hub_or_cached(name, revision, explain=True)
    options = {"dtype": DTYPES[dtype], "revision": revision or "main", **options}
    model, tokenizer = _from_pretrained(auto, source, name, options)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if quantization(model.config) is None:  # packed weights stay where they were read to
        model = model.to(place)
    model = model.eval().requires_grad_(False)
    return Checkpoint(model, tokenizer, name, _key(model, tokenizer))


def _from_pretrained(
    auto: str, source: str | Path, name: str, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Read model and tokenizer with transformers; refuse a model that lacks weights."""
    import transformers

    from workbench.models.quiet import quiet_transformers

    try:
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, revision=options["revision"], trust_remote_code=False
            )
            model, info = getattr(transformers, auto).from_pretrained(
                source,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except Exception as error:  # every kind of damage has its own, from several libraries
        raise ValueError(
            f"cannot load {name!r} ({one_line(error)}); a judge needs config.json, a tokenizer and "
            "safetensors weights, and many guards have to be unlocked on the hub first."
        ) from error
    if missing := sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}):
        raise ValueError(
            f"{name!r} has no weights for {', '.join(missing[:3])}: it is not the kind of model "
            "this judge needs, and what is missing would be filled with random numbers; "
            "give another checkpoint."
        )
    return model, tokenizer


def frame_of(
    checkpoint: Checkpoint,
    *,
    text: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> Frame:
    """Find the judge's input around the two texts.

    It comes from the checkpoint's own chat template, or from ``text`` with {prompt} and {response}.

    Raises:
        ValueError: If the template is missing, fails, or does not hold both texts once, in this
            order.
    """
    tokenizer = checkpoint.tokenizer
    if text is not None:
        rendered = [text.replace("{prompt}", _PROMPT).replace("{response}", _RESPONSE)]
    elif not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{checkpoint.name!r} has no chat template to put the texts in; "
            "read the complete checkpoint."
        )
    else:
        rendered = _rendered_templates(
            tokenizer, {**(arguments or {}), "add_generation_prompt": add_generation_prompt}
        )
    for whole in rendered:
        before, _, rest = whole.partition(_PROMPT)
        between, _, after = rest.partition(_RESPONSE)
        if (
            whole == before + _PROMPT + between + _RESPONSE + after
            and _PROMPT not in between + after
            and _RESPONSE not in after
        ):
            return Frame(before, between, after, _controls(tokenizer, before + between + after))
    raise ValueError(
        f"the chat template of {checkpoint.name!r} does not hold the prompt and then the response, "
        "once each; it is not the template of a judge of answers: give another checkpoint."
    )


def _rendered_templates(tokenizer: Any, arguments: dict[str, Any]) -> list[str]:
    """Render the chat template with the texts as plain strings and as parts.

    Some templates read parts, and drop plain texts. One that fails gives its error in brackets.
    """
    rendered: list[str] = []
    for wrap in (str, lambda mark: [{"type": "text", "text": mark}]):
        turns = [
            {"role": "user", "content": wrap(_PROMPT)},
            {"role": "assistant", "content": wrap(_RESPONSE)},
        ]
        try:
            rendered.append(tokenizer.apply_chat_template(turns, tokenize=False, **arguments))
        except Exception as error:  # templates raise jinja's errors and their own
            rendered.append(f"({error})")
    return rendered


def encode_texts(checkpoint: Checkpoint, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize complete inputs, which write their own BOS."""
    ids: list[list[int]] = (
        checkpoint.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
    )
    return ids


def left_padded(
    checkpoint: Checkpoint, rows: Sequence[Sequence[int]]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Make token ids and attention mask of a batch, padded on the left."""
    from workbench.models.batches import pad_ids

    ids, mask = pad_ids(rows, pad_id=pad_id(checkpoint), side="left")
    return ids.to(checkpoint.model.device), mask.long().to(checkpoint.model.device)


def batches(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Cut the rows into batches of like length, so that little is padding; give their places."""
    from workbench.models.batches import batches_by_length

    return batches_by_length([len(row) for row in rows], size, longest_first=False)


def pad_id(checkpoint: Checkpoint) -> int:
    """Choose a token id for padding; any will do, for the mask tells padding from text."""
    tokenizer = checkpoint.tokenizer
    return int(
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )


def _controls(tokenizer: Any, frame: str) -> tuple[str, ...]:
    """List control tokens: those the tokenizer calls special, and added ones the frame uses."""
    added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    controls = {text for text, special in added.items() if special or text in frame}
    long_enough = (text for text in controls if len(text.strip()) > 1)
    return tuple(sorted(long_enough, key=len, reverse=True))


def _key(model: Any, tokenizer: Any) -> str:
    """Hash names, shapes, dtypes and sampled values of the weights, and the chat template."""
    digest = hashlib.sha256(str(getattr(tokenizer, "chat_template", None)).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes()
        digest.update(f"{name}|{tuple(weight.shape)}|{weight.dtype}|".encode() + sample)
    return digest.hexdigest()[:8]
