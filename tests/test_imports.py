"""The house holds: imports run one way, the top level is lazy, and every package ships."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["errors", "files", "kernels", "models", "sampling", "distill", "evaluate", "emoji", "bench"]
# the command line and what it is made of; these may import anything, and nothing below imports them
ATTIC = {"cli", "__main__", "demo", "compare", "paper", "plan", "resolve", "pictures", "console", "doctor", "memory"}


def imported(path: Path) -> set[str]:
    """Second-level names under hypersd that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            parts = (node.module or "").split(".")
            if parts[0] == "hypersd":
                names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hypersd.")}
    return names - {"__version__"}


def floor(name: str) -> int:
    return len(FLOORS) if name in ATTIC else FLOORS.index(name)


def test_imports_run_one_way():
    wrong = []
    for path in sorted((ROOT / "hypersd").rglob("*.py")):
        own = path.relative_to(ROOT / "hypersd").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imported(path) if floor(name) > floor(own)]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_floor():
    found = {path.name.removesuffix(".py") for path in (ROOT / "hypersd").iterdir() if path.suffix == ".py"}
    found |= {path.parent.name for path in (ROOT / "hypersd").glob("*/__init__.py")}
    assert found - {"__init__"} == (set(FLOORS) | ATTIC) - {"bench"}


def test_every_package_ships():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    folders = {path.parent for path in (ROOT / "hypersd").rglob("__init__.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"hypersd.bench"}
    assert set(config["tool"]["setuptools"]["packages"]) == packages


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_lazy_and_cheap():
    """At most 50 ms on top of torch, median of three processes, and nothing of the package but the package itself."""
    code = "import torch, time; t = time.perf_counter(); import hypersd; print(time.perf_counter() - t)"
    times = sorted(float(run(code)) for _ in range(3))
    assert times[1] < 0.05
    out = run("import sys, hypersd; print([m for m in sys.modules if m.startswith('hypersd')], 'torch' in sys.modules)")
    assert out.strip() == "['hypersd'] False"


def test_subpackages_load_on_first_use_and_start_nothing():
    names = ["kernels", "models", "sampling", "distill", "evaluate"]
    code = (
        "import torch, hypersd, subprocess\n"
        "def refuse(*a, **k): raise AssertionError('started something at import')\n"
        "torch.cuda.is_available = torch.cuda.init = torch.compile = subprocess.Popen.__init__ = refuse\n"
        f"print(*(getattr(hypersd, name).__name__ for name in {names}), torch.cuda.is_initialized())"
    )
    assert run(code).split() == [*(f"hypersd.{name}" for name in names), "False"]


def test_unknown_names_are_attribute_errors():
    import hypersd
    import hypersd.evaluate

    for module in (hypersd, hypersd.evaluate):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.nothing  # noqa: B018
    assert hypersd.evaluate.frechet_distance.__name__ == "frechet_distance"
