"""The activations of products with weights of codes, by `LLM(activation_dtype=...)`."""

from pathlib import Path
from typing import Literal, TypeAlias

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.kernels.int8_activations import ACTIVATION_FORMS
from sageLLM.runtime.loader.safetensors_reader import Checkpoint

ActivationDtype: TypeAlias = Literal["auto", "int8"]
ACTIVATION_DTYPES: tuple[str, ...] = ("auto", *ACTIVATION_FORMS)

_REMEDY = "use 'auto', or make a copy with integer weights by `sagellm quantize` or `sagellm convert`"


def choose_activations(name: str, checkpoint: Checkpoint) -> str | None:
    """The type of the codes that activations are rounded to, or None to keep them as they are.

    Raises SageError for a type that does not exist, and for a checkpoint without weights that it applies to.
    """
    if name not in ACTIVATION_DTYPES:
        raise SageError(f"activation_dtype must be one of {', '.join(ACTIVATION_DTYPES)}, got {shown(name)}")
    if name == "auto":
        return None
    if not checkpoint.is_quantized:
        raise SageError(
            f"activation_dtype must be 'auto' for {checkpoint.folder}, got {name!r}: its weights are not quantised, "
            f"and only products with weights of integer codes have activations of 8 bits; {_REMEDY}"
        )
    return name


def check_used(name: str, folder: Path, *, is_used: bool) -> None:
    """Raises SageError for a quantised checkpoint without a weight that the type applies to."""
    if not is_used:
        raise SageError(
            f"activation_dtype must be 'auto' for {folder}, got {name!r}: no weight is kept as integer codes (`sagellm "
            f"run --verbose` prints the reasons); {_REMEDY}"
        )
