"""The order of the packages: each imports those below it and none above."""

import ast
import subprocess
import sys

import pytest

import mtp_jax
from support import REPOSITORY

# From the ground up. What stands in one line does not know of each other.
ORDER = [
    {"validate", "sharding", "parameters", "arrays", "plots", "output", "processes"},
    {"registry", "distributed", "model"},
    {"losses"},
    {"heads", "data"},
    {"config", "language_model"},
    {"mesh", "state", "decode"},
    {"runs"},
    {"look", "train", "interop", "distill"},
    {"bench"},
    {"sweep"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {unit: level for level, units in enumerate(ORDER) for unit in units}


def imports(file):
    """(unit, module) of every import of the package in a file, wherever it stands; not those for types alone."""
    tree = ast.parse(file.read_text())
    typed = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module == "mtp_jax":  # a public name comes from where it lives
                names = [mtp_jax._PUBLIC.get(alias.name, f"mtp_jax.{alias.name}") for alias in node.names]
        assert not getattr(node, "level", 0), f"{file} has a relative import"
        for name in names:
            root, _, rest = name.partition(".")
            if root == "mtp_jax" and rest.partition(".")[0] in LEVEL:
                yield rest.partition(".")[0], name


PACKAGE = REPOSITORY / "mtp_jax"
FILES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})


def unit_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_package_has_its_place():
    assert {unit_of(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("unit", sorted(LEVEL))
def test_packages_import_downwards_only(unit):
    for path in FILES:
        if unit_of(path) == unit:
            up = [name for other, name in imports(path) if other != unit and LEVEL[other] >= LEVEL[unit]]
            assert not up, f"{path.relative_to(REPOSITORY)} imports {up}, which stand beside or above it"


def test_the_check_sees_an_arrow_that_points_up(tmp_path):
    (tmp_path / "low.py").write_text(
        "from mtp_jax import generate\ndef f():\n    from mtp_jax.train.step import Trainer\n    import mtp_jax.cli"
    )
    assert sorted(unit for unit, _ in imports(tmp_path / "low.py")) == ["cli", "decode", "train"]


def test_files_import_in_no_circle():
    """Within a package too."""
    names = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in FILES}
    below = {}
    for path in FILES:
        own = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        read = {full if full in names else full.rpartition(".")[0] for _, full in imports(path)}
        below[own] = read & names - {own}
    while leaves := [name for name, found in below.items() if not found]:
        for name in leaves:
            del below[name]
        for found in below.values():
            found -= set(leaves)
    assert not below


def test_configs_need_neither_jax_nor_flax():
    """A bad value is refused before anything expensive happens."""
    code = "import sys, mtp_jax.config, mtp_jax.decode.config, mtp_jax.bench.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert not {"jax", "flax", "numpy", "tensorflow_datasets"} & set(loaded.stdout.split())
