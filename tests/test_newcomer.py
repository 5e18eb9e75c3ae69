"""The "Where is ...?" table of ldm/README.md: every path exists and defines the function that it names."""

import ast
import re

import pytest
from smoke import ROOT

ANSWERS = re.findall(
    r"^\| (Where .*\?) \| `([\w/.]+):(\w+)` \|$", (ROOT / "ldm" / "README.md").read_text(), re.MULTILINE
)


def test_newcomer_question_has_one_answer():
    asked = re.findall(r"^\| Where .*$", (ROOT / "ldm" / "README.md").read_text(), re.MULTILINE)
    assert len(asked) == len(ANSWERS) == len({question for question, _, _ in ANSWERS}) >= 20


@pytest.mark.parametrize(("question", "path", "function"), ANSWERS, ids=[question for question, _, _ in ANSWERS])
def test_newcomer_answer_is_function_of_its_file(question, path, function):
    """The name is that of one function or method only, so that the answer is unambiguous."""
    tree = ast.parse((ROOT / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(functions) == 1, f"{path} defines {len(functions)} functions {function}"
