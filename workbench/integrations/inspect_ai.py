"""Offer a run's steered model as a model of Inspect, so that its evaluations run on it.

In Python it is ``get_model("workbench/RUN_FOLDER")``, on the command line

    inspect eval my_task.py --model workbench/runs/mine -M steering=gated

Samples that Inspect sends at the same time are answered in one batch. Needs
``pip install inspect_ai``. Installing workbench makes the name known (by an entry point of
inspect_ai), and so does importing this module. The module is named like the library it imports;
absolute imports keep the two apart.
"""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        ContentReasoning,
        ContentText,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "inspect_ai is not installed; install it with pip install 'workbench[harness]'."
    ) from error

from workbench.generation.decoding import GREEDY, Decoding
from workbench.integrations._batching import AnswerBatches
from workbench.prompts.prompt import HARMLESS, Message, Prompt, text_key
from workbench.safesteer.config import config_from
from workbench.safesteer.inputs import load_run_model
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import decoding_from, gated_steering_from, steering_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inspect_ai.tool import ToolChoice, ToolInfo

    from workbench.generation.answers import Completion


MAX_NEW_TOKENS = 128
"""Longest answer where neither task nor command line says how long one may be."""

MAX_CONNECTIONS = 32
"""Requests that Inspect sends at a time where nobody says how many: so many share a batch."""

_COUNTED = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop_seqs",
    "num_choices",
    "reasoning_effort",
)
"""Settings of Inspect that say how an answer is made, and that are followed."""

_NOT_ABOUT_ANSWERS = (
    "max_retries",
    "timeout",
    "attempt_timeout",
    "max_connections",
    "adaptive_connections",
    "batch",
    "cache",
    "cache_prompt",
    "system_message",  # Inspect makes a message of it
    "max_tool_output",
    "parallel_tool_calls",
    "internal_tools",
    "reasoning_history",
    "reasoning_summary",
)
"""Settings of Inspect about connections, tools and what it does itself."""


class SteeredModel(ModelAPI):
    """A run's model with its steering.

    It answers greedily unless a temperature is asked for. Where no seed is given, each call at a
    temperature draws anew, so that epochs differ. System prompt and template keywords are the run's
    where a task gives none. Requests of the same settings that come together are answered in one
    batch; in 16 bit that can round an answer otherwise than alone.

    Args:
        model_name: Folder of a run.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's settings; max_tokens, temperature, top_p, top_k, seed, stop_seqs,
            num_choices and reasoning_effort (where the chat template reads it) count, and others
            that would change answers are refused.
        steering: "gated" (the run's gate decides), "off", or a risk category whose vectors are
            always on.
        hooked: A loaded model, instead of loading the run's.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - inspect_ai's own signature
        *,
        steering: str = "gated",
        hooked: Any = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.hooked = (
            hooked
            if hooked is not None
            else load_run_model(config_from(read_run(model_name).notes["config"]))
        )
        if steering == "off":
            self.interventions: Any = []
        else:
            self.interventions = (
                gated_steering_from(model_name)
                if steering == "gated"
                else steering_from(model_name, steering)
            )
        self.steering = steering
        is_run = (Path(model_name) / "run.json").is_file()
        self.decoding = decoding_from(model_name) if is_run else GREEDY
        self._batches = AnswerBatches(self.hooked, self.interventions)

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002 - inspect_ai passes it
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer the user's last turn, behind the turns before it.

        Messages of one role in a row are joined, and so are all system messages.

        Raises:
            ValueError: If the last turn is not the user's, tools are asked for or were called, or
                a setting is one that the model does not follow.
        """
        if tools:
            raise ValueError(
                f"the steered model calls no tools, got {len(tools)}; use a task without them."
            )
        system, turns = turns_of(input)
        decoding = decoding_for(config, self.decoding, system)
        text, history = turns[-1].content, tuple(turns[:-1])
        key = f"sample-{text_key(text, history)}"
        if decoding.temperature and config.seed is None:
            key += f"-{secrets.token_hex(8)}"  # random numbers follow the id
        prompt = Prompt(key, text, None, HARMLESS, "neutral", "inspect", history=history)
        answers = await asyncio.wrap_future(self._batches.ask(prompt, decoding))
        n_out = sum(len(one.tokens) for one in answers.completions)
        return ModelOutput(
            model=self.model_name,
            choices=[_choice(one, self.model_name) for one in answers.completions],
            usage=ModelUsage(
                input_tokens=answers.n_prompt_tokens,
                output_tokens=n_out,
                total_tokens=answers.n_prompt_tokens + n_out,
            ),
        )

    def max_connections(self) -> int:
        """Say how many requests come at a time: as many as share a batch."""
        return MAX_CONNECTIONS


