"""The package's shape, computed from its imports and syntax trees: `python -m tests.layout`."""

import ast
import collections
import functools
import pathlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "optimize_loss"
GROUND = ("_checks", "_names", "_random", "_version")
CORE = ("ground", "schedules", "_engine", "transforms", "_state", "_step")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension)

Node = TypeVar("Node", bound=Hashable)
Graph = Mapping[Node, set[Node]]


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Return the syntax tree of every module of the package, by name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text()
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def room(module: str) -> str:
    """Return the folder that a module lies in, or its own name in the root."""
    first = module.split(".")[1:2]
    return "ground" if first and first[0] in GROUND else "".join(first) or "__init__"


def imported(module: str) -> Iterator[tuple[str, str]]:
    """Yield the modules of the package that a module imports at its head, with the name taken."""
    for node in trees()[module].body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimize_loss"):
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield (inside, "") if inside in trees() else (node.module or "", alias.name)


def imports() -> dict[str, set[str]]:
    """Return for each module those that it imports."""
    return {module: {other for other, _ in imported(module)} - {module} for module in trees()}


def between_rooms() -> dict[str, set[str]]:
    """Return for each room those that it imports from."""
    graph = collections.defaultdict(set)
    for module, others in imports().items():
        graph[room(module)] |= {room(other) for other in others} - {room(module)}
    return dict(graph)


def reached(graph: Graph[Node], start: Node) -> set[Node]:
    """Return all that can be reached from a node, itself only through a circle."""
    found, open_ = set(), list(graph.get(start, ()))
    while open_:
        node = open_.pop()
        if node not in found:
            found.add(node)
            open_ += graph.get(node, ())
    return found


def circles(graph: Graph[Node]) -> list[Node]:
    """Return the nodes that reach themselves."""
    return [node for node in graph if node in reached(graph, node)]


def depth(graph: Graph[Node]) -> int:
    """Return how many nodes the longest path has; those of a circle count together."""
    behind = {node: reached(graph, node) for node in graph}

    @functools.cache
    def below(node: Node) -> int:
        circle = {x for x in behind[node] if node in behind[x]} | {node}
        others = {x for member in circle for x in graph.get(member, ())} - circle
        return len(circle) + max(map(below, others), default=0)

    return max(map(below, graph))


def upward() -> list[tuple[str, str]]:
    """Return the imports that close a circle between rooms."""
    behind = {r: reached(between_rooms(), r) for r in between_rooms()}
    pairs = [(module, other) for module, others in imports().items() for other in others]
    return [(a, b) for a, b in pairs if room(a) != room(b) and room(a) in behind[room(b)]]


def private() -> list[tuple[str, str]]:
    """Return the imports of a private name, or of a private file of another folder."""
    found = []
    for module in trees():
        for other, name in imported(module):
            *_, inside = other.split(".")
            in_folder = other.count(".") > 1 and inside.startswith("_")
            if room(module) != room(other) and (in_folder or name.startswith("_")):
                found.append((module, f"{other}.{name}"))
    return found


def lines_of_code(module: str) -> int:
    """Return how many lines are neither empty nor of a comment or a docstring."""
    tree = trees()[module]
    path = PACKAGE.parent / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    nodes = [n for n in ast.walk(tree) if isinstance(n, DOCUMENTED) and ast.get_docstring(n)]
    spans = [(n.body[0].lineno, n.body[0].end_lineno or 0) for n in nodes]
    docstrings = {i for first, last in spans for i in range(first, last + 1)}
    lines = enumerate(file.read_text().splitlines(), 1)
    return sum(i not in docstrings and line.strip()[:1] not in ("", "#") for i, line in lines)


def lines_by_room() -> dict[str, int]:
    """Return the lines of code of every room."""
    lines = collections.Counter()
    for module in trees():
        lines[room(module)] += lines_of_code(module)
    return dict(sorted(lines.items(), key=lambda item: -item[1]))


def long_test_files(limit: int) -> list[str]:
    """Return the files of tests that have more lines than this."""
    files = (ROOT / "tests").rglob("*.py")
    long = (path for path in files if len(path.read_text().splitlines()) > limit)
    return [str(path.relative_to(ROOT)) for path in sorted(long)]


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function with its place."""
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}.{node.name}", node


def branches(function: ast.AST) -> int:
    """Return the paths through a function: one, and one more for each decision in it."""
    nodes = list(ast.walk(function))
    decisions = sum(isinstance(node, BRANCHES) for node in nodes)
    conditions = sum(len(node.ifs) for node in nodes if isinstance(node, ast.comprehension))
    words = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + decisions + conditions + words


def branching() -> list[str]:
    """Return the functions of ten branches and more."""
    return [place for place, function in functions() if branches(function) >= 10]


def members(class_name: str) -> tuple[list[str], list[str]]:
    """Return the class attributes and the methods of a class."""
    nodes = (node for tree in trees().values() for node in ast.walk(tree))
    classes = (node for node in nodes if isinstance(node, ast.ClassDef))
    body = next(node for node in classes if node.name == class_name).body
    targets = (node.target for node in body if isinstance(node, ast.AnnAssign))
    flags = [target.id for target in targets if isinstance(target, ast.Name)]
    return flags, [node.name for node in body if isinstance(node, ast.FunctionDef)]


def figures() -> dict[str, int]:
    """Return every figure of the package's shape: less is better."""
    flags, methods = members("Link")
    in_root = [path for path in PACKAGE.iterdir() if path.suffix == ".py"]
    lines = lines_by_room()
    return {
        "files in the root": len(in_root),
        "folders in the root": sum((path / "__init__.py").exists() for path in PACKAGE.iterdir()),
        "files": len(trees()),
        "lines of code": sum(lines.values()),
        "lines of code of the core": sum(lines.get(name, 0) for name in CORE),
        "lines of code of the longest file": max(map(lines_of_code, trees())),
        "import depth by file": depth(imports()),
        "import depth by room": depth(between_rooms()),
        "files in circles": len(circles(imports())),
        "rooms in circles": len(circles(between_rooms())),
        "imports that point up": len(upward()),
        "private imports across rooms": len(private()),
        "functions of ten branches": len(branching()),
        "members of Link": len(flags) + len(methods),
        "flags of Link": len(flags),
    }


def table(recorded: Mapping[str, int], now: Mapping[str, int]) -> str:
    """Return figures beside those that are recorded."""
    rows: Iterable[str] = (f"{name:36}{recorded[name]:>10}{now[name]:>8}" for name in recorded)
    return "\n".join([f"{'':36}{'recorded':>10}{'now':>8}", *rows])


if __name__ == "__main__":
    for name, value in [*figures().items(), *lines_by_room().items()]:
        print(f"{name:36}{value:>8}")
    print(*branching(), sep="\n")
