"""Turn requests into answers that are to be written: tokens, steering, decoding, within limits."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.generation._endings import Endings
from workbench.generation.running import Asked
from workbench.models.thoughts import ThoughtReader
from workbench.models.tokens import DoesNotFit, encode, encode_as_it_is, template_text
from workbench.prompts.prompt import Message, Prompt
from workbench.serve.catalogue import Choice
from workbench.serve.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.generation.decoding import Decoding
    from workbench.models.hooked_model import HookedModel
    from workbench.models.tokens import Encoded
    from workbench.serve.catalogue import Catalogue
    from workbench.serve.requests import ChatRequest, CompletionRequest, Settings, SteeringFields

OFF = "unsteered"
"""Behind a model's name it asks for the model without steering."""


@dataclass(frozen=True)
class Limits:
    """Hold what one client may ask for.

    Attributes:
        max_tokens: Longest answer, in tokens.
        max_prompt_tokens: Longest prompt, in tokens, the template included.
        max_body: Bytes of a request's body.
        max_answers: Answers of one request: prompts times n.
        max_in_flight: Answers that are written or wait, of all requests together.
        body_timeout_s: Seconds in which a body has to arrive.
    """

    max_tokens: int = 1024
    max_prompt_tokens: int = 4096
    max_body: int = 2**20
    max_answers: int = 64
    max_in_flight: int = 256
    body_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}.")


