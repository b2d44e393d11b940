"""Offer a run's steered model as a model of Inspect, so that its evaluations run on it.

In Python it is ``get_model("workbench/RUN_FOLDER")``, on the command line

    inspect eval my_task.py --model workbench/runs/mine -M steering=gated

Needs ``pip install inspect_ai``. Installing workbench makes the name known (by an entry point of
inspect_ai), and so does importing this module. The module is named like the library it imports;
absolute imports keep the two apart.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

try:
    from inspect_ai.model import (
        ChatMessage,
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageUser,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        modelapi,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "inspect_ai is not installed; install it with pip install 'workbench[harness]'."
    ) from error

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.prompts.prompt import HARMLESS, Prompt
from workbench.safesteer.config import config_from
from workbench.safesteer.inputs import load_run_model
from workbench.safesteer.run_folder import read_run
from workbench.safesteer.saved_run import gated_steering_from, steering_from

if TYPE_CHECKING:
    from inspect_ai.tool import ToolChoice, ToolInfo


class SteeredModel(ModelAPI):
    """A run's model with its steering.

    It answers one user turn per sample, and greedily unless a temperature is asked for.

    Args:
        model_name: Folder of a run.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's settings; max_tokens, temperature and seed count.
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
        self._one_at_a_time = threading.Lock()

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002 - inspect_ai passes it
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer the user's turn; several user messages are joined, and so are system messages.

        Raises:
            ValueError: If there is no user turn, tools are asked for, or assistant turns are given.
        """
        if tools:
            raise ValueError(
                f"the steered model calls no tools, got {len(tools)}; use a task without them."
            )
        if any(isinstance(message, ChatMessageAssistant) for message in input):
            raise ValueError(
                "the steered model answers single turns, got assistant turns in the input; "
                "use a task without them."
            )
        questions = [message.text for message in input if isinstance(message, ChatMessageUser)]
        system = "\n\n".join(
            message.text for message in input if isinstance(message, ChatMessageSystem)
        )
        if not questions:
            raise ValueError(
                f"the steered model answers a user turn, got none in {len(input)} messages."
            )
        prompt = Prompt("sample", "\n\n".join(questions), None, HARMLESS, "neutral", "inspect")

        def answer() -> str:
            with self._one_at_a_time:
                (completion,) = generate(
                    self.hooked,
                    [prompt],
                    self.interventions,
                    decoding=Decoding(
                        max_new_tokens=config.max_tokens or 128,
                        temperature=config.temperature or 0.0,
                        seed=config.seed or 0,
                        system_prompt=system or None,
                    ),
                )
            return completion.text

        return ModelOutput.from_content(self.model_name, await asyncio.to_thread(answer))

    def max_connections(self) -> int:
        """Allow one answer at a time, since the model is one object."""
        return 1


@modelapi(name="workbench")
def workbench() -> type[ModelAPI]:
    """Return the class that Inspect's registry asks for."""
    return SteeredModel
