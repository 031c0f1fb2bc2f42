"""Help lines for functions of other languages: what to write instead in the compute language."""

from collections.abc import Mapping

_TORCH = "write the op as a torch function: `reference: NAME`, in templates/reference/NAME.py.jinja"
_WITHOUT = ("sort", "argsort", "unique", "rand", "randn")
"""Functions that the language does not have."""
REMEDIES: Mapping[str, str] = {
    **dict.fromkeys(_WITHOUT, _TORCH),
    "softmax": "write it out: m = amax(x, H), e = exp(x - m), y = e / sum(e, H), on three lines",
    "log_softmax": "write it out: m = amax(x, H), s = log(sum(exp(x - m), H)), y = x - m - s, on three lines",
    "argmax": "write topk_indices(x, H, 1), with `where: [1 <= H]`",
    "argmin": "write topk_indices(-x, H, 1), with `where: [1 <= H]`",
    "cumulative_sum": "write cumsum(x, H)",
    "top_k": "write topk(x, H, K) and topk_indices(x, H, K)",
    "silu": "write x * sigmoid(x)",
    "gelu": "write 0.5 * x * (1.0 + erf(x * 0.7071067811865476))",
    "softplus": "write log(1.0 + exp(x))",
    "square": "write x * x",
    "pow": "write x ** 2.0",
    "reciprocal": "write 1.0 / x",
    "maximum": "write max(a, b); amax(x, H) reduces a dim",
    "minimum": "write min(a, b); amin(x, H) reduces a dim",
    "clamp": "write min(max(x, low), high)",
    "clip": "write min(max(x, low), high)",
    "matmul": "write dot(x, w, K), with the common dim",
    "mm": "write dot(x, w, K), with the common dim",
    "einsum": "write dot(x, w, K), with the common dim",
    "var": "write it out: d = x - mean(x, H), v = mean(d * d, H), on two lines",
    "std": "write it out: d = x - mean(x, H), s = sqrt(mean(d * d, H)), on two lines",
    "norm": "write sqrt(sum(x * x, H))",
    "index_select": "write gather(table, DIM, index)",
    "take": "write gather(table, DIM, index)",
    "embedding": "write gather(table, DIM, index)",
    "if_else": "write where(condition, a, b)",
    "select": "write where(condition, a, b)",
    "scan": "write cumsum(x, H), cumprod(x, H), cummax(x, H) or cummin(x, H)",
    "float": "write f32(x)",
    "float32": "write f32(x)",
    "int": "write i32(x)",
    "transpose": "declare a view, under `views`",
    "reshape": 'declare a view, under `views`: "x[T, N, D] as [T, N*D]"',
    "view": 'declare a view, under `views`: "x[T, N, D] as [T, N*D]"',
    "split": 'declare views, under `views`: "x[T, 0:I]" and "x[T, I:2*I]"',
    "chunk": 'declare views, under `views`: "x[T, 0:I]" and "x[T, I:2*I]"',
    "concat": 'assign views of the output, under `views`: "y[T, 0:I]" and "y[T, I:2*I]"',
    "cat": 'assign views of the output, under `views`: "y[T, 0:I]" and "y[T, I:2*I]"',
}
