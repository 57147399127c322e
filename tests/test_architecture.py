"""The shape of the code: import levels (read LEVELS as a table of contents), lean imports, short documented files."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from dq_runtime.backends import BACKENDS
from dq_runtime.export import EXPORTERS
from dq_runtime.grids import GRIDS
from dq_runtime.packing.readers import READERS
from dq_runtime.registry import Registry
from dq_runtime.rounding import ROUNDINGS
from dq_runtime.transforms import TRANSFORMS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dq_runtime"
MAX_LINES = 400

# Low to high. A module may import its own member of the table and members of lower levels, never its own level.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"_version", "errors", "interrupt", "levels"}),
    frozenset({"environment", "ranks", "spec", "registry", "out_of_memory", "_native"}),
    frozenset({"theory"}),
    frozenset({"grids", "transforms", "data"}),
    frozenset({"rounding", "packing"}),
    frozenset({"request"}),
    frozenset({"dq_kernels"}),
    frozenset({"backends"}),
    frozenset({"modules"}),
    frozenset({"runtime", "evaluate", "hf"}),
    frozenset({"allocation", "blockwise", "calibration", "preflight", "server", "vllm_plugin"}),
    frozenset({"planning"}),
    frozenset({"pipeline", "export", "scores"}),
    frozenset({"compare"}),
    frozenset({"cli"}),
    frozenset({"generate", "__main__"}),
)
LEVEL = {member: number for number, members in enumerate(LEVELS) for member in members}
FILES = sorted(PACKAGE.rglob("*.py"))


def member_of(module: str) -> str | None:
    """``dq_runtime.packing.layout`` -> ``packing``; None for what is not ours, "" for the package itself."""
    head, _, rest = module.partition(".")
    if head == "dq_kernels":
        return "dq_kernels"
    return rest.partition(".")[0] if head == "dq_runtime" else None


def imports_of(file: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of a file, inside functions too; those only for type checkers left out."""
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            # `from dq_runtime import x` may import the module x.
            submodule = [f"{node.module}.{a.name}" for a in node.names if find_submodule(f"{node.module}.{a.name}")]
            found.extend((node.lineno, name) for name in (submodule or [node.module]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.extend((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def find_submodule(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.startswith("dq_runtime.") and (path.with_suffix(".py").exists() or (path / "__init__.py").exists())


def test_every_file_and_folder_has_a_level() -> None:
    members = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    members |= {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert members <= set(LEVEL), f"add to LEVELS: {sorted(members - set(LEVEL))}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_imports_lower_levels_only(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for line, module in imports_of(file):
        member = member_of(module)
        if member is None or member == own:
            continue
        if own == "__init__":  # the package itself resolves its names lazily; only the version is imported
            assert member == "_version", f"{file}:{line}: the package may import only its version, not {module}"
            continue
        assert member, f"{file}:{line}: import the module that has it, not the package itself"
        assert LEVEL[member] < LEVEL[own], f"{file}:{line}: {own} must not import {member} ({module})"


def test_the_registries_name_modules_of_their_own_folder() -> None:
    folders = {
        "packing.readers": READERS,
        "grids": GRIDS,
        "transforms": TRANSFORMS,
        "rounding": ROUNDINGS,
        "backends": BACKENDS,
        "export": EXPORTERS,
    }
    for folder, registry in folders.items():
        for name in registry:
            assert registry._members[name].startswith(f"dq_runtime.{folder}."), name


@pytest.mark.parametrize("registry", [GRIDS, TRANSFORMS, ROUNDINGS, BACKENDS, EXPORTERS, READERS], ids=lambda r: r.kind)
def test_every_registered_target_imports(registry: Registry) -> None:
    assert len(registry) > 0
    for name in registry:
        assert callable(registry.get(name))
        assert registry.get(name).__doc__, f"{registry.kind} {name} says what it is"


def test_a_name_cannot_be_registered_twice() -> None:
    registry = Registry("thing", {"a": "json:loads"})
    with pytest.raises(ValueError, match="'a' is registered twice"):
        registry.add("a", "json:dumps")
    with pytest.raises(ValueError, match="module:attribute"):
        registry.add("b", "json.dumps")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_is_short_and_says_what_it_is(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_LINES
    assert ast.get_docstring(ast.parse(text)), "needs a module docstring"


def test_kernels_is_not_a_package() -> None:
    """Hugging Face publishes a package ``kernels``, which transformers imports; ours must not shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "dq_kernels" / "__init__.py").exists()


def fresh(code: str, *arguments: str) -> str:
    """Run ``code`` in a new interpreter in the repository root, which is then first on sys.path."""
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_lean() -> None:
    modules = {"torch", "triton", "transformers", "numpy", "matplotlib", "typer", "safetensors", "datasets"}
    code = f"""
import sys, time, json
started = time.process_time()
import dq_runtime
seconds = time.process_time() - started
print(json.dumps([seconds, sorted({modules!r} & set(sys.modules)), dir(dq_runtime)]))
"""
    seconds, imported, names = json.loads(fresh(code))
    assert imported == []
    assert seconds < 0.5
    assert {"quantize", "load", "generate", "QuantSpec", "__version__"} <= set(names)


def test_quantize_and_load_can_be_imported_without_triton_transformers_or_cuda() -> None:
    """transformers takes seconds to import; a mistake in an argument should be reported before that."""
    code = """
import sys
from dq_runtime import load, quantize, generate, stream, Sampling
import torch
print(sorted({"triton", "transformers", "dq_kernels", "matplotlib"} & set(sys.modules)), torch.cuda.is_initialized())
"""
    assert fresh(code).split() == ["[]", "False"]


def test_every_public_name_resolves() -> None:
    import dq_runtime

    for name in dq_runtime.__all__:
        assert getattr(dq_runtime, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dq_runtime.no_such_name


def test_the_function_generate_survives_the_import_of_the_module_generate() -> None:
    code = """
import dq_runtime
before = dq_runtime.generate
import dq_runtime.generate
assert callable(dq_runtime.generate) and callable(before)
print("fine")
"""
    assert fresh(code) == "fine\n"


def test_transformers_imports_with_the_repository_root_on_the_path() -> None:
    code = """
import sys
assert sys.path[0] == ""
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
print("fine")
"""
    assert fresh(code) == "fine\n"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_package_imports_by_its_own_name() -> None:
    assert import_module("dq_kernels").__doc__
