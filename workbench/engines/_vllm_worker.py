"""Steer and read requests inside vLLM's workers, each request in its own way.

vLLM mixes ``SteeringWorker`` into its worker (``worker_extension_cls``). A request says in its
sampling parameters which plan it is steered by, and which of its tokens are read. Before a forward
pass the worker looks up which tokens belong to which request, and hooks at the blocks change and
pool the tokens of each. So requests with different vectors share a batch.

This module is imported by the workers and imports nothing of vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from workbench.engines._wire import pack_rows, unpack
from workbench.models.sites import Site
from workbench.steering._site_edits import compiled
from workbench.steering.apply import Steering
from workbench.steering.edits import AddVector, at_least_float32, moved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from jaxtyping import Float
    from torch import Tensor, nn

    from workbench.steering.interventions import Intervention


TAG = "workbench"
"""Name in a request's ``extra_args`` under which it says what is done to it."""

BLOCK_LISTS = ("layers", "h", "blocks")
"""What vLLM's models call their list of blocks."""

ATTENTIONS = ("self_attn", "attn", "attention")
"""What a block calls its attention."""

MLPS = ("mlp", "feed_forward")
"""What a block calls its MLP."""

NORMS_BEHIND = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm")
"""Norms between a sublayer and the residual stream: what the sublayer returns is not added yet."""


class Segment(NamedTuple):
    """Name the tokens of one request in a forward pass.

    Attributes:
        start: First token of the pass that is the request's.
        end: Behind its last one.
        past: Tokens of the request that were computed before.
        n_prompt: Tokens of its prompt.
        tag: What it says of itself: "plan" to be steered by, "row" and "span" to be read.
    """

    start: int
    end: int
    past: int
    n_prompt: int
    tag: dict[str, Any]