class Preparer:
    """Prepare the requests of one run's model.

    Args:
        model: The model.
        name: What the model is called.
        catalogue: What may be steered with; ``reload`` puts another one in its place.
        decoding: The run's, whose settings hold where a request says nothing.
        limits: What one client may ask for.
    """

    def __init__(
        self,
        model: HookedModel,
        name: str,
        catalogue: Catalogue,
        decoding: Decoding,
        limits: Limits,
    ) -> None:
        self.model, self.name, self.catalogue = model, name, catalogue
        self.decoding, self.limits = decoding, limits
        _, after = template_text(model, **decoding.asked_by)
        self._thoughts = ThoughtReader.of(model, after)
        self._no_thoughts = replace(self._thoughts, marks=None)

    @property
    def names(self) -> list[str]:
        """Every name under which the model may be asked."""
        by_category = [f"{self.name}:{category}" for category in self.catalogue.categories]
        return [self.name, f"{self.name}:{OFF}", *by_category]

    def chat(self, request: ChatRequest) -> list[Asked]:
        """Prepare a conversation.

        Raises:
            RequestError: If it does not end with the user, does not fit, or names what is unknown.
        """
        *before, last = request.messages
        if last.role != "user":
            raise RequestError(
                400,
                "the last message must be the user's; leave out what follows.",
                param="messages",
            )
        max_tokens = request.max_completion_tokens or request.max_tokens
        decoding = self._decoding(request, max_tokens)
        if any(turn.role in ("system", "developer") for turn in before):
            decoding = replace(decoding, system_prompt=None)
        try:
            roles = {"developer": "system"}
            turns = [Message(roles.get(turn.role, turn.role), turn.words) for turn in before]
            prompt = Prompt(text=last.words, history=tuple(turns))
            (encoded,) = encode(
                self.model, [prompt], max_new_tokens=decoding.max_new_tokens, **decoding.asked_by
            )
        except DoesNotFit as error:
            raise RequestError(
                400, _without_id(error), param="messages", code="context_length_exceeded"
            ) from error
        except ValueError as error:
            raise RequestError(400, _without_id(error), param="messages") from error
        n_likely = (request.top_logprobs or 0) if request.logprobs else None
        return self._asked(request, [encoded], decoding, n_likely, self._thoughts)

    def completion(self, request: CompletionRequest) -> list[Asked]:
        """Prepare texts that the model goes on from, with no template around them.

        Raises:
            RequestError: If one does not fit, or the request names what is unknown.
        """
        decoding = self._decoding(request, request.max_tokens)
        if len(request.prompts) * request.n > self.limits.max_answers:
            raise self._too_many()
        try:
            encoded = [
                encode_as_it_is(self.model, given, max_new_tokens=decoding.max_new_tokens)
                for given in request.prompts
            ]
        except DoesNotFit as error:
            raise RequestError(
                400, _without_id(error), param="prompt", code="context_length_exceeded"
            ) from error
        except ValueError as error:
            raise RequestError(400, _without_id(error), param="prompt") from error
        return self._asked(request, encoded, decoding, request.logprobs, self._no_thoughts)

    def _decoding(self, request: Settings, max_tokens: int | None) -> Decoding:
        run, most = self.decoding, self.limits.max_tokens
        if max_tokens is not None and max_tokens > most:
            raise RequestError(
                400, f"max_tokens is at most {most} here, got {max_tokens}.", param="max_tokens"
            )
        temperature = run.temperature if request.temperature is None else request.temperature
        if request.n > 1 and temperature == 0:
            raise RequestError(
                400,
                f"{request.n} answers at temperature 0 are one answer over and over; give a "
                "temperature above 0, or n=1.",
                param="n",
            )
        top_k = run.top_k if request.top_k is None else request.top_k
        seed = secrets.randbits(62) if request.seed is None else request.seed
        return replace(
            run,
            max_new_tokens=min(run.max_new_tokens, most) if max_tokens is None else max_tokens,
            temperature=temperature,
            top_p=run.top_p if request.top_p is None else request.top_p,
            top_k=top_k if top_k is not None and top_k > 0 else None,
            seed=seed,
            stop=request.stops or run.stop,
            n_samples=request.n,
        )

    def choice(self, name: str | None, fields: SteeringFields | None) -> Choice:
        """Read how a request wants to be steered, from its model's name and its extra field.

        Raises:
            RequestError: If the model is unknown.
        """
        given: dict[str, Any] = fields.model_dump() if fields is not None else {}
        if name is not None and name not in self.names:
            raise RequestError(
                404,
                f"no model {name!r:.100} here; GET /v1/models lists them.",
                param="model",
                code="model_not_found",
            )
        behind = (name or "").removeprefix(self.name).removeprefix(":")
        if behind == OFF:
            given["off"] = True
        elif behind and given.get("category") is None:
            given["category"] = behind
        return Choice(**given)

    def _asked(
        self,
        request: Settings,
        encoded: Sequence[Encoded],
        decoding: Decoding,
        n_likely: int | None,
        thoughts: ThoughtReader,
    ) -> list[Asked]:
        most = self.limits.max_prompt_tokens
        longest = max(len(one.ids) for one in encoded)
        if longest > most:
            raise RequestError(
                400,
                f"a prompt has at most {most} tokens here, template included, got {longest}.",
                code="context_length_exceeded",
            )
        if len(encoded) * request.n > self.limits.max_answers:
            raise self._too_many()
        try:
            choice = self.choice(request.model, request.steering)
            interventions = self.catalogue.interventions(choice)
        except ValueError as error:
            raise RequestError(400, str(error), param="steering") from error
        if not all(one.reaches(decoding.max_new_tokens - 1) for one in interventions):
            raise RequestError(
                400,
                "this steering means generated tokens alone and would reach none of "
                f"{decoding.max_new_tokens}; ask for more tokens.",
                param="max_tokens",
            )
        endings = Endings(self.model, decoding.stop, thoughts)
        return [
            Asked(one, interventions, decoding, endings, sample, n_likely)
            for one in encoded
            for sample in range(request.n)
        ]

    def _too_many(self) -> RequestError:
        most = self.limits.max_answers
        return RequestError(
            400,
            f"a request has at most {most} answers (prompts times n); ask for fewer.",
            param="n",
        )


def _without_id(error: ValueError) -> str:
    """Give an error's line without the id that a prompt has inside."""
    words = str(error)
    if words.startswith("prompt '"):
        words = "the prompt" + words[words.find("'", len("prompt '")) + 1 :]
    return words[:400]
