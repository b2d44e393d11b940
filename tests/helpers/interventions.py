"""Run a tiny model under interventions, and see what they change."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

from helpers.tiny_models import D_MODEL
from workbench.models.load import model_info
from workbench.steering.apply import intervene
from workbench.steering.vectors import SteeringVector

EDITABLE = ("resid_pre", "resid_post", "attn_out", "mlp_out")


EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def steering_vector(model, site, seed=0, scale=1.0):
    values = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)) * scale
    return SteeringVector(
        site, "fraud", values, "prompt_contrast", "content", 1.0, 3, 3, 20.0, model_info(model)
    )


def padded(lengths, side, width=None, seed=0):
    """Make random tokens with padding on one side, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    tokens = torch.randint(10, 290, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    return tokens, mask


def run(model, interventions, tokens, mask, sites=(), **keywords):
    """Run the model: logits, and the activations at sites after the interventions."""
    seen = {}

    def reader(site):
        def read(activation, hook):
            seen[site] = activation.detach().flatten(2).clone()

        return read

    with (
        torch.no_grad(),
        intervene(model, interventions, **keywords),
        model.hooks(fwd_hooks=[(site.hook_name, reader(site)) for site in sites]),
    ):
        logits = model(tokens, attention_mask=mask)
    return logits, seen


def state(model):
    """Collect everything an intervention could leave behind."""
    return (
        [len(point.fwd_hooks) for point in model.hook_dict.values()],
        len(model.original_model._forward_pre_hooks),
        [len(module._forward_hooks) for module in model.modules()],
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )
