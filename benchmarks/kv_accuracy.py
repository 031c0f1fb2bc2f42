"""Perplexity and agreement of forms of the KV cache with one in the element type, on a text in `benchmarks/texts`.

`python benchmarks/kv_accuracy.py [MODEL]`; the default is the bundled model, which was trained on Python files.
"""

import sys
from pathlib import Path

from quantized_accuracy import ROOT, scores

from sageLLM.runtime.core.model.kv_form import KV_FORMS


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "tiny_python_model"
    perplexity, best = scores(model)
    print(f"auto: perplexity {perplexity:.3f} over {len(best)} tokens")
    for form in KV_FORMS:
        found, own = scores(model, kv_cache_dtype=form)
        equal = sum(a == b for a, b in zip(best, own, strict=True)) / len(best)
        print(f"{form}: perplexity {found:.3f}, {100 * equal:.1f} % of the most probable tokens are equal")


if __name__ == "__main__":
    main()
