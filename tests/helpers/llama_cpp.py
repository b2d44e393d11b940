"""Run llama.cpp through its C interface, with a control vector as its own loader places it.

The library is xllamacpp's, whose wheel needs no compiler; the declarations of the interface are
those of llama-cpp-py-sync of the same build.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch


def has_llama_cpp() -> bool:
    return all(
        importlib.util.find_spec(name) is not None for name in ("xllamacpp", "llama_cpp_py_sync")
    )


class LlamaCpp:
    """A model of a GGUF file, on the processor, in float32."""

    def __init__(self, path: Path) -> None:
        import xllamacpp
        from llama_cpp_py_sync._cffi_bindings import get_ffi

        library = next(Path(xllamacpp.__file__).parent.glob("*.so"))
        self.ffi = get_ffi()
        self.lib = self.ffi.dlopen(str(library))
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(
            str(path).encode(), self.lib.llama_model_default_params()
        )
        assert self.model != self.ffi.NULL
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
        settings.type_k = settings.type_v = 0  # float32
        self.context = self.lib.llama_init_from_model(self.model, settings)
        self.n_layers = self.lib.llama_model_n_layer(self.model)
        self.width = self.lib.llama_model_n_embd(self.model)
        vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.n_words = self.lib.llama_vocab_n_tokens(vocabulary)

    def logits(self, ids) -> torch.Tensor:
        """Give the logits at every token, (pos, words)."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert self.lib.llama_decode(self.context, batch) == 0
        rows = [
            np.frombuffer(
                self.ffi.buffer(self.lib.llama_get_logits_ith(self.context, i), 4 * self.n_words),
                dtype=np.float32,
            ).copy()
            for i in range(len(ids))
        ]
        self.lib.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def set_control_vector(self, path: Path | None) -> None:
        """Set a file as ``--control-vector FILE`` does; None takes it off.

        llama.cpp's loader (common_control_vector_load) takes float32 tensors of one axis called
        direction.N, refuses N = 0, and writes each to row N - 1 of what this call is given.
        """
        if path is None:
            none = self.ffi.NULL
            assert self.lib.llama_set_adapter_cvec(self.context, none, 0, self.width, 0, 0) == 0
            return
        from gguf import GGUFReader

        rows = np.zeros((self.n_layers - 1, self.width), dtype=np.float32)
        for tensor in GGUFReader(path).tensors:
            word, _, number = tensor.name.partition(".")
            assert (word, tensor.tensor_type.name, len(tensor.shape)) == ("direction", "F32", 1)
            assert int(number) > 0
            rows[int(number) - 1] = tensor.data
        data = self.ffi.new("float[]", rows.flatten().tolist())
        done = self.lib.llama_set_adapter_cvec(
            self.context, data, rows.size, self.width, 1, self.n_layers
        )
        assert done == 0
