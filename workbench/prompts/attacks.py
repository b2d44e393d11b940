"""Wrap questions as attacks do, and put them behind another turn, to see what a gate still sees.

The templates are in data/attacks.yaml, where each field is explained. A template is for fitting or
held out, so that a gate can be tested on wrappings that it has not seen. Safe questions are wrapped
like risky ones: a gate that opens for the wrapping has learned nothing about risk.
"""

from __future__ import annotations

import base64
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench.files.hints import did_you_mean
from workbench.files.store import data_path
from workbench.prompts.forms import as_prompts
from workbench.prompts.prompt import LABELS, Message, Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.prompts.forms import PromptsLike


Part = Literal["fit", "held_out"]
"""Which templates: those that a gate may be fitted on, or those that it is tested on alone."""


MARK = "+"
"""Stands in an id between that of a question and the name of what was done to it."""


AFTER_EVERYDAY, AFTER_RISKY = "after an everyday question", "after a risky question"
"""Names of the sets of two turns."""


_PLACE = re.compile(r"\{(question|base64|first|second|shots)\}")


@dataclass(frozen=True)
class Template:
    """Hold one way to wrap a question; data/attacks.yaml explains the fields."""

    attack: str
    name: str
    part: Part
    text: str
    n_shots: int = 0
    turns: bool = False


def attack_names() -> tuple[str, ...]:
    """List the kinds of attacks."""
    return tuple(_read()["attacks"])


def attack_templates(attack: str, part: Part) -> tuple[Template, ...]:
    """List the templates of an attack that are for fitting, or those that are held out.

    Raises:
        ValueError: If there is no such attack or part.
    """
    names = attack_names()
    if attack not in names:
        hint = did_you_mean(attack, names)
        raise ValueError(f"unknown attack {attack!r}; attacks: {', '.join(names)}.{hint}")
    if part not in get_args(Part):
        raise ValueError(f"unknown part {part!r} of the templates; parts: fit, held_out.")
    rows = _read()["attacks"][attack][part]
    return tuple(Template(attack=attack, part=part, **row) for row in rows)


def wrap(prompts: PromptsLike, attack: str, *, part: Part = "fit", seed: int = 0) -> list[Prompt]:
    """Wrap each prompt in one of an attack's templates, drawn by its id and the seed.

    A wrapped prompt keeps category, label and pair; earlier turns stay before it. Its id is that of
    the prompt with the attack and the template behind it (``question_id`` gives the first part).

    Args:
        prompts: What to wrap, in any form that ``as_prompts`` reads.
        attack: One of ``attack_names()``.
        part: Which templates.
        seed: Another seed draws other templates and shots.

    Raises:
        ValueError: If there is no such attack or part.
    """
    templates = attack_templates(attack, part)
    wrapped = []
    for prompt in as_prompts(prompts):
        draw = random.Random(f"{seed}|{attack}|{prompt.id}")
        wrapped.append(_wrapped(prompt, draw.choice(templates), draw))
    return wrapped


def wrap_in_turn(prompts: PromptsLike, *, part: Part = "fit", seed: int = 0) -> list[Prompt]:
    """Wrap each prompt in one attack; the attacks take turns in every category and label.

    A risky question and its twin get the same attack, so that the attack does not tell them apart.

    Args:
        prompts: What to wrap, in any form that ``as_prompts`` reads.
        part: Which templates.
        seed: As for ``wrap``; it also says which attack begins.
    """
    names, turn, wrapped = attack_names(), Counter[tuple[str, str]](), []
    attack_of_pair: dict[str, str] = {}
    for prompt in as_prompts(prompts):
        kind = (prompt.category, prompt.label)
        attack = names[(turn[kind] + seed) % len(names)]
        if prompt.pair_id is not None:
            attack = attack_of_pair.setdefault(prompt.pair_id, attack)
        turn[kind] += 1
        wrapped += wrap([prompt], attack, part=part, seed=seed)
    return wrapped


def in_second_turn(prompts: PromptsLike, earlier: PromptsLike, *, seed: int = 0) -> list[Prompt]:
    """Put each prompt behind another question and a short neutral reply to that.

    The label stays that of the last question.

    Args:
        prompts: What is asked last.
        earlier: What is asked before.
        seed: With the prompt's id it draws the earlier question and the reply.

    Raises:
        ValueError: If there is no earlier question.
    """
    prompts, before = as_prompts(prompts), as_prompts(earlier)
    if not before:
        raise ValueError("no earlier questions are given; give at least one.")
    replies, rows = _read()["replies"], []
    for prompt in prompts:
        draw = random.Random(f"{seed}|turns|{prompt.id}")
        first, reply = draw.choice(before), draw.choice(replies)
        turns = (*first.history, Message("user", first.text), Message("assistant", reply))
        new_id = f"{prompt.id}{MARK}after.{first.id}"
        rows.append(replace(prompt, id=new_id, history=(*turns, *prompt.history)))
    return rows


def wrapped_sets(
    prompts: PromptsLike, *, part: Part = "held_out", seed: int = 0
) -> dict[str, list[Prompt]]:
    """Make the sets that a gate is tested on: as they are, under each attack, and in two turns.

    Attacks wrap risky and safe questions, not everyday ones. In two turns a gate reads the last
    one: what is asked in the set "after an everyday question" is risky or safe, what is asked
    "after a risky question" is safe or everyday.

    Args:
        prompts: Prompts of a fold.
        part: Which templates.
        seed: As for ``wrap``.

    Returns:
        Name of the wrapping to its prompts: "none", the attacks by their names, and the two sets of
        two turns, where there are the prompts for them.
    """
    prompts = as_prompts(prompts)
    of = {label: [p for p in prompts if p.label == label] for label in LABELS}
    judged = [*of["unsafe"], *of["safe"]]
    sets = {"none": prompts}
    sets |= {attack: wrap(judged, attack, part=part, seed=seed) for attack in attack_names()}
    if of["neutral"]:
        sets[AFTER_EVERYDAY] = in_second_turn(judged, of["neutral"], seed=seed)
    if of["unsafe"]:
        harmless = [*of["safe"], *of["neutral"]]
        sets[AFTER_RISKY] = in_second_turn(harmless, of["unsafe"], seed=seed)
    return {name: wrapped for name, wrapped in sets.items() if wrapped}


def question_id(prompt: Prompt) -> str:
    """Return the id that a prompt's question had before it was wrapped or put behind another."""
    return prompt.id.partition(MARK)[0]


def _wrapped(prompt: Prompt, template: Template, draw: random.Random) -> Prompt:
    shots = draw.sample(_read()["shots"][template.part], template.n_shots)
    words = prompt.text.split()
    middle = (len(words) + 1) // 2
    values = {
        "question": prompt.text,
        "base64": base64.b64encode(prompt.text.encode("utf-8")).decode("ascii"),
        "first": " ".join(words[:middle]),
        "second": " ".join(words[middle:]),
        "shots": "\n".join(f"Question: {asked}\nAnswer: {answer}" for asked, answer in shots),
    }
    text = _PLACE.sub(lambda match: values[match[1]], template.text)
    return replace(
        prompt,
        id=f"{prompt.id}{MARK}{template.attack}.{template.name}",
        text=text,
        history=(*prompt.history, *(_turns(shots) if template.turns else ())),
    )


def _turns(shots: Sequence[Sequence[str]]) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(role, said) for shot in shots for role, said in zip(roles, shot, strict=True)]


@cache
def _read() -> Any:
    import yaml

    return yaml.safe_load(data_path("attacks.yaml").read_text(encoding="utf-8"))
