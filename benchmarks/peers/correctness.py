"""Checks the greedy tokens of an engine against float32: each token must be as likely as the best one, but for ties.

The model is random with large weights and an untied head, so that its answer has many distinct tokens: an engine that
computes something else cannot agree by chance. Engines may differ where two logits are nearly equal, so the reference
follows the engine's own answer (teacher forcing) and looks at the gap between the best logit and that of the token.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

NUM_NEW = 40
MIN_DISTINCT = 28


def check_prompt() -> list[int]:
    """The prompt of the check."""
    draw = random.Random(7)
    return [draw.randrange(10, 4000) for _ in range(32)]


def gaps(folder: Path, answers: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """For each answer: distinct tokens, tokens that are the best, and the largest gap in deviations of the logits."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt, found = check_prompt(), {}
    for name, answer in answers.items():
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        gap = (logits.max(1).values - chosen) / logits.std(1)
        found[name] = {
            "distinct": len({*answer}),
            "best": int((gap == 0).sum()),
            "tokens": len(answer),
            "largest_gap": round(float(gap.max()), 4),
        }
    return found


def problem_of(found: dict[str, Any], tie_limit: float) -> str | None:
    """The reason why the engine's row is void, or None."""
    if found["distinct"] < MIN_DISTINCT:
        return f"{found['distinct']} distinct tokens of {found['tokens']}, expected {MIN_DISTINCT}"
    if found["largest_gap"] > tie_limit:
        return f"a token is {found['largest_gap']} deviations below the best, expected at most {tie_limit}"
    return None


if __name__ == "__main__":
    print(json.dumps(gaps(Path(sys.argv[1]), json.loads(sys.argv[2]))))
