"""Imports go one way, and importing pyarith stays cheap. Read from the sources; nothing is imported to find out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "pyarith"

# Each part may import parts further down, and itself. Parts in one line do not know each other.
LAYERS = [
    ("__main__",),
    ("cli",),
    ("demo", "doctor"),
    ("reporting",),
    ("discovery", "tuning", "analysis", "evaluation"),
    ("engine",),
    ("models", "ops", "tasks"),
    ("result", "ablation_result", "boundary"),
    ("prompts", "plots", "stats", "rows"),
    ("types",),
    ("errors",),
]
DEPTH = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}
ONLY = {"tasks": {"tasks", "prompts", "types", "errors"}}
# numpy only, before a function is called
LIGHT = ("result", "ablation_result", "boundary", "prompts", "plots", "stats", "rows", "types", "errors")


class Import(NamedTuple):
    """One import of a module: who, of what, and whether it happens as soon as the file is loaded."""

    file: str
    line: int
    part: str
    target: str
    at_once: bool


def imports(root: Path) -> Iterator[Import]:
    """Every import in a package tree; what stands under TYPE_CHECKING or in a function does not happen at once."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        part = inside.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from _walk(tree, str(inside), part, True)


def _walk(node: ast.AST, file: str, part: str, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(file, child.lineno, part, alias.name, at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}:{child.lineno}: relative import"
            name = str(child.module)
            targets = [f"{name}.{alias.name}" for alias in child.names] if name == "pyarith" else [name]
            yield from (Import(file, child.lineno, part, target, at_once) for target in targets)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from (found._replace(at_once=False) for found in _walk(child, file, part, False))
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, file, part, at_once and not later)


def wrong_ways(root: Path) -> list[str]:
    """Imports that go up or sideways, and parts that LAYERS does not place."""
    found = []
    for item in imports(root):
        if not item.target.startswith("pyarith"):
            continue
        target = item.target.split(".")[1] if "." in item.target else "__init__"
        where = f"{item.file}:{item.line} imports {item.target}"
        if item.part == "__init__" or target in ("__init__", "__version__", "_C"):
            continue  # the facade names everything; anything may ask for the version
        if item.part not in DEPTH or target not in DEPTH:
            found.append(f"{where}: not in LAYERS")
        elif target not in ONLY.get(item.part, DEPTH):
            found.append(f"{where}: {item.part} may import {sorted(ONLY[item.part])}")
        elif item.part != target and DEPTH[target] <= DEPTH[item.part]:
            found.append(f"{where}: {target} is not below {item.part}")
    return found


def heavy(root: Path, parts: tuple[str, ...] = LIGHT) -> list[str]:
    """What light modules import at once beyond the standard library, numpy and each other."""
    allowed = {*sys.stdlib_module_names, "numpy", "pyarith"}
    return [
        f"{item.file}:{item.line} imports {item.target} at once"
        for item in imports(root)
        if item.at_once and item.part in parts and item.target.split(".")[0] not in allowed
    ]


def test_imports_go_one_way():
    assert wrong_ways(PACKAGE) == []


def test_light_modules_need_numpy_only():
    assert heavy(PACKAGE) == []


def test_the_command_line_starts_without_the_heavy_libraries():
    slow = {"torch", "transformers", "scipy", "matplotlib", "numpy", "huggingface_hub"}
    found = [f"{i.file}:{i.line} {i.target}" for i in imports(PACKAGE) if i.part == "cli" and i.at_once]
    assert [line for line in found if line.split()[1].split(".")[0] in slow] == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("engine/x.py", "from pyarith.discovery import fast_patch", "not below engine"),
        ("engine/x.py", "def f():\n    from pyarith import reporting", "not below engine"),
        ("models/x.py", "import pyarith.ops", "not below models"),
        ("tasks/x.py", "from pyarith.types import Head\nfrom pyarith.result import PatchResult", "tasks may import"),
        ("novelty.py", "from pyarith.errors import check", "not in LAYERS"),
        ("types.py", "import torch", "at once"),
        ("stats.py", "if True:\n    from scipy import stats", "at once"),
    ],
)
def test_planted_imports_are_found(tmp_path, file, source, complaint):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert complaint in "\n".join(wrong_ways(tmp_path) + heavy(tmp_path))


def test_allowed_imports_are_not_complained_about(tmp_path):
    (tmp_path / "plots.py").write_text(
        "from typing import TYPE_CHECKING\nimport numpy\nfrom pyarith.errors import check\n"
        "if TYPE_CHECKING:\n    from matplotlib.figure import Figure\ndef draw():\n    import matplotlib\n"
    )
    assert wrong_ways(tmp_path) + heavy(tmp_path) == []


def loaded_after(code: str) -> set[str]:
    """Top-level modules and torch's compiler parts that a fresh interpreter holds after ``code``."""
    probe = "import sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{probe}"], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


def test_import_pyarith_loads_nothing_heavy():
    loaded = loaded_after("import pyarith; dir(pyarith)")
    assert loaded & {"torch", "transformers", "scipy", "matplotlib", "numpy", "rich", "typer"} == set()


def test_fast_patch_and_results_load_no_more_than_torch():
    loaded = loaded_after("import pyarith as pa; pa.fast_patch, pa.PatchResult")
    assert loaded & {"transformers", "scipy", "matplotlib", "pandas", "rich"} == set()
    added = loaded - loaded_after("import torch")
    assert [name for name in added if name.startswith(("torch._inductor", "torch._dynamo", "torch.distributed"))] == []


def test_pairs_and_tasks_load_no_torch():
    loaded = loaded_after("import pyarith as pa; pa.PromptPairs, pa.tasks.arithmetic, pa.Head")
    assert loaded & {"torch", "transformers", "scipy", "matplotlib"} == set()
