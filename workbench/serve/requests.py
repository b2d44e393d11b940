"""Read the bodies of requests: fields, their ranges, and what is not followed.

A field that would change answers and is not followed is refused, never dropped in silence. Fields
that OpenAI's clients send about accounts and billing are let through, and so are settings at the
value at which they change nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from workbench.serve.errors import RequestError

ABOUT_ACCOUNTS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""Fields that say nothing about the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_p": (0,),
}
"""Fields that are not followed, with the values at which they change nothing."""

MOST_STOPS, LONGEST_STOP = 16, 256
"""Stop texts of a request, and characters of one."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SteeringFields(_Body):
    """Say how a request wants to be steered; see ``catalogue.Choice``."""

    vector: str | None = None
    category: str | None = None
    rho: Number | None = None
    scale: Number | None = None
    gate: Annotated[bool, Field(strict=True)] | None = None


class StreamOptions(_Body):
    """Say what a stream holds beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Settings(_Body):
    """Hold the fields that chat and completions share."""

    model: str | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=10)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[Whole, Field(ge=1, le=128)] = 1
    stream: Annotated[bool, Field(strict=True)] = False
    stream_options: StreamOptions | None = None
    steering: SteeringFields | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(_Body):
    """Hold a part of a message; the model reads text alone."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """Hold one turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["text"] = "text"  # some clients write it beside the role

    @property
    def words(self) -> str:
        """What is said."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatRequest(Settings):
    """Hold the body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None


class CompletionRequest(Settings):
    """Hold the body of /v1/completions."""

    prompt: str | list[str] | list[Whole] | list[list[Whole]]
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if is_one else list(given)


def read_chat(body: bytes) -> ChatRequest:
    """Read the body of a chat request.

    Raises:
        RequestError: If it is no such body, or asks for something that is not followed.
    """
    request = _read(body, ChatRequest)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError(
            400, "top_logprobs needs logprobs: true beside it.", param="top_logprobs"
        )
    _check_stream(request, bool(request.logprobs))
    return request


def read_completion(body: bytes) -> CompletionRequest:
    """Read the body of a completion request.

    Raises:
        RequestError: If it is no such body, or asks for something that is not followed.
    """
    request = _read(body, CompletionRequest)
    if not request.prompts or not all(request.prompts):
        raise RequestError(400, "prompt must hold at least a word or a token.", param="prompt")
    _check_stream(request, request.logprobs is not None)
    return request


def _check_stream(request: Settings, has_log_probs: bool) -> None:
    if request.stream and has_log_probs:
        raise RequestError(
            400, "logprobs are not streamed; leave out logprobs or stream.", param="logprobs"
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError(
            400, "stream_options needs stream: true beside it.", param="stream_options"
        )


def _read(body: bytes, kind: type[Any]) -> Any:
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is no JSON: {error!s:.200}.") from error
    if not isinstance(given, dict):
        raise RequestError(400, "the body must be a JSON object.")
    fields = _without_null(given)
    if isinstance(fields.get("messages"), list):  # clients send back messages as they came
        fields["messages"] = [_without_null(message) for message in fields["messages"]]
    for name in ABOUT_ACCOUNTS:
        fields.pop(name, None)
    for name in NEUTRAL.keys() & fields.keys():
        if fields[name] not in NEUTRAL[name]:
            raise RequestError(
                400, f"this server does not follow {name}; leave it out.", param=name
            )
        del fields[name]
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explained(error) from error


def _without_null(value: Any) -> Any:
    """Leave out the fields of an object that say nothing."""
    if not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if inner is not None}


def _explained(error: ValidationError) -> RequestError:
    """Say the first thing that is wrong, without repeating what was given."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:100]
    if first["type"] == "extra_forbidden":
        message = f"unknown field {place!r}; leave it out."
    else:
        message = f"{place}: {first['msg'][:200]}."
    return RequestError(400, message, param=place or None)
