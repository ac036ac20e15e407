"""Pages, docstrings and messages avoid the words that CONTRIBUTING.md lists."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "optimize_loss"
PAGES = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])
MODULES = sorted(PACKAGE.rglob("*.py"))

# each with what to write in its place
AVOID = {
    r"\bleft out\b|\bleaves? out\b": "skipped, excluded, omitted",
    r"\btells?\b|\btold\b": "reports, shows, selects",
    r"\bgo(es)? by\b": "counts, reads, depends on",
    r"\b(stands?|lies?) (before|behind|last)\b": "comes before, comes after, is",
    r"\blinks? behind\b": "later links",
    r"\bfor ever\b|\banew\b|\bmended\b": "forever, again, fixed",
    r"\bof (its|their) own accord\b|\bbe it\b": "automatically, even if",
    r"\bwhole\b(?! number)": "complete, intact, unsharded, an integer",
    r"\bpassed over\b": "skipped",
    r"\bis none of (those|these|them)\b": "is not one of those",
}
WORDS = re.compile("|".join(AVOID), re.IGNORECASE)


def prose(page: str) -> str:
    """Return a page without blocks of code, code in a line, and addresses."""
    page = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", page)


def is_documented(node: ast.AST) -> bool:
    """Return whether a definition is one that readers of the reference see."""
    if isinstance(node, ast.Module):
        return True
    return isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of public definitions."""
    yield ast.get_docstring(tree) or ""
    bodies = [tree.body]
    while bodies:
        for node in filter(is_documented, bodies.pop()):
            assert isinstance(node, ast.ClassDef | ast.FunctionDef)
            yield ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                bodies.append(node.body)


def messages(tree: ast.Module) -> Iterator[str]:
    """Yield the texts of errors and warnings."""
    for node in ast.walk(tree):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if re.search(r"(Error|InvalidType|Mismatch|Corrupt|Version|warn)$", name):
            parts = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
            yield " ".join(x for x in parts if isinstance(x, str))


def found(texts: Iterator[str]) -> list[str]:
    """Return the words to avoid, each with what is around it."""
    texts = (" ".join(text.split()) for text in texts)
    return [
        text[max(0, m.start() - 40) : m.end() + 40] for text in texts for m in WORDS.finditer(text)
    ]


def test_the_words_are_found():
    tree = ast.parse('"""It is left out."""\nraise ValueError(f"`{x}` must stand before `y`.")')
    assert len(found(docstrings(tree))) == 1
    assert len(found(messages(tree))) == 1
    assert not found(iter(["A whole number; the library is outstanding behind a proxy."]))
    assert not found(iter([prose("`told` and ```\nleft out\n```, [a](tells.md)")]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_plain_english(page):
    assert not found(iter([prose(page.read_text())])), AVOID


def test_messages_are_in_plain_english():
    texts = {path: found(messages(ast.parse(path.read_text()))) for path in MODULES}
    assert not {str(path): words for path, words in texts.items() if words}, AVOID


def test_public_docstrings_are_in_plain_english():
    texts = {path: found(docstrings(ast.parse(path.read_text()))) for path in MODULES}
    assert not {str(path): words for path, words in texts.items() if words}, AVOID
