"""What a machine can check of the repository's rules: which room imports which, what is pinned."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

import saccade

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "saccade"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OUTSIDE = ("benchmarks", "experiments")
SCRIPTS = sorted(path for folder in OUTSIDE for path in (ROOT / folder).rglob("*.py"))

BOTTOM = {
    "errors",
    "files",
    "companions",
    "model_files",
    "images",
    "interfaces",
    "late",
    "presets",
    "prompt_start",
    "values",
    "videos",
}
METHOD = {"tokens", "reducers", "families", "pruning", "dualspeed", "skip_vision"} | BOTTOM
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "companions": {"errors", "files"},
    "model_files": {"errors", "files"},
    "images": {"errors"},
    "interfaces": {"errors"},
    "late": set(),
    "values": {"errors"},
    "presets": {"values"},
    "prompt_start": set(),
    "videos": {"errors", "images"},
    "tokens": {"errors"},
    "reducers": {"tokens"} | BOTTOM,
    "families": {"reducers", "tokens"} | BOTTOM,
    "pruning": {"families", "reducers", "tokens"} | BOTTOM,
    "serving": METHOD - {"dualspeed"} | {"launch"},
    "dualspeed": METHOD - {"dualspeed"} | {"data"},
    "skip_vision": METHOD - {"dualspeed", "skip_vision"},
    "data": {"reducers", "tokens"} | BOTTOM,
    "tiny": {"data", "tokens"} | BOTTOM,
    "report": METHOD | {"data"},
    "evaluation": METHOD | {"data", "tiny", "report", "training"},
    "launch": BOTTOM,
    "training": METHOD | {"data", "tiny", "report", "launch", "recipes"},
    "testing": METHOD | {"data", "tiny", "evaluation"},
    "sweeps": METHOD | {"data", "tiny", "report", "evaluation", "training", "recipes"},
    "demo": METHOD | {"data", "tiny", "report", "evaluation", "training", "sweeps"},
    "pages": METHOD | {"data", "report", "evaluation", "training", "sweeps"},
    "play": METHOD | {"data", "report", "evaluation", "training", "pages"},
    "cli": METHOD
    | {"data", "tiny", "report", "evaluation", "launch"}
    | {"training", "sweeps", "demo", "pages", "play", "serving", "recipes"},
    "recipes": BOTTOM,
    "__init__": METHOD,
    "__main__": {"cli"},
}
"""For each room, the other rooms that it may import. A new room is added here, and to CONTRIBUTING.md."""

FORBIDDEN: dict[str, set[str]] = {
    "errors": {"torch", "transformers", "trl"},
    "files": {"torch", "transformers", "trl"},
    "companions": {"transformers", "trl", "peft"},
    "model_files": {"torch", "transformers", "trl", "peft"},
    "images": {"torch", "transformers", "trl"},
    "interfaces": {"torch", "transformers", "trl"},
    "values": {"torch", "transformers", "trl"},
    "videos": {"torch", "transformers", "trl"},
    "data": {"torch", "transformers", "trl", "peft"},
    "tokens": {"transformers", "trl", "peft"},
    "reducers": {"transformers", "trl", "peft"},
    "families": {"trl", "peft", "accelerate", "datasets"},
    "pruning": {"trl", "peft", "accelerate", "datasets"},
    "skip_vision": {"trl", "peft", "accelerate", "datasets"},
}
"""Other packages that a room stays free of."""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at its head or inside a function."""
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*parents, node.module] if node.module else parents)
            # `from saccade import data` imports a room that the home alone does not show.
            yield from ((node.lineno, f"{home}.{alias.name}") for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def rooms() -> set[str]:
    return {room_of(path) for path in SOURCES}


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_table_is_free_of_circles() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {room for room, lower in MAY_IMPORT.items() if lower <= done} - done
        assert ready, f"rooms that import each other: {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room}/ is a new room: say in tests/test_repository.py what it may import"
    for line, name in imports(path):
        top, *rest = name.split(".")
        if top == "saccade" and rest and rest[0] not in (*saccade.__all__, "__version__"):
            assert rest[0] == room or rest[0] in MAY_IMPORT[room], f"{name_of(path)}:{line} imports {name}"
        elif top == "saccade" and rest and rest[0] != "__version__":
            # The public names come from every room, so only what stands above all of them may use that door.
            assert room in ("cli", "demo"), f"{name_of(path)}:{line} imports {name}: take it from its room"
        assert top not in FORBIDDEN.get(room, ()), f"{name_of(path)}:{line} imports {name}"
        assert top != "torchvision", f"{name_of(path)}:{line}: torchvision is not a dependency"
        assert top not in OUTSIDE, f"{name_of(path)}:{line} imports {name}, which no wheel has"


def test_the_reader_of_imports_sees_all_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "saccade")
    path = tmp_path / "saccade" / "room" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b\nfrom saccade import data\nfrom . import x\nfrom ..top import y\ndef f():\n import z\n"
    )
    assert [name for _, name in imports(path)] == ["a.b", "saccade.data", "saccade.room.x", "saccade.top.y", "z"]


def test_contributing_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    missing = sorted(room for room in rooms() - {"__init__", "__main__"} if f"`{room}" not in text)
    assert not missing, f"CONTRIBUTING.md does not say what these rooms are for: {missing}"


