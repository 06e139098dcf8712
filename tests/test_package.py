"""The shape of the package: what imports what, what is never used, what every name is."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / "gfopt").rglob("*.py") if p.name != "_modidx.py")
FLOORS = {"search": 1, "bayes": 1, "lm": 2, "compress": 3, "experiments": 4, "adapters": 5}
TOOLS = {"nbdev", "fastcore", "IPython", "execnb"}
OPTIONAL = {"transformers", "tokenizers", "skopt", "optuna", "cma", "sklearn", "mpmath"}
UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


def name(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def imports(path):
    "Every imported module of a file by full name, with whether it stands at the top level."
    tree = ast.parse(path.read_text())
    top = {id(n) for n in tree.body}
    package = name(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])]), id(node) in top


def floor(module):
    parts = module.split(".")
    return FLOORS.get(parts[1], 0) if len(parts) > 1 else 0


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports(path):
    own = name(path)
    for module, at_top in imports(path):
        root = module.partition(".")[0]
        assert root not in TOOLS | UNSAFE, f"{own} imports {module}"
        assert not (at_top and root in OPTIONAL), f"{own} imports {module} at its top level"
        if root == "gfopt" and own != "gfopt.__init__":
            assert floor(module) <= floor(own), f"{own} imports upwards: {module}"
            sides = {own.split(".")[1], *module.split(".")[1:2]}
            assert not {"search", "bayes"} <= sides, f"{own} imports its neighbour {module}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_runs_or_loads_foreign_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "os.system"), f"{called} in {path.name}"
        if called == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert safe.get("weights_only") == "True", f"torch.load without weights_only in {path.name}"


def test_import_is_light():
    "`import gfopt` loads neither torch nor any other large library."
    code = "import sys, gfopt; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(said.stdout.split())
    assert not loaded & (OPTIONAL | TOOLS | {"torch", "scipy", "matplotlib"}), said.stderr


def test_every_public_name_is_there():
    import gfopt

    for public in gfopt.__all__:
        assert getattr(gfopt, public) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        gfopt.nothing_like_it  # noqa: B018


@pytest.mark.parametrize("first", ["import gfopt.compress.heal", "from gfopt import compress", "import gfopt"])
def test_compress_is_a_function_whatever_was_imported_first(first):
    code = f"{first}\nfrom gfopt import compress\nimport gfopt\nfor f in (compress, gfopt.compress):\n    try: f(1, 2)\n    except ValueError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("give either budget= or targets=") == 2, done.stderr


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    "Python started beside a clone, which is named gfopt and has no `__init__.py` of its own."
    (tmp_path / "gfopt" / "docs").mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "from gfopt import compress"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
