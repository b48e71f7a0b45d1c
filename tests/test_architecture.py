"""The house: imports go downwards only, and the parent never imports torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "daemon" / "promptdrop"

# A file imports only from a lower floor. `cli` is the roof; `__init__` names the version.
FLOORS = [
    ["__init__", "errors", "engines.rows"],
    ["clock", "fs", "sdnotify", "log", "names", "yaml12", "engines.triton_kernels"],
    ["job", "control", "engines.kernels"],
    ["config", "records", "infotext", "engines.quantization"],
    ["request_data", "engines.text", "metrics", "messages", "picture", "weights"],
    ["request_text", "spool", "engine", "engines.schedulers", "exporter", "inbox", "terminal"],
    ["request", "publish", "queue", "client", "worker", "loop"],
    ["reading", "engines.gradient", "engines.memory", "engines.speed", "engine_link"],
    ["engine_process", "intake", "script", "engines.zimage"],
    ["ray_host", "pool"],
    ["cluster"],
    ["doctor", "ray_gateway"],
    ["ray_view"],
    ["supervisor"],
    ["generate", "timing"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> list[str]:
    """Every module of the package, dotted below it."""
    paths = [p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py")]
    return sorted(".".join(path.parts) for path in paths if path.parts[-1:] != ("engines",))


def imported(module: str) -> set[str]:
    """Which modules of ours a module imports, at its top or anywhere inside."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "promptdrop":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("promptdrop."):
            found.add((node.module or "").removeprefix("promptdrop."))
    return {name if name in FLOOR else "__init__" for name in found}


def test_every_module_has_a_floor() -> None:
    """A new file is placed on purpose."""
    named = {name for name in modules() if name not in ("engines.__init__",)}

    assert named == set(FLOOR)


@pytest.mark.parametrize("module", [m for m in FLOOR if m not in ("__init__",)])
def test_imports_go_down(module: str) -> None:
    """A file imports only from lower floors."""
    upwards = {name for name in imported(module) if FLOOR[name] >= FLOOR[module]}

    assert upwards == set()


@pytest.mark.parametrize(
    "statement",
    [
        "import promptdrop",
        "import promptdrop.cli, promptdrop.supervisor, promptdrop.doctor, promptdrop.generate",
        "import promptdrop.client, promptdrop.terminal, promptdrop.reading",
        "import promptdrop.worker, promptdrop.weights, promptdrop.engines.gradient",
    ],
)
def test_the_parent_never_imports_torch(statement: str) -> None:
    """Importing the daemon and its commands pulls in no torch, diffusers, transformers or modelscope."""
    heavy = "{'torch', 'diffusers', 'transformers', 'modelscope', 'numpy'}"
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"

    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert printed == "[]\n"


def test_the_shipped_configurations_are_one() -> None:
    """config.yaml at the top is what `promptdrop init` writes."""
    top = (PACKAGE.parent.parent / "config.yaml").read_text()

    assert top == (PACKAGE / "config.yaml").read_text()
