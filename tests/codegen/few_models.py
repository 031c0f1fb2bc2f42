"""Reduces a copy of the specs to a few models, for tests that generate all of it again and again."""

import re
from pathlib import Path

MODELS = (
    "bert",
    "deepseek_v2",
    "deepseek_v3",
    "gemma",
    "gpt2",
    "llama",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
"""Models with those that they extend: so few that they are generated in seconds."""


def keep_models(specs: Path) -> None:
    """Removes all other models, and their names from the expected counts of the passes."""
    dropped = [path for path in (specs / "models").glob("*.yaml") if path.stem not in MODELS]
    for path in dropped:
        path.unlink()
    names = "|".join(path.stem for path in dropped)
    for path in (specs / "passes").glob("*.yaml"):
        text = re.sub(rf"(?<=[\[ ])(?:{names})(?:,\s*|(?=\]))", "", path.read_text(encoding="utf-8"))
        text = re.sub(r",\s*\]", "]", text)
        text = re.sub(r"^ *[^\n:]+:\s*\[\s*\]\n", "", text, flags=re.MULTILINE)
        path.write_text(re.sub(r"[^\s{,]+: \[\],? ?", "", text), encoding="utf-8")
