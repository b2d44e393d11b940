"""Write vectors for libraries that hook modules: steering-vectors and lm-eval's steered model.

Both name modules of the transformers model, so that vectors inside a block travel too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from workbench.export.additions import (
    Exported,
    check_flat,
    constant_additions,
    described,
    one_model,
    refuse_conditions,
    strength_notes,
)
from workbench.export.modules import ModulePlace, module_of, template_of
from workbench.files.store import atomic_path, local_path, write_tensors, write_text
from workbench.models.hooked_model import hugging_face_model
from workbench.models.sites import Site
from workbench.steering.edits import AblateDirection
from workbench.steering.interventions import check_interventions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.files.store import PathLike
    from workbench.models.hooked_model import HookedModel
    from workbench.steering.interventions import Intervention


LAYER_TYPES = {"resid_post": "decoder_block", "attn_out": "self_attn", "mlp_out": "mlp"}
"""Kinds of sites to steering-vectors' names of what a layer is."""


_SNIPPET = '''"""Build the objects of the library steering-vectors from a safetensors file.

Written by ``workbench export steering-vectors``. The library's own files are pickles, which can run
code when they are opened, so that the vectors come as numbers and this file builds the objects::

    model = transformers.AutoModelForCausalLM.from_pretrained(...)
    with applied(model):
        model.generate(...)
"""

from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors.torch import load_file
from steering_vectors import SteeringVector

FILE = Path(__file__).with_name({file})
LAYER_CONFIG = {config}
LAYERS = {layers}


def steering_vectors():
    """Build one SteeringVector per type of layer."""
    tensors = load_file(FILE)
    return [
        SteeringVector({{number: tensors[key] for key, number in keys.items()}}, layer_type)
        for layer_type, keys in LAYERS.items()
    ]


@contextmanager
def applied(model, multiplier=1.0):
    """Steer a transformers model inside the block; the strength is in the vectors."""
    with ExitStack() as stack:
        for vector in steering_vectors():
            stack.enter_context(
                vector.apply(model, layer_config=LAYER_CONFIG, multiplier=multiplier)
            )
        yield model
'''


def export_steering_vectors(
    path: PathLike, interventions: Sequence[Intervention], model: HookedModel
) -> Exported:
    """Write vectors for the library steering-vectors: numbers, and a file that builds its objects.

    The library's own file is a pickle, which is not written.

    Args:
        path: The file of numbers, .safetensors; the Python file beside it has its name.
        interventions: Constant additions to every token, at resid_post, resid_pre (which becomes
            the output of the block before), attn_out or mlp_out.
        model: The model they are for; the names of its modules are written down.

    Raises:
        ValueError: If the format cannot hold an intervention, or the name is no .safetensors.
    """
    path = local_path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the numbers are written as .safetensors, got {path.name!r}.")
    additions = constant_additions(interventions, "steering-vectors")
    check_interventions(model, interventions)
    tensors: dict[str, Any] = {}
    config: dict[str, str] = {}
    layers: dict[str, dict[str, int]] = {}
    for given, vector in additions.at.items():
        site = _at_an_output(given)
        layer_type = LAYER_TYPES[site.kind]
        config[layer_type] = template_of(module_of(model, site), site.layer)
        layers.setdefault(layer_type, {})[site.hook_name] = site.layer
        tensors[site.hook_name] = tensors.get(site.hook_name, torch.zeros_like(vector)) + vector
    write_tensors(path, tensors, described(additions))
    snippet = path.with_name(f"{path.stem.replace('-', '_')}.py")
    # JSON of texts and numbers is Python too
    write_text(
        snippet,
        _SNIPPET.format(
            file=json.dumps(path.name),
            config=json.dumps(config, indent=4),
            layers=json.dumps(layers, indent=4),
        ),
    )
    use = f"{snippet.name} builds SteeringVector objects: with {snippet.stem}.applied(model): ..."
    return Exported((path, snippet), (use, *strength_notes(additions)))


def _at_an_output(site: Site) -> Site:
    """Give the site whose module puts out what is steered; a block's input is the last output.

    Raises:
        ValueError: If it is the embedding, or no output of a part of a block.
    """
    if site.kind == "resid_pre" and site.layer > 0:
        return Site(site.layer - 1, "resid_post")
    if site.kind not in LAYER_TYPES:
        raise ValueError(
            f"this format changes what blocks, attention and MLPs put out, not {site}: export it "
            "as pytorch."
        )
    return site


def export_lm_eval(
    path: PathLike, interventions: Sequence[Intervention], model: HookedModel
) -> Exported:
    """Write the steering file of lm-eval's model "steered", a .pt file.

    lm-eval opens .pt files only. This one is written by ``torch.save`` from a dictionary of
    tensors, numbers and texts, and can be read with ``torch.load(..., weights_only=True)``; here no
    pickle is ever read. A twin with the ending .safetensors holds the same vectors for
    ``import_vectors``.

    Args:
        path: The file, .pt.
        interventions: Of every token: constant additions, and ``ablate_direction`` (as "clamp").
        model: The model they are for; the names of its modules are written down.

    Raises:
        ValueError: If the format cannot hold an intervention, or the name does not end in .pt.
    """
    path = local_path(path)
    if path.suffix != ".pt":
        raise ValueError(f"lm-eval reads vectors from .pt files, got {path.name!r}.")
    check_flat(interventions)
    clamps = [one for one in interventions if isinstance(one.edit, AblateDirection)]
    adding = [one for one in interventions if one not in clamps]
    check_interventions(model, interventions)
    hooks: dict[str, dict[str, Any]] = {}
    twin: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if adding:
        additions = constant_additions(adding, "lm-eval")
        notes = strength_notes(additions)
        for given, vector in additions.at.items():
            site = _at_an_output(given)
            twin[site.hook_name] = twin.get(site.hook_name, torch.zeros_like(vector)) + vector
            name = _hookpoint(module_of(model, site), model)
            hooks[name] = _entry("add", twin[site.hook_name], 1.0)
    for one in clamps:
        refuse_conditions(one, "lm-eval", extent_held=False)
        name = _hookpoint(module_of(model, _at_an_output(one.site)), model)
        if name in hooks:
            raise ValueError(f"lm-eval makes one change per module, got two for {name!r}.")
        direction, target = one.edit.direction, one.edit.target  # type: ignore[union-attr]
        hooks[name] = _entry("clamp", direction.detach().float().cpu(), float(target))
    with atomic_path(path) as temporary:
        torch.save(hooks, temporary)
    files, info = [path], one_model(interventions)
    if twin:
        files.append(path.with_suffix(".safetensors"))
        write_tensors(files[-1], twin, {"sign": "from unsafe to safe", "model": info.name})
    use = (
        f"lm_eval --model steered --model_args pretrained=MODEL,steer_path={path.name}; lm-eval "
        "opens it with torch.load(weights_only=False), so give it only files that you wrote."
    )
    return Exported(tuple(files), (use, *notes))


def _hookpoint(place: ModulePlace, model: HookedModel) -> str:
    """Name a module as lm-eval does: below the model without its head ("layers.15.mlp")."""
    prefix = str(getattr(hugging_face_model(model), "base_model_prefix", ""))
    return place.module.removeprefix(f"{prefix}.")


def _entry(action: str, vector: torch.Tensor, coefficient: float) -> dict[str, Any]:
    """Make the entry of one module, with every field that lm-eval knows."""
    return {
        "steering_vector": vector.clone(),
        "steering_coefficient": coefficient,
        "action": action,
        "bias": None,
        "head_index": None,
    }
