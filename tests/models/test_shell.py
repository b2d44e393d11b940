"""A hooked model without weights tells what the loaded one tells, and is no other checkpoint's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from workbench.models.load import load_model, model_info
from workbench.models.shell import digest_of_files, load_shell
from workbench.models.sites import Site, present_sites
from workbench.models.tokens import encode, stop_ids
from workbench.steering.edits import AddVector
from workbench.steering.interventions import Intervention, check_interventions


def test_a_shell_encodes_and_knows_sites_as_the_loaded_model(tiny_path: Path, tiny) -> None:
    shell = load_shell(tiny_path, dtype="float32")
    asked = ["Explain a recipe at home.", "Why?"]
    assert encode(shell, asked) == encode(tiny, asked)
    assert stop_ids(shell) == stop_ids(tiny)
    kinds = ("resid_post", "attn_out", "mlp_post", "z")
    assert present_sites(shell, kinds) == present_sites(tiny, kinds)
    here, there = model_info(tiny), model_info(shell)
    assert (there.name, there.architecture, there.dtype) == (
        here.name,
        here.architecture,
        "float32",
    )
    assert all(parameter.device.type == "meta" for parameter in shell.parameters())


def test_two_checkpoints_of_one_shape_have_two_identities(tiny_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_path, tmp_path / "copy")
    assert digest_of_files(copy, "t") == digest_of_files(tiny_path, "t")
    assert digest_of_files(copy, "t") != digest_of_files(tiny_path, "another template")
    before = model_info(load_shell(copy)).fingerprint
    [weights] = copy.glob("*.safetensors")
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    assert model_info(load_shell(copy)).fingerprint != before


def test_a_vector_of_a_shell_steers_the_loaded_model_by_transfer(tiny_path: Path, tiny) -> None:
    shell = load_shell(tiny_path, dtype="float32")
    edit = AddVector(torch.ones(tiny.cfg.d_model))
    steering = [Intervention(Site(1, "resid_post"), edit, model=model_info(shell))]
    check_interventions(shell, steering)
    with pytest.raises(ValueError, match="transfer=True"):
        check_interventions(tiny, steering)
    check_interventions(tiny, steering, transfer=True)


def test_a_dtype_that_is_not_known_is_one_line(tiny_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown dtype 'int4'; dtypes: float32"):
        load_shell(tiny_path, dtype="int4")
    with pytest.raises(ValueError, match="no model"):
        load_model("")
