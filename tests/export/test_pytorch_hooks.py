"""The file of PyTorch hooks: the plain model's logits are those of workbench's steering."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.exported import IDS, import_file, plain, steered
from helpers.gates import gate
from helpers.hugging_face import plain_model
from helpers.interventions import EDITABLE, steering_vector
from helpers.tiny_models import FAMILIES

from workbench.export.pytorch_hooks import export_pytorch
from workbench.models.load import load_model
from workbench.models.sites import Site
from workbench.steering.interventions import (
    ablate_direction,
    add_vector,
    gated,
    raise_to,
    scale_neurons,
)

SITE = Site(2, "resid_post")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_gives_workbenchs_logits_at_every_kind_of_site(
    family, family_model, family_path, tmp_path
):
    model, hf_model = family_model(family), plain_model(family_path(family))
    unsteered = plain(hf_model)
    for seed, kind in enumerate(EDITABLE):
        change = [add_vector(steering_vector(model, Site(1, kind), seed), 1.5)]
        export_pytorch(tmp_path / f"{kind}.py", change, model)
        expected = steered(model, change)
        assert (expected - unsteered).abs().max() > 0.1
        with import_file(tmp_path / f"{kind}.py").steering(hf_model):
            torch.testing.assert_close(plain(hf_model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain(hf_model), unsteered, rtol=0, atol=0)


def test_sums_norms_targets_and_ablations_are_held(family_model, family_path, tmp_path):
    model, hf_model = family_model("llama3"), plain_model(family_path("llama3"))
    v, w = (steering_vector(model, SITE, seed) for seed in (0, 1))
    changes = {
        "sum": [add_vector(v, 1.0), add_vector(w, -0.5)],
        "norm": [add_vector(v, 3.0, keep_norm=True), add_vector(w, 1.0)],
        "target": [raise_to(v, 4.0)],
        "ablation": ablate_direction(v, sites=[SITE, Site(3, "attn_out")]),
    }
    for name, change in changes.items():
        export_pytorch(tmp_path / f"{name}.py", change, model)
        with import_file(tmp_path / f"{name}.py").steering(hf_model):
            torch.testing.assert_close(
                plain(hf_model), steered(model, change), rtol=1e-4, atol=1e-4
            )


def test_16_bit_models_round_as_workbench_does(family_path, tmp_path):
    model = load_model(family_path("llama3"), dtype="bfloat16", device="cpu", packing="off")
    change = [add_vector(steering_vector(model, SITE), 1.5)]
    export_pytorch(tmp_path / "v.py", change, model)
    hf_model = plain_model(family_path("llama3")).to(torch.bfloat16)
    with import_file(tmp_path / "v.py").steering(hf_model):
        torch.testing.assert_close(plain(hf_model), steered(model, change), rtol=0.02, atol=0.02)


def test_strength_multiplies_and_0_leaves_every_bit(family_model, family_path, tmp_path):
    model, hf_model = family_model("llama3"), plain_model(family_path("llama3"))
    v = steering_vector(model, SITE)
    for name, change in {"add": [add_vector(v, 2.0)], "to": [raise_to(v, 4.0)]}.items():
        export_pytorch(tmp_path / f"{name}.py", change, model)
        hooks = import_file(tmp_path / f"{name}.py")
        unsteered = plain(hf_model)
        with hooks.steering(hf_model, strength=0.0):
            assert torch.equal(plain(hf_model), unsteered)
    with import_file(tmp_path / "add.py").steering(hf_model, strength=-0.5):
        expected = steered(model, [add_vector(v, -1.0)])
        torch.testing.assert_close(plain(hf_model), expected, rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_gives_the_same_tokens(family_model, family_path, tmp_path):
    model, hf_model = family_model("llama3"), plain_model(family_path("llama3"))
    change = [add_vector(steering_vector(model, Site(1, "resid_pre")), 2.0)]
    export_pytorch(tmp_path / "v.py", change, model)
    with import_file(tmp_path / "v.py").steering(hf_model):
        tokens = hf_model.generate(
            torch.tensor([list(IDS)]), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )[0]
    expected = list(IDS)
    for _ in range(6):  # without a cache
        logits = steered(model, change, expected)[-1]
        logits[hf_model.generation_config.eos_token_id] = -torch.inf
        expected.append(int(logits.argmax()))
    assert tokens.tolist() == expected


def test_the_file_imports_nothing_of_workbench(family_model, tmp_path):
    model = family_model("llama3")
    export_pytorch(tmp_path / "v.py", [add_vector(steering_vector(model, SITE), 1.0)], model)
    code = "import v, sys; assert v.PLACES and not any('workbench' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PATH": ""})
    text = (tmp_path / "v.py").read_text()
    assert "import workbench" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_name_cannot_become_code(family_model, tmp_path):
    model = family_model("llama3")
    change = [add_vector(steering_vector(model, SITE), 1.0)]
    name = 'x"""\nraise SystemExit("run")\n#'
    named = [replace(change[0], model=replace(change[0].model, name=name))]
    export_pytorch(tmp_path / "v.py", named, model)
    assert import_file(tmp_path / "v.py").MODEL["name"] == name


def test_another_model_is_told_which_module_it_lacks(family_model, family_path, tmp_path):
    model = family_model("llama3")
    export_pytorch(tmp_path / "v.py", [add_vector(steering_vector(model, SITE), 1.0)], model)
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.2'; it is made for .*llama3"):
        import_file(tmp_path / "v.py").add_hooks(plain_model(family_path("gpt2")))


def test_what_it_cannot_hold_is_refused_with_what_can(family_model, tmp_path):
    model, path = family_model("llama3"), tmp_path / "v.py"
    v = steering_vector(model, SITE)
    behind = gated({"fraud": [add_vector(v, 1.0)]}, gate(model))
    with pytest.raises(ValueError, match=r"cannot hold the gate .* only workbench itself"):
        export_pytorch(path, behind, model)
    with pytest.raises(ValueError, match=r"steers every token.*export it as easysteer"):
        export_pytorch(path, [add_vector(v, 1.0, positions="prompt")], model)
    with pytest.raises(ValueError, match=r"falls \(decay='linear'\)"):
        export_pytorch(path, [add_vector(v, 1.0, until=4, decay="linear")], model)
    neurons = [replace(one, model=v.model) for one in scale_neurons([(1, 2)], 0.0)]
    with pytest.raises(ValueError, match=r"not ScaleNeurons"):
        export_pytorch(path, neurons, model)
    with pytest.raises(ValueError, match=r"rows of a batch"):
        export_pytorch(path, [add_vector(v, 1.0).for_rows([0])], model)
    with pytest.raises(ValueError, match=r"nothing to export"):
        export_pytorch(path, [], model)
    with pytest.raises(ValueError, match=r"got a SteeringVector; a vector becomes one"):
        export_pytorch(path, [v], model)
    with pytest.raises(ValueError, match=r"fitted on"):
        export_pytorch(path, [add_vector(v, 1.0)], family_model("mistral"))
    assert not path.exists()
