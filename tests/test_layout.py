"""The shape of the project: which package may import which, and what a checkout must hold.

python -m pytest tests/test_layout.py
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from infra.spec_files import load_spec
from infra.study_files import load_study

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["flows", "tasks", "modalities", "infra"]  # each may import itself and those after it
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
SPECS = sorted((ROOT / "flows" / "specs").glob("*.toml"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PIN = r"([a-z0-9.-]+)(\[[a-z, ]+\])?==[0-9][^ ]*"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Imported by the driver or by anything that only reads a run: a second of torch would be felt.
TORCH_FREE = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("flows", "infra")]
NEEDS_TORCH = {"infra/structure.py", "infra/weights.py"}  # worker processes only


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Module, line and whether importing the file already executes it, of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if deferred or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            lazy.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node not in lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                yield name, node.lineno, node not in lazy


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_point_one_way() -> None:
    wrong = []
    for path in SOURCES:
        layer = path.relative_to(ROOT).parts[0]
        above = LAYERS[: LAYERS.index(layer)]
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for name, line, _ in imports(path)
            if name.split(".")[0] in [*above, "tests"]
        ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    modules = {module_of(path) for path in SOURCES}
    graph = {
        module_of(path): {name for name, _, executed in imports(path) if executed}
        & modules - {module_of(path)}  # `from package import module` in the package itself
        for path in SOURCES
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("library", ["optuna", "ray", "mlflow"])
def test_one_system_one_place(library: str) -> None:
    """One module of infra, or one folder of it."""
    users = [
        path.relative_to(ROOT)
        for path in SOURCES
        if any(name.split(".")[0] == library for name, _, _ in imports(path))
    ]
    assert all(user.parts[0] == "infra" for user in users), users
    homes = {user if len(user.parts) == 2 else user.parent for user in users}
    assert len(homes) <= 1, f"{library} is imported in {sorted(map(str, homes))}"


def test_files_stay_short() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in [*SOURCES, *tests]}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 350}
    assert not long


def test_files_open_with_what_they_do() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.read_text(encoding="utf-8").strip()
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_third_party_imports_are_declared() -> None:
    """A library that is only there because another one needs it may go with the next release."""
    extras = PROJECT["optional-dependencies"]
    declared = {
        re.split(r"[\[<>=!~; ]", text, maxsplit=1)[0].replace("_", "-").lower()
        for text in PROJECT["dependencies"] + extras["dashboards"] + extras["export"]
    }
    providers = packages_distributions()
    undeclared = set()
    for path in SOURCES:
        for name, line, _ in imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in LAYERS:
                continue
            names = {each.replace("_", "-").lower() for each in providers.get(top, [top])}
            if not names & declared:
                undeclared.add(f"{path.relative_to(ROOT)}:{line} imports {top}")
    assert not undeclared


def test_driver_does_not_import_torch() -> None:
    """Asked of a fresh interpreter: an import three modules away counts as well."""
    modules = [
        module_of(path)
        for path in TORCH_FREE
        if str(path.relative_to(ROOT)) not in NEEDS_TORCH and path.stem != "__main__"
    ]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name + ' imports torch'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_lock_holds_hashes_and_no_address() -> None:
    assert not re.search(r"://|^-|--(extra-)?index|--find-links", LOCK, re.MULTILINE)
    entries = re.split(r"^(?=[a-z0-9])", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    for entry in entries:
        assert re.match(PIN + r"( ;.*)? \\\n    --hash=sha256:[0-9a-f]{64}", entry), entry


def test_lock_holds_every_dependency() -> None:
    locked = {name for name, _ in re.findall("^" + PIN, LOCK, re.MULTILINE)}
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    assert {re.split(r"[\[<>=]", text)[0] for text in wanted} <= locked


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_example_specs_are_valid(path: Path) -> None:
    if path.stem.startswith("study_"):
        assert load_study(path).dir == f"runs/{path.stem}"
        return
    spec = load_spec(path)
    assert spec.run.dir == f"runs/{path.stem}"


def test_demo_names_a_spec_that_ships() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"\S+\.toml", makefile.split("\ndemo:")[1].split("\n\n")[0])) <= {
        str(path.relative_to(ROOT)) for path in SPECS
    }


def test_upload_is_refused() -> None:
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]
