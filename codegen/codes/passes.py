"""Diagnostics of passes."""

from sageLLM.codegen.codes.info import CodeInfo

CODES: dict[str, CodeInfo] = {
    "SAGE301": CodeInfo(
        "unknown stage",
        "The stages of the pipeline are listed in order in specs/passes/stages.yaml.",
    ),
    "SAGE302": CodeInfo(
        "unknown op type",
        "A pass selects nodes by a member of specs/op_types.yaml.",
    ),
    "SAGE303": CodeInfo(
        "no op to derive from",
        "`from_op` must name an op with `fuses`, which is the pattern, and `rule`.",
    ),
    "SAGE304": CodeInfo(
        "op of another pass",
        "The `rule` of an op and the pass that lists it with `from_op` must name each other.",
    ),
    "SAGE305": CodeInfo(
        "invalid line of a rule",
        "A line of `match` or `rewrite` is `values = op(values, attr=name)`: operands are names, attrs are "
        "names or constants.",
    ),
    "SAGE306": CodeInfo(
        "unknown op in a rule",
        "A line of `match` or `rewrite` must call an op of specs/ops.",
    ),
    "SAGE307": CodeInfo(
        "wrong number of values in a rule",
        "A line must name every result of the op, and its operands in order; only optional ones may be omitted.",
    ),
    "SAGE308": CodeInfo(
        "unknown attr in a rule",
        "A line names an attr that the op does not have.",
    ),
    "SAGE309": CodeInfo(
        "duplicate result",
        "The results of a pattern must have distinct names.",
    ),
    "SAGE310": CodeInfo(
        "unbound name in a rewrite",
        "A rewrite may read the inputs of the pattern and the results of earlier lines of the rewrite. The "
        "values that the pattern computes are removed from the graph, so the rewrite must compute them itself "
        "before it reads them.",
    ),
    "SAGE311": CodeInfo(
        "kept value not produced",
        "Consumers of the pattern still read its result and the values under `keep`, so the rewrite must "
        "produce each of them under the same name.",
    ),
    "SAGE312": CodeInfo(
        "disconnected pattern",
        "Matching starts at the last line and follows values: from a value to its producer, or to one of its "
        "consumers. So every line must share a value with lines that are connected to the last one.",
    ),
    "SAGE313": CodeInfo(
        "rule never fires",
        "Another rule that is tried first replaces a part of the pattern wherever it occurs. Rules are tried "
        "in the order of their passes, then by benefit, then as written; nodes are visited in graph order.",
    ),
    "SAGE314": CodeInfo(
        "rewriting may not terminate",
        "Rules that do not shrink the graph produce each other's patterns in a cycle.",
    ),
    "SAGE315": CodeInfo(
        "rule without its pass",
        "The `rule` of an op must name an existing pass that lists the op with `from_op`.",
    ),
    "SAGE316": CodeInfo(
        "unknown model",
        "`expect` must list models of specs/models; `*` applies to all others.",
    ),
    "SAGE317": CodeInfo(
        "invalid count",
        "A formula under `expect` consists of integer config names that all of its models have, integers and + - * //.",
    ),
    "SAGE318": CodeInfo(
        "unknown pass",
        "`after` and `before` must name passes.",
    ),
    "SAGE319": CodeInfo(
        "cycle of passes",
        "`after` and `before` must allow an order of the passes.",
    ),
    "SAGE320": CodeInfo(
        "contradictory types",
        "A value of a rule has another number of dims, or another element type, than in the lines before, so "
        "no graph can match.",
    ),
    "SAGE321": CodeInfo(
        "invalid condition of a rule",
        "A `where` of a rule compares numbers, strings and attrs that the pattern names. The functions of a "
        "value are `bytes(x)`, `size(x, 0)`, `rank(x)` and `dtype(x)`.",
    ),
    "SAGE322": CodeInfo(
        "model counted twice",
        "A model must be in only one of the lists under `expect`; its count is the formula of that list.",
    ),
    "SAGE324": CodeInfo(
        "condition that never holds",
        "A condition under `where` must hold for some sizes, element types and attrs, or the rule never fires.",
    ),
    "SAGE331": CodeInfo(
        "op does not fit the pass",
        "A pass that splits, joins or moves values inserts ops with a fixed signature: concatenation of "
        "rows, split into the first rows and the rest, send, and receive.",
    ),
    "SAGE332": CodeInfo(
        "invalid function of a pass",
        "`function` must be `package.module:function`. Passes of the package name functions of "
        "runtime/core/passes; an overlay may name its own.",
    ),
    "SAGE340": CodeInfo(
        "expectation missed",
        "The rules of a pass fire more or less often in a model's graph than `expect` states, for its tiny "
        "config. The near misses show how far each rule matched and what failed. Fix the rule or the count.",
    ),
}
