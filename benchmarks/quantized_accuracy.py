"""Perplexity and agreement of quantised copies of a model with the model itself, on texts of this repository.

`python benchmarks/quantized_accuracy.py [MODEL]`; the default is the bundled model, which was trained on Python files.
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.loader.quantize import Scheme, quantize_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("runtime/scheduler/*.py", "runtime/kv/*.py", "runtime/text/*.py")
FORMATS = ("int8", "int4-g16", "int4-g32", "int4-g64")
NUM_TOKENS = 256
SCORES = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)


def scores(model: Path, **options: Any) -> tuple[float, list[int]]:
    """The perplexity of the texts, and the most probable token at each position."""
    llm = LLM(model, **options)
    assert llm.tokenizer is not None
    paths = [path for pattern in TEXTS for path in sorted(ROOT.glob(pattern))]
    prompts = [llm.tokenizer.encode(path.read_text(encoding="utf-8"))[:NUM_TOKENS] for path in paths]
    prompts = [prompt for prompt in prompts if len(prompt) == NUM_TOKENS]
    total, count, best = 0.0, 0, []
    for prompt, output in zip(prompts, llm.generate(prompts, SCORES), strict=True):
        for token, step in zip(prompt[1:], (output.prompt_logprobs or [])[1:], strict=True):
            assert step is not None
            total, count = total - step[token].logprob, count + 1
            best.append(max(step, key=lambda one: step[one].logprob))
    return math.exp(total / count), best


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "tiny_python_model"
    perplexity, best = scores(model)
    print(f"as stored: perplexity {perplexity:.3f} over {len(best)} tokens")
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMATS:
            quantize_checkpoint(model, Path(folder, form), Scheme.parse(form))
            found, own = scores(Path(folder, form))
            equal = sum(a == b for a, b in zip(best, own, strict=True)) / len(best)
            print(f"{form}: perplexity {found:.3f}, {100 * equal:.1f} % of the most probable tokens are equal")


if __name__ == "__main__":
    main()
