"""The neurons of a finished run, looked at closely: the dashboard of one category, from its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.files.hints import did_you_mean
from workbench.models.activations import cache_activations
from workbench.models.load import HookedModel, model_info
from workbench.neurons.profiles import profile_neurons, random_neurons
from workbench.neurons.weights import reading_site
from workbench.prompts.prompt import select_prompts
from workbench.report.neuron_dashboard import write_dashboard
from workbench.safesteer.config import config_from
from workbench.safesteer.inputs import folds_of, load_run_model
from workbench.safesteer.recipe import attributed_site
from workbench.safesteer.run_folder import read_run

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from workbench.files.store import PathLike
    from workbench.models.sites import Site


def write_neuron_page(
    folder: PathLike,
    category: str,
    *,
    top: int = 12,
    model: HookedModel | None = None,
    progress: bool = False,
) -> Path:
    """Profile a category's first neurons and as many random ones of the same layers, and write neurons_CATEGORY.html into the run folder.

    Args:
        folder: A run folder that has got to neurons.csv.
        category: One of the run's categories.
        top: Neurons with a card of their own, by contribution.
        model: The run's model, instead of loading it again.
        progress: Show a progress bar.

    Raises:
        ValueError: If the folder is no such run, the category is not in it, or the model is another one than the run's.
    """
    run = read_run(folder)
    table = run.tables["neurons"]
    if table is None:
        raise ValueError(
            f"{str(folder)!r} has no neurons.csv yet; finish it with 'workbench run --resume'."
        )
    known = list(dict.fromkeys(table["category"]))
    if category not in known:
        raise ValueError(
            f"no neurons of category {category!r}; the run has {', '.join(known)}.{did_you_mean(category, known)}"
        )
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}.")
    config = config_from(run.notes["config"])
    model = model if model is not None else load_run_model(config)
    if model_info(model).fingerprint != run.notes["model"]["fingerprint"]:
        raise ValueError(
            f"{str(folder)!r} was made with other weights than {model_info(model).name!r} has; give the run's model."
        )
    folds = folds_of(config)
    site = attributed_site(model)
    own = table[table["category"] == category].nlargest(top, "contribution")
    targets = [(int(layer), int(neuron)) for layer, neuron in own[["layer", "neuron"]].to_numpy()]
    controls = random_neurons(model, targets, seed=config.seed)
    wanted = {site, *(reading_site(model, layer) for layer, _ in targets)}
    directions = {
        category: _directions(model, select_prompts(folds.fit, category=category), wanted)
    }
    profiles = profile_neurons(
        model,
        [*targets, *controls],
        [*folds.fit, *folds.tune],
        directions=directions,
        site=site,
        seed=config.seed,
        progress=progress,
    )
    path = Path(folder) / f"neurons_{category}.html"
    return write_dashboard(
        path, table, profiles[: len(targets)], profiles[len(targets) :], category=category
    )


def _directions(
    model: HookedModel, prompts: list, sites: set[Site]
) -> dict[Site, Float[Tensor, " d_model"]]:
    """Mean unsafe minus mean safe of a category, at each site; against neutral prompts there would be style in it."""
    acts = cache_activations(model, prompts, sorted(sites))
    return {
        site: own.select(label="unsafe").values.mean(dim=0)
        - own.select(label="safe").values.mean(dim=0)
        for site, own in acts.items()
    }
