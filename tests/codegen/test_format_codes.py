"""Parts of a format's value that kernels read packed: they are found where the value has them, and nowhere else."""

from pathlib import Path

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.model.format_codes import codes_of

SPEC = """schema: formats/v1
method: own
summary: A format of a test.
quant_method: own
formats:
  own:
    summary: Super-blocks of 8 blocks of 32 values.
    sizes: {{B: 256}}
    block: {{d: f16, t: f16, s: "u8[B/32]", m: "u8[B/32]", u: "u8[B/32]", q: "u8[B/2]"}}
    unused: []
    value: "{value}"
"""
CODES, SCALES, MINIMA, MORE = "bits(q, 4, B)", "rep(s, 32, B)", "rep(m, 32, B)", "rep(u, 32, B)"


def parts(value: str, folder: Path, memo: LinkMemo) -> list[str] | None:
    used = {name for name in "dtsmuq" if f"({name}," in value or f"{name} *" in value}
    text = SPEC.format(value=value)
    for name, kind in (("t", "f16"), ("m", '"u8[B/32]"'), ("u", '"u8[B/32]"')):
        text = text if name in used else text.replace(f"{name}: {kind}, ", "")
    (folder / "own.yaml").write_text(text)
    [one] = driver.load_and_link([folder], memo=memo).methods["own"].formats
    found = codes_of(one)
    return None if found is None else list(found.parts)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"d * {SCALES} * {CODES}", ["codes", "scales", "factors"]),
        (
            f"d * {SCALES} * {CODES} - t * {MINIMA}",
            ["codes", "scales", "factors", "minima", "minimum_factors"],
        ),
        (f"t * ({SCALES} * {CODES} - d * {MINIMA})", None),  # the minima have a factor more
        (f"d * {SCALES} * {CODES} - t * {MINIMA} - d * {MORE}", None),  # two of them
    ],
)
def test_parts_of_a_value(value: str, expected: list[str] | None, tmp_path: Path, memo: LinkMemo) -> None:
    assert parts(value, tmp_path, memo) == expected
