"""Write the neuron dashboard of one category of a finished run, from its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files.hints import did_you_mean
from workbench.files.store import local_path, name_for_file
from workbench.models.activations import cache_activations
from workbench.models.hooked_model import HookedModel
from workbench.neurons.profiles import profile_neurons, random_neurons
from workbench.neurons.weights import reading_site
from workbench.prompts.prompt import select_prompts
from workbench.report.neuron_dashboard import write_dashboard
from workbench.safesteer.config import config_from
from workbench.safesteer.inputs import folds_of, load_run_model
from workbench.safesteer.recipe import attributed_site
from workbench.safesteer.run_folder import SavedRun, check_model_of, read_run

if TYPE_CHECKING:
    import pandas as pd
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
    """Profile a category's first neurons and write neurons_CATEGORY.html into a run folder.

    As many random neurons of the same layers are profiled beside them, as controls.

    Args:
        folder: A run folder that holds neurons.csv.
        category: One of the run's categories.
        top: How many neurons get a card of their own, by contribution.
        model: The run's model, instead of loading it again.
        progress: Show a progress bar.

    Returns:
        Path of the page.

    Raises:
        ValueError: If the folder is no such run, the category is not in it, or the model is another
            one than the run's.
    """
    run, table = _checked(folder, category, top)
    config = config_from(run.notes["config"])
    model = model if model is not None else load_run_model(config)
    check_model_of(run, model)
    folds = folds_of(config)
    site = attributed_site(model)
    first = table[table["category"] == category].nlargest(top, "contribution")
    targets = [(int(layer), int(neuron)) for layer, neuron in first[["layer", "neuron"]].to_numpy()]
    controls = random_neurons(model, targets, seed=config.seed)
    read_at = {site, *(reading_site(model, layer) for layer, _ in targets)}
    asked_by = config.decoding().asked_by
    prompts = select_prompts(folds.fit, category=category)
    directions = {category: _directions(model, prompts, read_at, asked_by)}
    profiles = profile_neurons(
        model,
        [*targets, *controls],
        [*folds.fit, *folds.tune],
        directions=directions,
        site=site,
        seed=config.seed,
        progress=progress,
        **asked_by,
    )
    path = local_path(folder) / f"neurons_{name_for_file(category)}.html"
    return write_dashboard(
        path, table, profiles[: len(targets)], profiles[len(targets) :], category=category
    )


def _checked(folder: PathLike, category: str, top: int) -> tuple[SavedRun, pd.DataFrame]:
    """Read the run and its table of neurons, or say why it has no such page."""
    run = read_run(folder)
    table = run.tables["neurons"]
    if table is None and (reason := run.notes["left_out"].get("neurons")):
        raise ValueError(f"{str(folder)!r} has no neurons: {reason}")
    if table is None:
        raise ValueError(
            f"{str(folder)!r} has no neurons.csv yet; finish it with 'workbench run --out {folder} "
            "--resume' and the run's settings."
        )
    known = list(dict.fromkeys(table["category"]))
    if category not in known:
        raise ValueError(
            f"no neurons of category {category!r}; the run has {', '.join(known)}."
            f"{did_you_mean(category, known)}"
        )
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}.")
    return run, table


def _directions(
    model: HookedModel, prompts: list, sites: set[Site], asked_by: dict[str, Any]
) -> dict[Site, Float[Tensor, " d_model"]]:
    """Subtract a category's mean over safe prompts from that over unsafe ones, at each site.

    Against neutral prompts the difference would hold style, too.
    """
    acts = cache_activations(model, prompts, sorted(sites), **asked_by)
    return {
        site: (at_site.select(label="unsafe").mean() - at_site.select(label="safe").mean()).float()
        for site, at_site in acts.items()
    }