@dataclass
class Plan:
    """Hold what one list of interventions does at each site.

    Attributes:
        sums: What is added to every token alike, by site: those go through one product for all
            requests of a pass.
        others: Every other change, as a function of the activation and of where its tokens are.
    """

    sums: dict[Site, Float[Tensor, " d"]] = field(default_factory=dict)
    others: dict[Site, Callable[[Tensor, Steering], Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, interventions: Sequence[Intervention]) -> Plan:
        """Sort interventions by site, and tell the plain additions from the rest."""
        by_site: dict[Site, list[Intervention]] = {}
        for one in interventions:
            by_site.setdefault(one.site, []).append(one)
        plan = cls()
        for site, here in by_site.items():
            if all(_is_plain(one) for one in here):
                plan.sums[site] = torch.stack([_addition(one) for one in here]).sum(dim=0)
            else:
                plan.others[site] = compiled(here)
        return plan


def _is_plain(one: Intervention) -> bool:
    always = one.positions == "all" and one.until is None and one.decay == "none"
    return always and isinstance(one.edit, AddVector) and not one.edit.keep_norm


def _addition(one: Intervention) -> Float[Tensor, " d"]:
    edit: Any = one.edit
    return edit.multiplier * edit.vector.float()


class Passes:
    """Know the requests of the pass under way, and steer and read their tokens."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.plans: dict[str, Plan] = {}
        self.segments: list[Segment] = []
        self.steered: dict[Site, list[Segment]] = {}
        self.read: dict[Site, list[Segment]] = {}
        self.sums: dict[tuple[str, Site], tuple[Tensor, int]] = {}

    def begin(self) -> None:
        """Look up whose tokens the pass that begins holds."""
        self.segments = list(segments_of(self.runner))
        self.steered, self.read = {}, {}
        for segment in self.segments:
            plan = self.plans.get(segment.tag.get("plan", ""))
            for site in () if plan is None else (*plan.sums, *plan.others):
                self.steered.setdefault(site, []).append(segment)
            for site in segment.tag.get("sites", ()):
                self.read.setdefault(Site.parse(site), []).append(segment)

    def wants(self, site: Site) -> bool:
        """Tell whether a request of this pass is steered or read at a site."""
        return site in self.steered or site in self.read

    def at(self, site: Site, activation: Float[Tensor, "token d"]) -> Tensor | None:
        """Steer and read at a site; give the new activation, or None where it stays."""
        steered = self.steered.get(site)
        if steered:
            activation = self._steer(site, activation, steered)
        for segment in self.read.get(site, ()):
            self._pool(site, activation, segment)
        return activation if steered else None

    def _steer(
        self, site: Site, activation: Float[Tensor, "token d"], steered: Sequence[Segment]
    ) -> Float[Tensor, "token d"]:
        activation = activation.clone()
        added = [(s, self.plans[s.tag["plan"]]) for s in steered]
        together = [(s, plan.sums[site]) for s, plan in added if site in plan.sums]
        if together:
            rows = torch.cat([torch.arange(s.start, s.end) for s, _ in together])
            lengths = torch.tensor([s.end - s.start for s, _ in together])
            vectors = torch.stack([vector for _, vector in together]).to(activation.device)
            rows = rows.to(activation.device)
            whose = torch.repeat_interleave(lengths).to(activation.device)
            activation[rows] = moved(activation[rows], vectors[whose], keep_norm=False)
        for segment, plan in added:
            if site in plan.others:
                here = slice(segment.start, segment.end)
                where = Steering(prompt_length=segment.n_prompt)
                where.past, where.new = segment.past, segment.end - segment.start
                activation[here] = plan.others[site](activation[None, here], where)[0]
        return activation

    def _pool(self, site: Site, activation: Float[Tensor, "token d"], segment: Segment) -> None:
        """Add a request's tokens of its span to the sum; a prompt may come in several passes."""
        first, last = segment.tag["span"]
        begin = max(first, segment.past)
        end = min(last, segment.past + segment.end - segment.start)
        key = segment.tag["row"], site
        if segment.past == 0:
            self.sums.pop(key, None)  # what was preempted begins anew
        if end <= begin:
            return
        shift = segment.start - segment.past
        total = at_least_float32(activation[begin + shift : end + shift]).sum(dim=0)
        before, n = self.sums.get(key, (0.0, 0))
        self.sums[key] = (before + total, n + end - begin)


def segments_of(runner: Any) -> Iterable[Segment]:
    """Name the requests of the pass under way, in the order of their tokens.

    Of the runner it uses ``input_batch`` (``req_ids``, ``num_computed_tokens_cpu``),
    ``query_start_loc`` and ``requests``, which are there when the model is called.
    """
    batch = runner.input_batch
    starts = runner.query_start_loc.np
    for place, name in enumerate(batch.req_ids):
        request = runner.requests.get(name)
        parameters = getattr(request, "sampling_params", None)
        tag = ((parameters and parameters.extra_args) or {}).get(TAG)
        if tag:
            yield Segment(
                int(starts[place]),
                int(starts[place + 1]),
                int(batch.num_computed_tokens_cpu[place]),
                int(request.num_prompt_tokens),
                tag,
            )


class SteeringWorker:
    """Give vLLM's worker what the engine calls by ``collective_rpc``."""

    model_runner: Any

    def workbench_install(self) -> list[str]:
        """Set the hooks, once the model is loaded; give the kinds of sites that there are."""
        model = self.model_runner.model
        self.workbench_passes = passes = Passes(self.model_runner)
        model.register_forward_pre_hook(lambda *_: passes.begin())
        blocks = blocks_of(model)
        _hook_input(blocks[0], passes)
        kinds = {"resid_pre", "resid_post"}
        for layer, block in enumerate(blocks):
            _hook_output(block, passes, _residual_sites(layer, len(blocks)))
            if any(hasattr(block, name) for name in NORMS_BEHIND):
                continue
            for kind, names in (("attn_out", ATTENTIONS), ("mlp_out", MLPS)):
                part = next((getattr(block, n) for n in names if hasattr(block, n)), None)
                if part is not None:
                    _hook_output(part, passes, (Site(layer, kind),))
                    kinds.add(kind)
        return sorted(kinds)

    def workbench_plans(self, payload: bytes) -> None:
        """Take the plans that requests to come may name, in the place of those before."""
        self.workbench_passes.plans = {
            key: Plan.of(interventions) for key, interventions in unpack(payload).items()
        }

    def workbench_read(self) -> bytes:
        """Give the means of what was read, and forget them."""
        rows: dict[str, dict[str, Tensor]] = {}
        for (row, site), (total, n) in self.workbench_passes.sums.items():
            rows.setdefault(row, {})[str(site)] = total / n
        self.workbench_passes.sums = {}
        return pack_rows(rows)


def blocks_of(model: nn.Module) -> Any:
    """Find the list of a model's blocks.

    Raises:
        ValueError: If there is none, or part of it lies with another worker.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in BLOCK_LISTS and isinstance(module, torch.nn.ModuleList):
            if any(type(block).__name__ == "PPMissingLayer" for block in module):
                raise ValueError("pipeline parallelism is not supported; use tensor parallelism.")
            return module
    raise ValueError(f"no list of blocks in {type(model).__name__}; engine 'local' can run it.")


def _residual_sites(layer: int, n_layers: int) -> tuple[Site, ...]:
    """Name the output of a block: it is the input of the next one, too."""
    after = (Site(layer + 1, "resid_pre"),) if layer + 1 < n_layers else ()
    return (Site(layer, "resid_post"), *after)


def _hook_output(module: nn.Module, passes: Passes, sites: Sequence[Site]) -> None:
    """Steer and read what a module returns: a tensor, or a tensor and the residual beside it.

    vLLM's blocks return what the MLP adds and the stream before it, which the next norm adds up.
    Where tokens are steered the sum goes into the first and 0 into the second, which is exact; all
    other tokens keep both.
    """

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        for site in sites:
            if not passes.wants(site):
                continue
            parts = output if isinstance(output, tuple) else (output,)
            hidden, residual = parts[0], parts[1] if len(parts) > 1 else None
            whole = hidden if residual is None else hidden + residual
            changed = passes.at(site, whole)
            if changed is None:
                continue
            if residual is not None:
                rows = rows_of(passes.steered[site], hidden.device)
                hidden, residual = hidden.clone(), residual.clone()
                hidden[rows], residual[rows] = changed[rows], 0
                output = (hidden, residual, *parts[2:])
            else:
                output = (changed, *parts[1:]) if isinstance(output, tuple) else changed
        return output

    module.register_forward_hook(hook)


def rows_of(segments: Sequence[Segment], device: Any) -> Tensor:
    """List the tokens of some requests."""
    return torch.cat([torch.arange(s.start, s.end, device=device) for s in segments])


def _hook_input(block: nn.Module, passes: Passes) -> None:
    """Steer and read what the first block is given: the embedding."""
    site = Site(0, "resid_pre")

    def hook(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not passes.wants(site):
            return None
        if "hidden_states" in keywords:
            changed = passes.at(site, keywords["hidden_states"])
            return None if changed is None else (args, {**keywords, "hidden_states": changed})
        place = next(i for i, argument in enumerate(args) if _is_stream(argument))
        changed = passes.at(site, args[place])
        if changed is None:
            return None
        return (*args[:place], changed, *args[place + 1 :]), keywords

    block.register_forward_pre_hook(hook, with_kwargs=True)


def _is_stream(argument: Any) -> bool:
    """Tell activations from the positions of tokens, which are whole numbers."""
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()
