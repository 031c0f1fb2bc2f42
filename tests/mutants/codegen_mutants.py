"""Mutants of the generator."""

from mutant import Mutant

C = "codegen/"
CASES = "tests/codegen/test_cases.py"
COSTS = (
    "tests/codegen/test_ops.py::test_costs",
    "tests/codegen/test_ops.py::test_a_fused_op_reads_only_what_comes_from_outside",
)
DRIFT = ("tests/codegen/test_writer.py::test_the_drift_check_goes_red",)
EXPR = ("tests/codegen/test_expr.py",)


def bad(*names: str) -> tuple[str, ...]:
    return tuple(f"{CASES}::test_bad[{name}]" for name in names)


def good(*names: str) -> tuple[str, ...]:
    return tuple(f"{CASES}::test_good[{name}]" for name in names)


CODEGEN = (
    Mutant(
        "an omitted operand may be present",
        f"{C}emit/rule_steps.py",
        'self._check(f"{text} is not None", num_found, f"expected {label} without {operand}")',
        "pass",
        good("pass_optional_operands"),
    ),
    Mutant(
        "an operand may be absent",
        f"{C}emit/rule_steps.py",
        "if declared is not None and declared.optional and not may_be_absent:",
        "if False:",
        good("pass_optional_operands"),
    ),
    Mutant(
        "one name matches two values",
        f"{C}emit/rule_steps.py",
        "        if value in self.values:\n            name = ",
        "        if False:\n            name = ",
        good("pass_written_out_rule"),
    ),
    Mutant(
        "a constant attr is not compared",
        f"{C}emit/rule_steps.py",
        "if not isinstance(value, AttrName):",
        "if value is None:",
        good("pass_written_out_rule"),
    ),
    Mutant(
        "an omitted attr may differ from its default",
        f"{C}emit/rule_steps.py",
        "if unnamed.name not in dict(call.attrs) and not unnamed.is_required:",
        "if False:",
        good("pass_written_out_rule"),
    ),
    Mutant(
        "unknown sizes are compared",
        f"{C}emit/rule_steps.py",
        "for value, index in required_sizes(condition.node):",
        "for value, index in ():",
        good("pass_conditions"),
    ),
    Mutant(
        "a condition is not negated",
        f"{C}emit/rule_steps.py",
        "condition_text(negated(condition.node),",
        "condition_text(condition.node,",
        good("pass_conditions"),
    ),
    Mutant(
        "equality is not negated",
        f"{C}emit/rule_conditions.py",
        "return ast.Compare(a, [ast.NotEq()], others)",
        "return ast.Compare(a, [ast.Eq()], others)",
        good("pass_conditions"),
    ),
    Mutant(
        "rules need not end",
        f"{C}link/rule_checks.py",
        "    if not cycle:\n",
        "    if True:\n",
        bad("pass_rules_never_end", "pass_rule_feeds_itself"),
    ),
    Mutant(
        "a bounded rule counts as endless",
        f"{C}link/rule_checks.py",
        "< len(rule.pattern) or rule.bounded is not None:",
        "< len(rule.pattern):",
        good("pass_conditions"),
    ),
    Mutant(
        "a shadowed rule is accepted",
        f"{C}link/rule_checks.py",
        "return _can_take(early, late) and (is_same_site or _takes_part(early, late))",
        "return False",
        bad("pass_shadowed_rule"),
    ),
    Mutant(
        "a rule hidden by its part is accepted",
        f"{C}link/rule_checks.py",
        "not leaves_anchor and any(embed(rule, victim, at) for at in inner)",
        "False",
        bad("pass_rule_hidden_by_its_part"),
    ),
    Mutant(
        "sizes are not normal",
        f"{C}expr/size.py",
        "for monomial, factor in terms.items() if factor}",
        "for monomial, factor in terms.items()}",
        EXPR,
    ),
    Mutant(
        "products are not sorted",
        f"{C}expr/size.py",
        "monomial = tuple(sorted(left + right))",
        "monomial = left + right",
        EXPR,
    ),
    Mutant(
        "a quotient is not exact",
        f"{C}expr/size.py",
        "return _size({monomial: Fraction(factor, divisor) for monomial, factor in self.terms})",
        "return _size({monomial: Fraction(factor // divisor) for monomial, factor in self.terms})",
        EXPR,
    ),
    Mutant(
        "an equation is solved with the wrong sign",
        f"{C}expr/size.py",
        "rest = value - (self - _size(dict(own)))",
        "rest = value + (self - _size(dict(own)))",
        EXPR,
    ),
    Mutant(
        "a formula loses its denominator",
        f"{C}expr/size.py",
        "    if denominator == 1:\n        return text\n",
        "    return text\n",
        EXPR,
    ),
    Mutant(
        "a product costs one operation",
        f"{C}expr/cost.py",
        "return Size.of(2) * volume(dims)",
        "return volume(dims)",
        COSTS,
    ),
    Mutant(
        "an absent input is read",
        f"{C}expr/cost.py",
        'found[name] = size * Size.symbol(f"has_{name}") if name in optional else size',
        "found[name] = size",
        COSTS,
    ),
    Mutant(
        "a view is written",
        f"{C}expr/cost.py",
        "name: ZERO if name in aliases else tensor_bytes(type_)",
        "name: tensor_bytes(type_)",
        COSTS,
    ),
    Mutant(
        "an optional name is unguarded",
        f"{C}expr/check.py",
        "if name in scope.optional and name not in self.present:",
        "if False:",
        bad("op_optional_unguarded", "op_hook_optional_unguarded"),
    ),
    Mutant(
        "integers are divided",
        f"{C}expr/check.py",
        'if op == "/" and not self.scope.is_float(type_.element):',
        "if False:",
        EXPR,
    ),
    Mutant(
        "floats are divided by `//`",
        f"{C}expr/check.py",
        'if op in ("//", "%") and not self.scope.is_integer(type_.element):',
        "if False:",
        EXPR,
    ),
    Mutant("comparisons are chained", f"{C}expr/check.py", "if len(node.ops) > 1:", "if False:", EXPR),
    Mutant(
        "another size fits a dim",
        f"{C}link/operands.py",
        "            if marked == size:\n",
        "            if True:\n",
        bad("model_operand_size"),
    ),
    Mutant(
        "another rank fits",
        f"{C}link/operands.py",
        "        if len(dims) != len(sizes):\n            return str(declared)\n",
        "",
        bad("model_operand_rank"),
    ),
    Mutant(
        "another element type fits",
        f"{C}link/operands.py",
        "return None if declared == actual else declared",
        "return None",
        bad("model_operand_integers"),
    ),
    Mutant(
        "leading dims differ",
        f"{C}link/operands.py",
        "(self.leading is not None and self.leading != sizes[:cut])",
        "False",
        bad("model_leading_dims_differ"),
    ),
    Mutant(
        "a reduction is missing",
        f"{C}link/sharding.py",
        "        if shard.then != required:\n",
        "        if False:\n",
        bad("model_reduction_missing", "model_shard_wrong_dim"),
    ),
    Mutant(
        "a bias is added on every rank",
        f"{C}link/sharding.py",
        "    if weights and problem.added:\n",
        "    if False:\n",
        bad("model_bias_added_on_every_rank"),
    ),
    Mutant(
        "a sharded vocabulary is not gathered",
        f"{C}link/sharding.py",
        'return "all_gather" if shard.kind == "vocab" else None',
        "return None",
        bad("model_reduction_missing") + good("model_own_program"),
    ),
    Mutant(
        "a required input follows an optional one",
        f"{C}link/signature.py",
        "if found and found[-1].optional and not spec.optional:",
        "if False:",
        bad("op_optional_first"),
    ),
    Mutant(
        "a default outside its bounds is accepted",
        f"{C}link/signature.py",
        "(low is not None and value < low) or (high is not None and value > high)",
        "False",
        bad("op_wrong_default"),
    ),
    Mutant(
        "a file of two specs is overwritten",
        f"{C}writer.py",
        "        if len(same) > 1:\n",
        "        if False:\n",
        ("tests/codegen/test_writer.py::test_two_files_of_one_name_are_refused",),
    ),
    Mutant(
        "an edited file is not noticed",
        f"{C}writer.py",
        'lines += [f"differs: {path}" for path, seen in there.items()',
        'lines += [f"differs: {path}" for path, seen in ()',
        DRIFT,
    ),
    Mutant(
        "a missing file is not noticed",
        f"{C}writer.py",
        'lines = [f"missing: {path}" for path in',
        'lines = [f"missing: {path}" for path in () and',
        DRIFT,
    ),
)
