"""Perplexity and agreement of forms of the KV cache with one in the element type, on a text in `benchmarks/texts`.

`python benchmarks/kv_accuracy.py [MODEL]`; the default is the bundled model, which was trained on Python files.

The rows "static" have one scale for the keys and one for the values of a layer, as calibrated checkpoints store them
(`k_scale`, `v_scale`): here the largest magnitude in the text itself, so that nothing is clipped. Only this program can
use such scales; those of the cache are found for each token and head when it is stored.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from quantized_accuracy import ROOT, scores
from torch import Tensor

from sageLLM.generated.kernels import reference
from sageLLM.generated.kernels.reference import kv_forms
from sageLLM.runtime.core.model.kv_form import KV_FORMS


class StaticScales:
    """The scale of each cache, in the order of the layers: the largest stored magnitude over the largest code."""

    def __init__(self) -> None:
        self._largest: dict[int, float] = {}
        self._numbers: dict[int, int] = {}  # of caches, by their addresses
        self.are_known = False

    def use(self) -> None:
        """From now on the scales are used, by another engine."""
        self._numbers, self.are_known = {}, True

    def rows(self, values: Tensor, cache: Tensor) -> Tensor:
        """As `kv_rows`, which finds a scale for each row."""
        key = self._numbers.setdefault(cache.data_ptr(), len(self._numbers))
        if not self.are_known:
            self._largest[key] = max(self._largest.get(key, 0.0), float(values.abs().max()))
            return kv_forms.kv_rows(values, cache)
        limit = kv_forms.LARGEST[cache.dtype]
        scale = torch.full((*values.shape[:-1], 1), self._largest[key] / limit)
        quotient = (values.float() / scale).clamp(-limit, limit)
        codes = quotient.to(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else quotient.round().to(torch.int8)
        return torch.cat((scale.view(cache.dtype), codes.view(cache.dtype)), -1)


@contextmanager
def stored_by(scales: StaticScales) -> Iterator[None]:
    """Lets the reference kernels store rows by these scales."""
    modules = {kernel.__module__ for kernel in reference.KERNELS.values()}
    users = [name for name in modules if hasattr(sys.modules[name], "kv_rows")]
    patches = [patch(f"{name}.kv_rows", scales.rows) for name in users]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "tiny_python_model"
    perplexity, best = scores(model)
    print(f"auto: perplexity {perplexity:.3f} over {len(best)} tokens")

    def report(name: str, found: float, own: list[int]) -> None:
        equal = sum(a == b for a, b in zip(best, own, strict=True)) / len(best)
        print(f"{name}: perplexity {found:.3f}, {100 * equal:.1f} % of the most probable tokens are equal")

    for form in KV_FORMS:
        report(form, *scores(model, kv_cache_dtype=form))
        with stored_by(scales := StaticScales()):
            scores(model, kv_cache_dtype=form, kernels="reference")
            scales.use()
            found = scores(model, kv_cache_dtype=form, kernels="reference")
        report(f"{form}, static", *found)


if __name__ == "__main__":
    main()
