"""Vectors of other libraries: read with their site, their sign said, and never from a pickle."""

from __future__ import annotations

import json
import math
import pickle

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from workbench.generation.answers import generate
from workbench.generation.decoding import Decoding
from workbench.models.activations import cache_activations
from workbench.models.load import ModelInfo, model_info
from workbench.models.sites import Site
from workbench.prompts.prompt import Prompt
from workbench.steering.apply import intervene
from workbench.steering.foreign_vectors import import_vectors
from workbench.steering.interventions import add_vector
from workbench.steering.vectors import load_vector, save_vector

D, LAYERS = 32, 4
INFO = ModelInfo("made-up", None, LAYERS, D, 64, 4, "float32", "raw", "0123456789abcdef")
POST = [Site(layer, "resid_post") for layer in range(LAYERS)]
PROMPT = Prompt("a", "Tell me about a garden.", None, "fraud", "unsafe", "test")


def row(layer):
    return np.random.default_rng(layer).normal(size=D).astype(np.float32)


def write_gguf(path, rows, architecture="controlvector", quantise=None):
    """Write a control vector as repeng and llama.cpp's generator do."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(rows))
    for name, values in rows.items():
        if quantise is not None:
            values = gguf.quants.quantize(values, quantise)
        writer.add_tensor(name, values, raw_dtype=quantise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path, **options):
    return import_vectors(path, INFO, **{"sign": "unsafe_to_safe", **options})


def write_npz(path):
    np.savez(path.open("wb"), **{f"layer_{layer}": row(layer) for layer in (1, 3)})


WRITERS = {
    "gguf": lambda path: write_gguf(path, {f"direction.{n}": row(n) for n in (1, 3)}),
    "easysteer": lambda path: write_gguf(
        path, {f"direction.{n}": row(n) for n in (1, 3)}, "steervector"
    ),
    "safetensors": lambda path: save_file(
        {f"layer_{n}": torch.from_numpy(row(n)) for n in (1, 3)}, path
    ),
    "hook points": lambda path: save_file(
        {f"blocks.{n}.hook_resid_post": torch.from_numpy(row(n)) for n in (1, 3)}, path
    ),
    "modules": lambda path: save_file(
        {f"model.layers[{n}].output": torch.from_numpy(row(n)) for n in (1, 3)}, path
    ),
    "numbered twice": lambda path: save_file(
        {f"v2.layer_{n}": torch.from_numpy(row(n))[None] for n in (1, 3)}, path
    ),
    "svec": lambda path: path.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "directions": {str(n): row(n).tolist() for n in (1, 3)},
                "explained_variances": {"1": 0.5, "3": 0.5},
            }
        )
    ),
    "npz": write_npz,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_vector_per_layer_comes_back_at_its_layer(name, tmp_path):
    path = tmp_path / "vectors"
    WRITERS[name](path)
    vectors = read(path)
    assert list(vectors) == [POST[1], POST[3]]
    for site, vector in vectors.items():
        assert vector.site == site
        np.testing.assert_allclose(vector.vector, row(site.layer), rtol=1e-6)
        assert vector.model == INFO
        assert vector.method.startswith("imported:")


def test_the_sign_is_said_and_turns_the_vector(tmp_path):
    write_gguf(tmp_path / "v.gguf", {"direction.2": row(2)})
    there = read(tmp_path / "v.gguf")[POST[2]]
    back = read(tmp_path / "v.gguf", sign="safe_to_unsafe")[POST[2]]
    torch.testing.assert_close(back.vector, -there.vector)
    with pytest.raises(TypeError, match="give the file first, then the model; got a ModelInfo"):
        import_vectors(INFO, tmp_path / "v.gguf", sign="unsafe_to_safe")
    with pytest.raises(TypeError, match="sign"):
        import_vectors(tmp_path / "v.gguf", INFO)
    with pytest.raises(ValueError, match="unsafe_to_safe or safe_to_unsafe, got 'positive'"):
        read(tmp_path / "v.gguf", sign="positive")


def test_files_that_count_blocks_from_one_are_told_so(tmp_path):
    write_gguf(tmp_path / "v.gguf", {f"direction.{n + 1}": row(n) for n in range(LAYERS)})
    vectors = read(tmp_path / "v.gguf", first_layer=1)
    assert list(vectors) == POST
    np.testing.assert_array_equal(vectors[POST[0]].vector, row(0))
    with pytest.raises(ValueError, match=r"'direction\.4' is layer 4 counted from 0.*4 layers"):
        read(tmp_path / "v.gguf")


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0])
def test_rounded_control_vectors_are_read_to_their_rounding(kind, tmp_path):
    write_gguf(tmp_path / "v.gguf", {"direction.2": row(2)}, quantise=kind)
    np.testing.assert_allclose(read(tmp_path / "v.gguf")[POST[2]].vector, row(2), atol=0.02)


def test_one_vector_without_a_layer_needs_a_site(tmp_path):
    site = Site(2, "resid_pre")
    np.save(tmp_path / "v.npy", row(2))
    save_file({"direction": torch.from_numpy(row(2)).bfloat16()}, tmp_path / "v.safetensors")
    for name, precision in (("v.npy", 0), ("v.safetensors", 0.02)):
        vector = read(tmp_path / name, site=site)[site]
        np.testing.assert_allclose(vector.vector, row(2), atol=precision)
        with pytest.raises(ValueError, match=r"does not say the layer of .*pass site=Site"):
            read(tmp_path / name)


def test_an_array_with_a_row_per_block_has_the_blocks_in_order(tmp_path):
    np.save(tmp_path / "v.npy", np.stack([row(n) for n in range(LAYERS)]))
    vectors = read(tmp_path / "v.npy", kind="mlp_out")
    assert list(vectors) == [Site(layer, "mlp_out") for layer in range(LAYERS)]
    np.testing.assert_array_equal(vectors[Site(3, "mlp_out")].vector, row(3))
    one = read(tmp_path / "v.npy", site=POST[1])
    assert list(one) == [POST[1]]


def test_the_name_of_a_hook_point_gives_the_kind(tmp_path):
    save_file({"blocks.1.hook_resid_pre": torch.ones(D)}, tmp_path / "v")
    assert list(read(tmp_path / "v")) == [Site(1, "resid_pre")]
    with pytest.raises(ValueError, match="is at 'resid_pre', got kind='resid_post'"):
        read(tmp_path / "v", kind="resid_post")
    with pytest.raises(ValueError, match=r"no vector at L1\.resid_post; it has: L1\.resid_pre"):
        read(tmp_path / "v", site=POST[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer_1": np.ones(D + 1)}, r"has shape \(33,\), but 'made-up' has width 32"),
        ({"layer_9": np.ones(D)}, "is layer 9 counted from 0, but 'made-up' has 4 layers"),
        ({"layer_1": np.full(D, np.nan)}, "no finite numbers"),
        ({"layer_1": np.ones(D), "block 1": np.ones(D)}, "two vectors for L1.resid_post"),
        ({"a": np.ones(D), "b": np.ones(D)}, "does not say the layer of 'a'"),
        ({"layer_1": np.array("text")}, "cannot be read as npz"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(content, message, tmp_path):
    np.savez(tmp_path / "v.npz", **content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "v.npz")
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was read",))


def test_pickles_are_refused_with_the_line_that_converts_them(tmp_path):
    torch.save(torch.ones(D), tmp_path / "new.pt")
    torch.save(torch.ones(D), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    for name in ("new.pt", "old.pt", "bare.pkl"):
        for reader in (read, load_vector):
            with pytest.raises(ValueError, match=r"a pickle.*never read.*weights_only=True"):
                reader(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read as npy"):
        read(tmp_path / "objects.npy")


@pytest.mark.parametrize("name", [*WRITERS])
def test_load_vector_names_the_way_in_and_tells_nobody_to_delete_a_file(name, tmp_path):
    path = tmp_path / "vectors"
    WRITERS[name](path)
    with pytest.raises(ValueError, match=r"wb\.import_vectors") as error:
        load_vector(path)
    assert "delete" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gguf", "safetensors", "svec", "npz"])
def test_files_cut_short_are_refused_in_one_line(name, tmp_path):
    path = tmp_path / "vectors"
    WRITERS[name](path)
    whole = path.read_bytes()
    for length in (0, 5, 30, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="vectors") as error:
            read(path)
        assert "\n" not in str(error.value), length


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"directions": [1, 2]}', "an object from layers to lists is needed"),
        ('{"directions": {"1": "text"}}', "holds no vectors"),
        ('{"layer_1": ["a", "b"]}', "cannot be read as json"),
        ('{"layer_1": [1, 2]', "cannot be read as json"),
        ("layer 1: 0.5", "no vectors that can be read; formats: gguf, safetensors"),
    ],
)
def test_json_that_holds_no_vectors_is_named(text, message, tmp_path):
    (tmp_path / "v.svec").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "v.svec")


def test_a_model_in_gguf_is_told_from_a_control_vector(tmp_path):
    write_gguf(tmp_path / "m.gguf", {"blk.0.attn_q.weight": row(0)}, "llama")
    with pytest.raises(ValueError, match="is it a model"):
        read(tmp_path / "m.gguf")


def test_an_imported_vector_moves_the_model_as_adding_it_by_hand_does(tiny, tmp_path):
    """What llama.cpp does with direction.N: it is added to what block N puts out."""
    write_gguf(tmp_path / "v.gguf", {"direction.1": row(1)})
    vector = import_vectors(tmp_path / "v.gguf", tiny, sign="safe_to_unsafe")[POST[1]]
    assert vector.model == model_info(tiny)
    before = cache_activations(tiny, [PROMPT], POST[1])[POST[1]].values
    with intervene(tiny, [add_vector(vector, multiplier=-2.0)]):
        after = cache_activations(tiny, [PROMPT], POST[1])[POST[1]].values
    torch.testing.assert_close(
        after - before, torch.from_numpy(2 * row(1))[None], atol=1e-4, rtol=0
    )
    assert len(generate(tiny, [PROMPT], [add_vector(vector, 1.0)], Decoding(max_new_tokens=3))) == 1
    save_vector(tmp_path / "own.safetensors", vector)
    torch.testing.assert_close(load_vector(tmp_path / "own.safetensors").vector, vector.vector)


def test_relative_strength_is_known_where_the_residual_stream_is_given(tiny, tmp_path):
    np.save(tmp_path / "v.npy", row(1))
    activations = cache_activations(tiny, [PROMPT], POST[1])
    options = {"sign": "unsafe_to_safe", "site": POST[1]}
    plain = import_vectors(tmp_path / "v.npy", tiny, **options)[POST[1]]
    assert math.isnan(plain.site_norm)
    with pytest.raises(ValueError, match="relative strength"):
        plain.multiplier_for(0.1)
    known = import_vectors(tmp_path / "v.npy", tiny, residual=activations, **options)[POST[1]]
    norm = float(activations[POST[1]].values.norm(dim=1).mean())
    assert known.multiplier_for(0.1) == pytest.approx(0.1 * norm / np.linalg.norm(row(1)))
    with pytest.raises(ValueError, match="residual must hold activations of"):
        import_vectors(tmp_path / "v.npy", tiny, residual={}, **options)


@pytest.mark.parametrize("key", ["layer_-1", "blocks.-1.hook_resid_post", "layer_1.5", "happy_v2"])
def test_a_key_that_counts_no_block_is_not_taken_for_one(key, tmp_path):
    save_file({key: torch.ones(D)}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="does not say the layer"):
        read(tmp_path / "v.safetensors")


def test_a_key_of_a_part_of_the_block_says_no_place_in_the_residual_stream(tmp_path):
    key = "model.layers.1.self_attn.o_proj"
    save_file({key: torch.from_numpy(row(1))}, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="inside the block; pass kind=, one of resid_pre"):
        read(tmp_path / "v.safetensors")
    assert list(read(tmp_path / "v.safetensors", kind="attn_out")) == [Site(1, "attn_out")]


def test_a_vector_that_steers_nothing_is_refused(tmp_path):
    for values, said in ((np.zeros(D), "is zero"), (1j * np.ones(D), "complex numbers")):
        np.save(tmp_path / "v.npy", values)
        with pytest.raises(ValueError, match=said):
            read(tmp_path / "v.npy", site=Site(1, "resid_post"))


def test_counting_from_one_is_said_by_one_and_not_of_a_row_for_each_block(tmp_path):
    np.save(tmp_path / "v.npy", np.stack([row(n) for n in range(LAYERS)]))
    with pytest.raises(ValueError, match="does not say the layer"):
        read(tmp_path / "v.npy", first_layer=1)
    with pytest.raises(ValueError, match="first_layer is 0, or 1"):
        read(tmp_path / "v.npy", first_layer=-1)