def turns_of(messages: Sequence[ChatMessage]) -> tuple[str | None, list[Message]]:
    """Split Inspect's messages into the system prompt (or None) and the turns behind it.

    Thoughts in earlier answers are left out, and so are answers without words.

    Raises:
        ValueError: If a message is of a tool, or the last one is not the user's.
    """
    system: list[str] = []
    turns: list[Message] = []
    for message in messages:
        if isinstance(message, ChatMessageSystem):
            system.append(message.text)
        elif not isinstance(message, ChatMessageUser | ChatMessageAssistant):
            raise ValueError(
                f"the steered model calls no tools, got a message of role {message.role!r}; use a "
                "task without them."
            )
        elif turns and turns[-1].role == message.role:
            turns[-1] = Message(message.role, f"{turns[-1].content}\n\n{message.text}")
        elif message.text.strip() or message.role == "user":
            turns.append(Message(message.role, message.text))
    if not turns or turns[-1].role != "user":
        raise ValueError(
            "the steered model answers a user turn; the last message must be the user's, got "
            f"{turns[-1].role if turns else 'none'} in {len(messages)} messages."
        )
    return "\n\n".join(filter(str.strip, system)) or None, turns


def decoding_for(config: GenerateConfig, run: Decoding, system_prompt: str | None) -> Decoding:
    """Turn Inspect's settings into those of the decode loop.

    Args:
        config: Inspect's settings.
        run: The run's decoding, for its system prompt and template keywords.
        system_prompt: Of the sample's messages; None takes the run's.

    Raises:
        ValueError: If a setting would change answers and is not followed, or is out of range.
    """
    given = config.model_dump(exclude_none=True)
    for name, value in given.items():
        is_neutral = not value or (name == "best_of" and value == 1)
        if name not in (*_COUNTED, *_NOT_ABOUT_ANSWERS) and not is_neutral:
            raise ValueError(
                f"the steered model does not follow {name}={value!r:.40}; leave it out. It follows "
                f"{', '.join(_COUNTED)}."
            )
    temperature = float(given.get("temperature", 0.0))
    keywords = dict(run.template_keywords)
    if "reasoning_effort" in given:
        keywords["reasoning_effort"] = given["reasoning_effort"]
    return Decoding(
        max_new_tokens=given.get("max_tokens", MAX_NEW_TOKENS),
        temperature=temperature,
        top_p=given.get("top_p", 1.0),
        top_k=given.get("top_k"),
        seed=given.get("seed", 0),
        n_samples=given.get("num_choices", 1),
        stop=tuple(given.get("stop_seqs", ())),
        system_prompt=run.system_prompt if system_prompt is None else system_prompt,
        template_keywords=keywords,
    )


def _choice(completion: Completion, model: str) -> ChatCompletionChoice:
    """Make an answer a choice of Inspect, with its thoughts apart and the reason it stopped."""
    content: Any = completion.text
    if completion.thinking:
        content = [ContentReasoning(reasoning=completion.thinking), ContentText(text=content)]
    return ChatCompletionChoice(
        message=ChatMessageAssistant(content=content, model=model, source="generate"),
        stop_reason="max_tokens" if completion.finish == "length" else "stop",
    )


@modelapi(name="workbench")
def workbench() -> type[ModelAPI]:
    """Return the class that Inspect's registry asks for."""
    return SteeredModel
