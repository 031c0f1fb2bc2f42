"""Mutants of graph passes and of rewriting."""

from mutant import Mutant

P = "runtime/core/passes/"
R = "runtime/core/rewrite/"
T = "tests/passes/"
REWRITE, MEMORY, MERGE = (
    (f"{T}test_rewrite.py",),
    (f"{T}test_memory.py",),
    (f"{T}test_merge_ops.py", f"{T}test_engines.py"),
)
CASES, EDGES, STREAMS, PLACE = (
    (f"{T}test_engine_cases.py",),
    (f"{T}test_engine_edges.py",),
    (f"{T}test_streams.py",),
    (f"{T}test_place.py",),
)

PASSES = (
    Mutant(
        "a pass may fire more often than expected",
        f"{P}rewrite.py",
        "count(config) == self.report.fired",
        "count(config) <= self.report.fired",
        REWRITE,
    ),
    Mutant(
        "a pass may fire less often than expected",
        f"{P}rewrite.py",
        "count(config) == self.report.fired",
        "count(config) >= self.report.fired",
        REWRITE,
    ),
    Mutant(
        "generating accepts too many rewrites",
        "runtime/inspect/expectations.py",
        "or count(config) == one.report.fired:",
        "or count(config) <= one.report.fired:",
        ("tests/codegen/test_cases.py::test_bad[pass_expectation_exceeded]",),
    ),
    Mutant(
        "generating accepts too few rewrites",
        "runtime/inspect/expectations.py",
        "or count(config) == one.report.fired:",
        "or count(config) >= one.report.fired:",
        ("tests/codegen/test_cases.py::test_bad[pass_expectation_missed]",),
    ),
    Mutant(
        "the smallest benefit is first",
        f"{P}rewrite.py",
        "key=lambda rule: -rule.benefit",
        "key=lambda rule: rule.benefit",
        REWRITE,
    ),
    Mutant(
        "a bounded rule fires once more", f"{P}rewrite.py", "fired >= rule.bounded", "fired > rule.bounded", REWRITE
    ),
    Mutant("a limit is not counted", f"{P}rewrite.py", "self.options.limit -= 1", "pass", REWRITE),
    Mutant("a disabled rule fires", f"{P}rewrite.py", "rule.name not in self.disable and", "", REWRITE),
    Mutant(
        "a rule fires without a kernel",
        f"{P}rewrite.py",
        "and call.op.op not in self.kernels]",
        "and False]",
        REWRITE,
    ),
    Mutant(
        "rewriting stops after one round", f"{P}rewrite.py", "for _ in range(MAX_ROUNDS)", "for _ in range(1)", REWRITE
    ),
    Mutant(
        "a value that the caller reads is removed",
        f"{R}replacement.py",
        "(others or ref.name in returned)",
        "others",
        REWRITE,
    ),
    Mutant(
        "a value that others read is removed",
        f"{R}replacement.py",
        "(others or ref.name in returned)",
        "ref.name in returned",
        (*REWRITE, f"{T}test_expect.py"),
    ),
    Mutant(
        "a removed value is read",
        f"{R}replacement.py",
        "if isinstance(ref, TensorRef) and ref.name in gone:",
        "if False:",
        REWRITE,
    ),
    Mutant(
        "a new node waits for itself",
        f"{R}replacement.py",
        '        if node_id in matched:\n            return "an operand',
        '        if False:\n            return "an operand',
        REWRITE,
    ),
    Mutant(
        "a new value has another type",
        f"{R}replacement.py",
        "if name in old and old[name].type != type_:",
        "if False:",
        REWRITE,
    ),
    Mutant(
        "a new node forgets its origins",
        f"{R}replacement.py",
        "(node.origins or (node.node_id,))",
        "(node.node_id,)",
        REWRITE,
    ),
    Mutant("live buffers overlap", f"{P}memory.py", "                interference[i].append(j)\n", "", MEMORY),
    Mutant("a gap is too small", f"{P}memory.py", "if gap >= size and", "if gap >= size // 2 and", MEMORY),
    Mutant("the first gap is taken", f"{P}memory.py", "(best is None or gap < best_gap)", "best is None", MEMORY),
    Mutant(
        "an overlap is not noticed",
        f"{P}memory.py",
        "if buffer.interferes_with(other) and other.size:",
        "if False:",
        MEMORY,
    ),
    Mutant(
        "a returned value may be overwritten", f"{P}lifetimes.py", "    if is_returned:\n", "    if False:\n", MEMORY
    ),
    Mutant(
        "sizes are rounded down",
        f"{P}lifetimes.py",
        "-(-_num_bytes(*type_, sizes) // align) * align",
        "_num_bytes(*type_, sizes) // align * align",
        MEMORY,
    ),
    Mutant(
        "a view has separate memory", f"{P}lifetimes.py", "        if node.is_view:\n", "        if False:\n", MEMORY
    ),
    Mutant(
        "an unused result needs no memory", f"{P}lifetimes.py", "found[ref.name] = [i]", "found[ref.name] = [0]", MEMORY
    ),
    Mutant(
        "dependent nodes are merged",
        f"{P}merge.py",
        "is_independent = not (waits & inside or before & bit)",
        "is_independent = True",
        MERGE + EDGES,
    ),
    Mutant("a merge exceeds its limit", f"{P}merge.py", "and size + _size(node) <= self.limit_bytes", "", MERGE),
    Mutant(
        "groups are mixed",
        f"{P}merge.py",
        'for key in ("group", "ranks", PART)',
        'for key in ("ranks", PART)',
        MERGE + EDGES + CASES,
    ),
    Mutant(
        "a load starts a layer too early",
        f"{P}prefetch.py",
        "(node.layer_id or 0) - self.prefetch_layers - 1",
        "(node.layer_id or 0) - self.prefetch_layers - 2",
        CASES + EDGES,
    ),
    Mutant(
        "the prefetch budget is ignored",
        f"{P}prefetch.py",
        "num_bytes > self.budget_bytes and first < i",
        "False",
        (f"{T}test_engines.py::test_no_more_than_the_budget_is_loaded_and_unused",),
    ),
    Mutant(
        "a cache is read before it is written",
        f"{P}effects.py",
        "            if name in last_write:\n",
        "            if False:\n",
        (f"{T}test_engines.py::test_a_load_follows_the_earlier_store",),
    ),
    Mutant(
        "a node with an effect is dropped",
        f"{P}cleanup.py",
        "if node.op_type.is_comm or not node.outputs:",
        "if not node.outputs:",
        CASES + EDGES,
    ),
    Mutant("a wait is missing", f"{P}events.py", "if p > known[lane_of[p]]:", "if p > known[lane_of[p]] + 1:", STREAMS),
    Mutant("a wait is not minimal", f"{P}events.py", "known = list(map(max, known, done_before[p]))", "pass", STREAMS),
    Mutant(
        "a clock forgets the next of its lane",
        f"{P}clocks.py",
        "            next_in_lane[k] = i\n",
        "",
        MEMORY + STREAMS,
    ),
    Mutant(
        "a micro-batch gets a row more",
        f"{P}micro_batches.py",
        "whole * (part + 1) // parts - whole * part // parts",
        "-(-whole // parts)",
        CASES + EDGES,
    ),
    Mutant(
        "later rows do not wait for stored keys",
        f"{P}micro_batches.py",
        "for part in range(1, self.parts):",
        "for part in range(1, 1):",
        (f"{T}test_place.py::test_a_later_micro_batch_waits_for_the_stores_of_an_earlier_one",),
    ),
    Mutant(
        "a value is sent twice",
        f"{P}relocation.py",
        "if (ref.name, device) not in self._values:",
        "if True:",
        CASES + PLACE,
    ),
)
