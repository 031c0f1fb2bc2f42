"""LangChain: the example of docs/serving.md, which prints two answers and a call.

python with_langchain.py URL
"""

import ast
import contextlib
import io
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
[code] = [one for one in blocks if "langchain_openai" in one]
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    exec(compile(code.replace("http://localhost:8000", sys.argv[1]), str(PAGE), "exec"), {})
text = printed.getvalue()
assert len(text) > 20, text
before, _, arguments = text.rpartition("look_up ")
assert before and ast.literal_eval(arguments).keys() == {"word"}, text
