"""Mutants of the parsers and grammars of dialects."""

from mutant import Mutant

D = "runtime/core/dialects/"
PARSER = ("tests/core/test_dialects.py",)

DIALECTS = (
    Mutant("whitespace before content is lost", f"{D}parser.py", "if text := self._space + text:", "if text:", PARSER),
    Mutant(
        "whitespace after a call is content",
        f"{D}parser.py",
        'self._space, self._is_at_start, self._is_after_call = "", False, True',
        'self._space, self._is_at_start, self._is_after_call = "", False, False',
        PARSER,
    ),
    Mutant(
        "a form of the beginning is read anywhere",
        f"{D}parser.py",
        "if form.at_start and not self._is_at_start:",
        "if False:",
        PARSER,
    ),
    Mutant("calls share an index", f"{D}parser.py", "self.num_calls += 1", "pass", PARSER),
    Mutant("the closing mark of calls is content", f"{D}parser.py", "if is_whole and form.close:", "if False:", PARSER),
    Mutant(
        "a call begins with an unknown name",
        f"{D}call_reader.py",
        "if self._form.at_start and self._tools and self._name not in self._tools:",
        "if False:",
        PARSER,
    ),
    Mutant(
        "arguments come twice",
        f"{D}call_reader.py",
        "if held or self.is_announced:",
        "if False:",
        PARSER,
    ),
    Mutant("a call without arguments has none", f"{D}call_reader.py", 'self._emit("{}")', "pass", PARSER),
    Mutant("arguments before the name are lost", f"{D}call_reader.py", 'self._emit("".join(held))', "pass", PARSER),
    Mutant(
        "a number is a text",
        f"{D}literals.py",
        "value = json.loads(text, parse_constant=_refuse)",
        "value = text",
        PARSER,
    ),
    Mutant(
        "a text that looks like a number is one",
        f"{D}literals.py",
        'if types and not _fits(value, types) and "string" in types:',
        "if False:",
        PARSER,
    ),
    Mutant("a negative number is positive", f"{D}literals.py", "return -value", "return value", PARSER),
    Mutant(
        "opened reasoning need not be closed",
        f"{D}grammar.py",
        "return block if self._constraint.in_reasoning else",
        "return f'({block})?' if self._constraint.in_reasoning else",
        ("tests/server/test_tool_calls.py",),
    ),
)
