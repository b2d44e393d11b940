"""Write vectors for programs that add them to the outputs of blocks: llama.cpp, repeng, AISteer360.

All three number blocks from 0 and add ``direction N`` to what block N puts out. llama.cpp's loader
refuses N = 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from workbench.export.additions import Exported, constant_additions, described, strength_notes
from workbench.files.store import atomic_path, local_path, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.files.store import PathLike
    from workbench.steering.interventions import Intervention


GGUF_READERS = {"llama.cpp": 1, "repeng": 0}
"""Readers of GGUF control vectors, with the first block that each takes."""


def export_gguf(
    path: PathLike,
    interventions: Sequence[Intervention],
    *,
    model_type: str = "unknown",
    reader: Literal["llama.cpp", "repeng"] = "llama.cpp",
) -> Exported:
    """Write a control vector of llama.cpp and repeng: float32 tensors ``direction.N``.

    llama.cpp takes it with ``--control-vector FILE``, or ``--control-vector-scaled FILE:1``; repeng
    with ``ControlVector.import_gguf``.

    Args:
        path: The file, .gguf.
        interventions: Constant additions at outputs of blocks, of every token.
        model_type: transformers' name of the architecture, such as "llama"; repeng compares it
            when vectors are added up.
        reader: "llama.cpp" refuses block 0, "repeng" takes it.

    Raises:
        ValueError: If the format cannot hold an intervention.
    """
    import gguf

    if reader not in GGUF_READERS:
        raise ValueError(f"unknown reader {reader!r}; allowed: {', '.join(GGUF_READERS)}.")
    name = f"a GGUF control vector of {reader}"
    additions = constant_additions(interventions, name)
    layers = additions.at_block_outputs(name)
    if min(layers) < GGUF_READERS[reader]:
        raise ValueError(
            "llama.cpp refuses a control vector of block 0 (direction.0): export it as repeng, "
            "svec, easysteer, vllm-lens or pytorch, or steer at a later block."
        )
    path = local_path(path)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(layers))
        for key, text in described(additions).items():
            writer.add_string(f"workbench.{key}", text)
        for layer, vector in layers.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    use = (
        f"llama.cpp: --control-vector {path.name} (any --control-vector-layer-range holds blocks "
        f"{min(layers)} to {max(layers)})."
        if reader == "llama.cpp"
        else f"repeng: wrap these blocks and no others, ControlModel(model, {list(layers)})."
    )
    return Exported((path,), (use, *strength_notes(additions)))


def export_svec(
    path: PathLike, interventions: Sequence[Intervention], *, model_type: str = "unknown"
) -> Exported:
    """Write a vector of AISteer360 (now called steerability) and of activation-steering, .svec.

    Args:
        path: The file, .svec: the readers put that ending behind other names.
        interventions: Constant additions at outputs of blocks, of every token.
        model_type: transformers' name of the architecture, such as "llama".

    Raises:
        ValueError: If the format cannot hold an intervention, or the name does not end in .svec.
    """
    path = local_path(path)
    if path.suffix != ".svec":
        raise ValueError(f"the file is read as .svec, got {path.name!r}; give such a name.")
    additions = constant_additions(interventions, "an .svec vector")
    layers = additions.at_block_outputs("an .svec vector")
    content = {
        "model_type": model_type,
        "directions": {str(layer): vector.tolist() for layer, vector in layers.items()},
        "explained_variances": {},  # activation-steering reads it, and nothing was explained
        "meta": {"location": "layer_output", **described(additions)},
    }
    write_json(path, content)
    use = (
        "AISteer360 and steerability: SteeringVector.load(FILE); steer every token, as workbench "
        "does, with token_scope='all' (CAA's own default is 'after_prompt')"
    )
    several = "" if len(layers) == 1 else "; CAA steers one layer, an Intervention all of them"
    return Exported((path,), (f"{use}{several}.", *strength_notes(additions)))