def test_a_room_imports_those_below_it_in_contributing_s_table() -> None:
    rows = re.findall(r"^\| (`[\w.]+/?`(?:, `[\w.]+`)*) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    place = {name: row for row, names in enumerate(rows) for name in re.findall(r"`(\w+)", names)}
    upwards = [
        f"{room} imports {other}"
        for room, others in MAY_IMPORT.items()
        for other in others - BOTTOM
        if room in place and place[other] <= place[room]
    ]
    assert upwards == []


def test_no_tracked_file_is_large() -> None:
    sizes = {name_of(path): path.stat().st_size for path in tracked_files()}
    # The testbed's vision tower, which would take half an hour to make.
    tower = sizes.pop("experiments/smol/tower-12/model.safetensors")
    assert tower < 8 * 2**20
    assert {name: size for name, size in sizes.items() if size > 4 * 2**20} == {}


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", SOURCES + SCRIPTS, ids=name_of)
def test_nothing_is_left_for_later(path: Path) -> None:
    found = re.findall(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b", path.read_text(encoding="utf-8"))
    assert not found, f"{name_of(path)} has {found}"


@pytest.mark.parametrize("name", saccade.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(saccade, name).__doc__


@pytest.mark.parametrize(
    "room", sorted(room for room in rooms() if (PACKAGE / room / "__init__.py").is_file() and room != "__init__")
)
def test_what_a_room_offers_resolves(room: str) -> None:
    module = importlib.import_module(f"saccade.{room}")
    assert [name for name in getattr(module, "__all__", []) if not hasattr(module, name)] == []


def test_the_version_is_the_same_everywhere(project: dict) -> None:
    assert saccade.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned(project: dict) -> None:
    names = {normal(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in wanted(project)}
    assert names > {"torch", "trl", "matplotlib", "pytest"}
    assert names - set(pins()) == set()


def wanted(project: dict) -> list[str]:
    """What an installation for development asks for: the dependencies, and those of `dev` and of the extras in it."""
    extras = project["optional-dependencies"]
    found, names = list(project["dependencies"]), ["dev"]
    while names:
        for requirement in extras[names.pop()]:
            own = re.match(rf"{project['name']}\[(\w+)\]$", requirement)
            names += [own[1]] if own else []
            found += [] if own else [requirement]
    return found


def test_torchvision_is_nowhere_asked_for(project: dict) -> None:
    asked = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    assert not [requirement for requirement in asked if requirement.startswith("torchvision")]
    assert "torchvision" not in pins()


def test_the_install_page_names_the_supported_versions(project: dict) -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    for requirement in wanted(project):
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
        if name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
            assert f"`{requirement}`" in page, f"docs/install.md does not say `{requirement}`"


def test_the_install_page_has_the_versions_that_the_tests_run_on() -> None:
    lines = (ROOT / "requirements-oldest.txt").read_text().splitlines()
    oldest = pins() | {normal(name): version for name, _, version in (line.partition("==") for line in lines)}
    served = dict(
        line.split("==") for line in (ROOT / "requirements-serve.txt").read_text().splitlines() if "==" in line
    )
    rows = re.findall(r"^\| (\w+) \| `.*$", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert rows == ["torch", "transformers", "trl", "peft", "accelerate", "datasets"]
    for name in rows:
        row = re.search(rf"^\| {name} \| `.*$", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)[0]
        _, _, newest, least, _, _, vllm = (cell.strip() for cell in row.strip("|").split("|"))
        assert newest.split()[0] == pins()[name]
        assert least.split()[0] == oldest[name]
        assert vllm.split()[0] in ("-", served.get(name, pins()["torch"] if name == "torch" else None))


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000


def anchors(page: Path) -> set[str]:
    """What a link to a part of a page may name: its headings, as GitHub turns them into anchors."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    plain = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}


def test_pages_link_to_files_and_headings_that_exist() -> None:
    pages = [path for path in tracked_files() if path.suffix == ".md"]
    links = [
        (page, target, anchor)
        for page in pages
        for target, anchor in re.findall(
            r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")
        )
    ]
    assert any(anchor for _, _, anchor in links)
    broken = [
        f"{name_of(page)}: {target}#{anchor}"
        for page, target, anchor in links
        if not (page.parent / target).exists()
        or (anchor and anchor not in anchors(page.parent / target if target else page))
    ]
    assert broken == []


def test_every_test_that_a_page_names_exists() -> None:
    pages = [path for path in tracked_files() if path.suffix == ".md"]
    named = {name for page in pages for name in re.findall(r"tests/\w+\.py::[\w:]+", page.read_text(encoding="utf-8"))}
    assert len(named) > 50
    missing = set()
    for name in named:
        file, *rest = name.split("::")
        path = ROOT / file
        found: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
        for part in rest:
            inside = [node for node in found if getattr(node, "name", None) == part]
            missing |= set() if inside else {name}
            found = inside[0].body if inside else []
    assert missing == set()


def test_the_reducer_of_the_contributing_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    example = tmp_path / "example.py"
    # In a process of its own: the registry of this one would go on listing it to the other tests.
    example.write_text(
        re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
        + "\nfrom saccade.reducers import get_reducer\n"
        + "features = torch.tensor([[[1.0], [-3.0], [0.0], [2.0]]])\n"
        + "print(get_reducer('largest_norm')(VisualContext(features=features), 2).index.tolist())\n"
    )
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=True)
    assert done.stdout == "[[1, 3]]\n"
