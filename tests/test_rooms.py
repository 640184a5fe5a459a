"""The plan of the rooms holds: imports point one way, nothing goes in a circle, and every file stays small."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "timm_cbam2"
TESTS = Path(__file__).resolve().parent
# Each imports itself and those before it; `timm_cbam2` is the package's own `__init__`, which registers the models.
ORDER = (
    *(
        "terminal",
        "errors",
        "files",
        "models",
        "timm_cbam2",
        "kernels",
        "data",
        "hub",
        "insertion",
        "training",
        "seeing",
    ),
    *("evidence", "finetune", "ablation", "cli"),
)
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if list(folder.glob("*.py")))
MAX_LINES, MAX_FUNCTION = 300, 60


def module_of(path):
    """`PACKAGE/data/loading.py` as ("timm_cbam2", "data", "loading")."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def room_of(module):
    return module[1] if len(module) > 1 else module[0]


@cache
def modules():
    """Every module of the package: its name's parts, its path and its syntax tree."""
    return {module_of(path): (path, ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")}


def nodes(tree):
    """All of a tree but what only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node)


def imported(module, path, tree):
    """The package's modules that one imports, wherever in the file it does."""
    folder = module if path.stem == "__init__" else module[:-1]
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found = [tuple(name.name.split(".")) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            found = [(*base, name.name) if (*base, name.name) in modules() else base for name in node.names]
        else:
            continue
        yield from (name for name in found if name in modules() and name != module)


@cache
def graph():
    return {module: set(imported(module, *found)) for module, found in modules().items()}


def circle(edges):
    """The names along one circle of a graph, none if it has none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_point_one_way():
    wrong = [
        f"{'.'.join(module)} imports {'.'.join(other)}"
        for module, others in graph().items()
        for other in others
        if ORDER.index(room_of(other)) > ORDER.index(room_of(module)) and module != ("timm_cbam2",)
    ]
    assert not wrong, wrong
    assert {room_of(other) for other in graph()["timm_cbam2",]} == {"models"}


def test_no_module_is_in_a_circle():
    # A package's `__init__` runs before its modules, but here none imports what would import it again.
    assert [".".join(name) for name in circle(graph())] == []


def test_what_travels_to_the_hub_imports_only_files_beside_it():
    """transformers copies only what is imported as `from .name import x`."""
    models = {module: found for module, found in modules().items() if room_of(module) == "models"}
    assert len(models) > 10
    for module, (_, tree) in models.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and (*module[:2], node.module) in models, (module, ast.unparse(node))
        assert all(other[:2] == module[:2] for other in graph()[module]), module


def test_every_room_says_what_it_is():
    assert set(ROOMS) <= set(ORDER), "a new room needs its place in ORDER"
    for room in ROOMS:
        text = ast.get_docstring(modules()["timm_cbam2", room][1])
        assert text and text.count(".") >= 3, room  # what lives there, what may change, what is a contract


def functions(tree):
    """The name of each function and its lines, without its docstring, which may be as long as it is useful."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            said = node.body[0] if ast.get_docstring(node) is not None else None
            docstring = said.end_lineno - said.lineno + 1 if said else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def test_files_and_functions_are_short():
    long = {}
    for path in (*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found = [name for name in functions(ast.parse(text)) if name[1] > MAX_FUNCTION]
        if found or len(text.splitlines()) > MAX_LINES:
            long[path.relative_to(TESTS.parent).as_posix()] = (len(text.splitlines()), found)
    assert not long, long


def test_the_checks_can_fail():
    tree = ast.parse("def f():\n    from ..seeing import explain\n    import timm_cbam2.cli")
    found = set(imported(("timm_cbam2", "data", "loading"), PACKAGE / "data" / "loading.py", tree))
    assert found == {("timm_cbam2", "seeing", "explain"), ("timm_cbam2", "cli")}
    assert len(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == 4
    text = 'def f():\n    """Two\n    lines."""\n    x = 1\n    return x\n'
    assert list(functions(ast.parse(text))) == [("f", 3)]
