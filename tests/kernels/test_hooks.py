"""Hooks of attention as C++ and as Triton's text, compared with Python over positions, heads and scores."""

import ctypes

import pytest
from native import needs_compiler

from sageLLM.codegen.diagnostics import Sink, Span
from sageLLM.codegen.emit.cpu import hook_text
from sageLLM.codegen.emit.triton import hook_text as triton_text
from sageLLM.codegen.expr.check import Checker
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.syntax import Text, parse_expression
from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.link.hooks import HOOKS
from sageLLM.runtime.kernels.cpu.compiler import compile_library, find_compiler

MASKS = [
    "n // 4 == m // 4",
    "n % 5 != h and n <= m",
    "(m - n) // window < 3",
    "(n - m) % window == 0",
    "max(m - n, n - m) < min(window, h + 2)",
    "abs(m - n) // 2 <= h % 3",
    "-(n // 3) > -m or not (h == 1)",
    "n * n - m * 3 < (window // 2) * 5",
    "min(n, 7) == min(m, 7)",
    "m // 2 == h",
    "true",
    "causal and n ** 2 < 40",
]
SCORES = [
    "score * f32(n // 4)",
    "score + f32(m % 3 - n)",
    "where(n // 2 == m // 2, score, -score)",
    "score * (window // 2) + slope",
    "max(score, f32(h)) / 2",
    "abs(score) ** 2.0",
    "f32(n)",
    "1.5",
    "min(score, 3)",
]
WINDOW, SLOPE, LANES = 3, 0.25, 16


def parsed(kind: str, text: str) -> Expr:
    values = {name: ValueType(element) for name, element in HOOKS[kind].names.items()}
    attrs = {"window": ValueType("int"), "slope": ValueType("float"), "causal": ValueType("truth")}
    sink = Sink()
    located = Text(text, lambda offset, width: Span("hook", 1, offset + 1, width), sink)
    return Checker(located, Scope(values, attrs)).expression(parse_expression(located))


def source() -> str:
    lines = ['#include "sage.h"', "namespace sage {"]
    for kind, texts, result in (("mask_mod", MASKS, "Ints"), ("score_mod", SCORES, "Floats")):
        for number, text in enumerate(texts):
            lines += [
                'extern "C" __attribute__((visibility("default")))',
                f"void {kind}_{number}(float* out, int32_t m, int32_t first, int32_t h) {{",
                f"    const int32_t window = {WINDOW}; const float slope = {SLOPE}f; const bool causal = true;",
                "    (void)window; (void)slope; (void)causal;",
                "    const Ints n = LANE_NUMBERS + first;",
                "    const Floats score = floats(n) - 2.5f; (void)score;",
                f"    const {result} value = {hook_text({}, parsed(kind, text))};",
                f"    const Floats shown = {'value' if result == 'Floats' else 'floats(value & 1)'};",
                "    memcpy(out, &shown, sizeof shown);",
                "}",
            ]
    return "\n".join([*lines, "}"])


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("hooks")
    path, compiler = folder / "hooks.cpp", find_compiler()
    path.write_text(source(), encoding="utf-8")
    assert compiler is not None
    compile_library(path, "f32", compiler, ("-O1",), folder / "hooks.so")
    return ctypes.CDLL(str(folder / "hooks.so"))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [(f"mask_mod_{i}", "mask_mod", t) for i, t in enumerate(MASKS)]
    + [(f"score_mod_{i}", "score_mod", t) for i, t in enumerate(SCORES)],
)
def test_hooks_in_cpp_and_triton_agree_with_python(name: str, kind: str, text: str, hooks: ctypes.CDLL) -> None:
    device = triton_text(parsed(kind, text))
    out = (ctypes.c_float * LANES)()
    for m, first, h in ((0, 0, 0), (5, 0, 1), (9, 4, 2), (3, 100, 4)):
        getattr(hooks, name)(out, m, first, h)
        for lane in range(LANES):
            names = {"m": m, "n": first + lane, "h": h, "score": first + lane - 2.5}
            expected = float(evaluated(text, names))
            assert out[lane] == pytest.approx(expected, rel=1e-6), (text, names)
            assert float(evaluated(device, names)) == pytest.approx(expected, rel=1e-6), (device, names)


def evaluated(text: str, names: dict[str, float]) -> float:
    """The text of a hook in Python, with stand-ins for the functions of the compute language and of Triton."""

    class Language:
        PropagateNan = type("PropagateNan", (), {"ALL": None})
        float32 = float
        where = staticmethod(lambda condition, a, b: a if condition else b)
        maximum = staticmethod(lambda a, b, propagate_nan=None: max(a, b))
        minimum = staticmethod(lambda a, b, propagate_nan=None: min(a, b))
        abs = staticmethod(abs)

    class Device:
        floor_divide = staticmethod(lambda a, b: a // b)
        floor_remainder = staticmethod(lambda a, b: a % b)
        integer_power = staticmethod(pow)
        power = staticmethod(pow)

    known = {
        "window": WINDOW,
        "slope": SLOPE,
        "causal": True,
        "true": True,
        "f32": float,
        "tl": Language,
        "device": Device,
    }
    text = text.replace(".to(tl.float32)", "")
    known |= {"where": Language.where, "max": max, "min": min, "abs": abs}
    for word, operator in ((" & ", " and "), (" | ", " or "), ("~", " not ")):
        text = text.replace(word, operator)
    return eval(text, {"__builtins__": {}}, known | names)
