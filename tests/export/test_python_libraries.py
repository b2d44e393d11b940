"""Files for steering-vectors and lm-eval, read as the definitions of these libraries say.

No library is needed here: their hooks are made by hand.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers.exported import import_file, plain, steered
from helpers.hugging_face import plain_model
from helpers.interventions import steering_vector
from safetensors.torch import load_file

from workbench.export.python_libraries import export_lm_eval, export_steering_vectors
from workbench.models.sites import Site
from workbench.steering.foreign_vectors import import_vectors
from workbench.steering.interventions import ablate_direction, add_vector, raise_to

FAMILIES = ("llama3", "gemma2", "gpt2", "pythia")


def change_of(model):
    return [
        add_vector(steering_vector(model, Site(layer, kind), seed), 1.5)
        for seed, (layer, kind) in enumerate(
            [(1, "resid_post"), (2, "resid_pre"), (2, "attn_out"), (3, "mlp_out")]
        )
    ]


@contextmanager
def hooked(modules, changes):
    """Change the outputs of modules, as both libraries do."""

    def hook_of(change):
        def hook(_module, _inputs, output):
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return hook

    handles = [modules[name].register_forward_hook(hook_of(c)) for name, c in changes.items()]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_evals_file_gives_workbenchs_logits(family, family_model, family_path, tmp_path):
    model, hf_model = family_model(family), plain_model(family_path(family))
    change = change_of(model)
    export_lm_eval(tmp_path / "v.pt", change, model)
    content = torch.load(tmp_path / "v.pt", weights_only=True)  # plain tensors, numbers and texts
    for entry in content.values():
        assert entry["action"] == "add"
        assert (entry["bias"], entry["head_index"]) == (None, None)
    changes = {
        name: lambda acts, e=e: acts + e["steering_vector"] * e["steering_coefficient"]
        for name, e in content.items()
    }
    with hooked(dict(hf_model.base_model.named_modules()), changes):
        torch.testing.assert_close(plain(hf_model), steered(model, change), rtol=1e-4, atol=1e-4)


def test_lm_evals_clamp_is_an_ablation(family_model, family_path, tmp_path):
    model, hf_model = family_model("llama3"), plain_model(family_path("llama3"))
    change = ablate_direction(steering_vector(model, Site(2, "resid_post")), target=1.5)
    export_lm_eval(tmp_path / "v.pt", change, model)
    ((name, entry),) = torch.load(tmp_path / "v.pt", weights_only=True).items()
    assert (name, entry["action"], entry["steering_coefficient"]) == ("layers.2", "clamp", 1.5)
    unit = entry["steering_vector"] / entry["steering_vector"].norm()

    def clamp(acts):
        return acts + unit * (1.5 - (acts * unit).sum(dim=-1, keepdim=True))

    with hooked(dict(hf_model.base_model.named_modules()), {name: clamp}):
        torch.testing.assert_close(plain(hf_model), steered(model, change), rtol=1e-4, atol=1e-4)


def test_the_twin_beside_the_pickle_comes_back(family_model, tmp_path):
    model = family_model("llama3")
    change = change_of(model)
    exported = export_lm_eval(tmp_path / "v.pt", change, model)
    assert [path.name for path in exported.files] == ["v.pt", "v.safetensors"]
    back = import_vectors(tmp_path / "v.safetensors", model, sign="unsafe_to_safe")
    again = [add_vector(vector, 1.0) for vector in back.values()]
    torch.testing.assert_close(steered(model, again), steered(model, change), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"never read"):
        import_vectors(tmp_path / "v.pt", model, sign="unsafe_to_safe")


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_vectors_file_holds_types_of_layers(
    family, family_model, family_path, tmp_path, monkeypatch
):
    model, hf_model = family_model(family), plain_model(family_path(family))
    change = change_of(model)
    export_steering_vectors(tmp_path / "my-v.safetensors", change, model)

    class SteeringVector:  # what the library's class does, by its definition
        def __init__(self, layer_activations, layer_type):
            self.layers, self.kind = layer_activations, layer_type

        @contextmanager
        def apply(self, model, layer_config, multiplier):
            names = {n: layer_config[self.kind].format(num=n) for n in self.layers}
            changes = {
                names[n]: lambda acts, v=v: acts + multiplier * v for n, v in self.layers.items()
            }
            with hooked(dict(model.named_modules()), changes):
                yield

    library = SimpleNamespace(SteeringVector=SteeringVector)
    monkeypatch.setitem(sys.modules, "steering_vectors", library)
    module = import_file(tmp_path / "my_v.py")
    with module.applied(hf_model):
        torch.testing.assert_close(plain(hf_model), steered(model, change), rtol=1e-4, atol=1e-4)
    assert set(module.LAYER_CONFIG) == {"decoder_block", "self_attn", "mlp"}
    assert all("{num}" in name for name in module.LAYER_CONFIG.values())
    assert len(load_file(tmp_path / "my-v.safetensors")) == 3  # resid_pre 2 is resid_post 1


def test_steering_vectors_numbers_come_back(family_model, tmp_path):
    model = family_model("llama3")
    change = change_of(model)
    export_steering_vectors(tmp_path / "v.safetensors", change, model)
    back = import_vectors(tmp_path / "v.safetensors", model, sign="unsafe_to_safe")
    assert list(back) == [Site(1, "resid_post"), Site(2, "attn_out"), Site(3, "mlp_out")]
    again = [add_vector(vector, 1.0) for vector in back.values()]
    torch.testing.assert_close(steered(model, again), steered(model, change), rtol=1e-4, atol=1e-4)


def test_what_they_cannot_hold_is_refused(family_model, tmp_path):
    model = family_model("llama3")
    v = steering_vector(model, Site(1, "resid_post"))
    first = steering_vector(model, Site(0, "resid_pre"))
    for write, path in (
        (export_lm_eval, tmp_path / "v.pt"),
        (export_steering_vectors, tmp_path / "v.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"not L0\.resid_pre: export it as pytorch"):
            write(path, [add_vector(first, 1.0)], model)
        with pytest.raises(ValueError, match=r"\(RaiseTo\) depends on the activation"):
            write(path, [raise_to(v, 1.0)], model)
        with pytest.raises(ValueError, match=r"export it as easysteer"):
            write(path, [add_vector(v, 1.0, positions="generated")], model)
        with pytest.raises(ValueError, match=r"got 'v\.bin'"):
            write(tmp_path / "v.bin", [add_vector(v, 1.0)], model)
        with pytest.raises(ValueError, match=r"fitted on"):
            write(path, [add_vector(v, 1.0)], family_model("mistral"))
        with pytest.raises(ValueError, match=r"nothing to export"):
            write(path, [], model)
    with pytest.raises(ValueError, match=r"one change per module, got two for 'layers\.1'"):
        export_lm_eval(tmp_path / "v.pt", [add_vector(v, 1.0), *ablate_direction(v)], model)
    assert not list(tmp_path.iterdir())
