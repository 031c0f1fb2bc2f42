"""Facts that all ranks of a model must agree on, compared when they have started."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from sageLLM import __version__, generated
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.loader.digest import weights_digest
from sageLLM.runtime.loader.model import Model


def fingerprint(folder: Path, model: Model, compiler: ModelCompiler) -> dict[str, str]:
    """Versions, the model's config, its layout and weights, and the kernels in use, by name."""
    whole = "\n".join(f"{spec.name} {spec.shape} {spec.tied_to}" for spec in model.layout.weights(model.config))
    return {
        **versions(),
        "config.json": _digest((folder / "config.json").read_bytes()),
        "weights": weights_digest(folder),
        "layout": f"{model.layout.name} {_digest(whole.encode())}",
        "element type": model.short_dtype,
        "KV cache": model.short_dtype if model.kv_form is None else model.kv_form.name,
        "longest sequence": str(model.max_model_len),
        "kernels": compiler.planner.name,
    }


def versions() -> dict[str, str]:
    """Versions of this package, of its generated code, and of PyTorch."""
    manifest = Path(str(generated.__file__)).parent / "MANIFEST.json"
    return {
        "sagellm": __version__,
        "generated code": _digest(manifest.read_bytes()),
        "torch": str(torch.__version__),
    }


def difference(own: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """The facts that differ, in words, or None."""
    names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    return "; ".join(f"{name}: {own.get(name)} and {other.get(name)}" for name in names) or None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
