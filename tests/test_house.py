"""docs/design.md's table of rooms against the code: who imports whom; no room imports a room above it, no module
imports in a circle.
"""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 400


def table() -> dict[str, tuple[list[str], set[str]]]:
    """Room → its files and folders, and the rooms that it imports, in the order of the table."""
    text = (ROOT / "docs/design.md").read_text()
    section = text.split("<!-- rooms -->")[1].split("<!-- end of rooms -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    return {
        name.strip("`"): (re.findall(r"`([^`]+)`", places), set(re.findall(r"`([^`]+)`", imports)))
        for name, places, _, imports in rows
    }


def modules() -> dict[str, Path]:
    folders = ("benchmarks", "catmodel", "data_pipeline", "examples", "launch", "operate", "train")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports anywhere but for type hints alone."""
    found: set[str] = set()
    package = path.relative_to(ROOT).parent.parts

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module
            )
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def room_of(path: Path, rooms: dict[str, tuple[list[str], set[str]]]) -> str:
    """The room with the longest place that the file is in."""
    name = path.relative_to(ROOT).as_posix()
    places = [
        (len(place), room)
        for room, (its, _) in rooms.items()
        for place in its
        if name == place or place.endswith("/") and name.startswith(place)
    ]
    assert places, f"{name} is in no room of docs/design.md"
    return max(places)[1]


def test_the_rooms_import_what_the_table_says_and_nothing_above_them():
    rooms, known = table(), modules()
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for path in known.values():
        room = room_of(path, rooms)
        found[room] |= {room_of(known[name], rooms) for name in imports(path, known)} - {room}
    assert found == {room: imported for room, (_, imported) in rooms.items()}
    order = list(rooms)
    assert not [(room, other) for room in rooms for other in found[room] if order.index(other) < order.index(room)]


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    for name in graph:  # a package's __init__ may import its own modules lazily, and they the package's other modules
        graph[name] = {other for other in graph[name] if not name.startswith(f"{other}.")}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError


def test_no_file_is_too_long():
    paths = [
        path
        for path in ROOT.rglob("*.py")
        if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
    ]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths}
    assert not {name: count for name, count in lengths.items() if count > MOST_LINES}
    assert lengths["train/trainer.py"] < 220
    loop = re.search(r"    def train_from\(.*?(?=\n    def )", (ROOT / "train/trainer.py").read_text(), re.DOTALL)[0]
    assert len(loop.split("for step in range", 1)[1].splitlines()) < 25
