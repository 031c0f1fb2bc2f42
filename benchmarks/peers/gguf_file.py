"""Writes a checkpoint of one of the shapes as the GGUF files that llama.cpp reads.

bf16 and f16 are written by `sagellm convert`, in the environment of sageLLM; llama.cpp's own quantiser makes q8_0 and
q4_0 from bf16 in its environment, with its choice for tables.
"""

import ctypes
from pathlib import Path

FLOATS = {"bf16": "bfloat16", "f16": "float16"}
"""The formats of `sagellm convert`."""


def write_floats(folder: Path, form: str) -> None:
    """Writes the file of floats that `form` is or is made of next to the checkpoint, unless it exists."""
    from sageLLM.runtime.convert.convert import convert
    from sageLLM.runtime.registry.plugins import load_registry

    name = form if form in FLOATS else "bf16"
    if not (folder / f"{name}.gguf").exists():
        convert(folder, folder / f"{name}.gguf", load_registry(), FLOATS[name])


def write_form(folder: Path, form: str) -> None:
    """Writes `FORM.gguf` of q8_0 or q4_0 next to `bf16.gguf`, unless it exists."""
    target = folder / f"{form}.gguf"
    if form not in FLOATS and not target.exists():
        partial = target.with_suffix(".partial")
        _quantise(folder / "bf16.gguf", partial, form)
        partial.rename(target)


def _quantise(source: Path, target: Path, form: str) -> None:
    """llama.cpp's quantisation of a file."""
    import gguf
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{form.upper()}"])
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert code == 0, f"llama_model_quantize returned {code}"
