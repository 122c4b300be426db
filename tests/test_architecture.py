"""The tree is the data flow: imports go downwards only, and the library knows nothing of Ray."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the corpus to the served name. A module imports from its own line and from the lines above.
# A room's name stands for all modules in it that have no line of their own.
FLOW = (
    "errors files",
    "settings",
    "engine_config",
    "serve_config",
    "records config",
    "documents",
    "template cartridge readers tables norms",
    "jsonl",
    "download models corpus chunking prompts",
    "merged_attention flex_attention row_attention attention forward engines.base compose",
    "selfstudy",
    "distill",
    "artifact corpus_text store archive registry",
    "collection",
    "engines distill.initialize",  # a start may be an artifact
    "evaluation",
)
RANK = {place: rank for rank, line in enumerate(FLOW) for place in line.split()}
RIM_ONLY = {"ray", "workflows"}

# The packages of `workflows`, in the order of the flow. A package imports from itself and from those before it.
STAGES = ("runtime", "synthesis", "training", "evaluation", "building", "serving", "bench", "job", "cli",
          "demo")


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


LIBRARY = modules("cartridges")
WORKFLOWS = modules("workflows")
EVERYTHING = {**LIBRARY, **WORKFLOWS}


def imports(name: str) -> set[str]:
    """Full names of the modules that `name` imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(EVERYTHING[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {_module_of(full) for full in found}


def _module_of(full: str) -> str:
    return full if full in EVERYTHING else full.rpartition(".")[0] or full


@pytest.mark.parametrize("name", LIBRARY)
def test_library_never_imports_the_rim(name):
    assert not {full.split(".")[0] for full in imports(name)} & RIM_ONLY


def rank(name: str) -> int:
    """Line of FLOW on which the library module `name` stands, by its own name or its room's."""
    place = name.removeprefix("cartridges.")
    while place and place not in RANK:
        place = place.rpartition(".")[0]
    assert place, f"{name} has no place in the data flow: put it into FLOW in {Path(__file__).name}"
    return RANK[place]


@pytest.mark.parametrize("name", [name for name in LIBRARY if name != "cartridges"])
def test_imports_go_down_the_data_flow(name):
    upwards = {used for used in imports(name) if used in LIBRARY and rank(used) > rank(name)}
    assert not upwards


def stage(name: str) -> int:
    """Place in STAGES of the module `workflows.<package>[.<module>]`."""
    return STAGES.index(name.split(".")[1])


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name != "workflows"])
def test_stages_import_downwards(name):
    used = {used for used in imports(name) if used in WORKFLOWS and used != "workflows"}
    assert not {one for one in used if stage(one) > stage(name)}


def test_packages_are_installed():
    from setuptools import find_packages

    folders = {path.parent.relative_to(ROOT) for path in WORKFLOWS.values()}
    assert {".".join(folder.parts) for folder in folders} == set(find_packages(str(ROOT), include=["workflows*"]))


def test_reading_training_data_needs_nothing_of_what_wrote_it():
    needed, waiting = set(), {"cartridges.selfstudy.storage"}
    while waiting:
        needed |= waiting
        waiting = {used for name in waiting for used in imports(name) if used in LIBRARY} - needed
    assert needed == {"cartridges.selfstudy.storage", "cartridges.records", "cartridges.errors"}


def test_imports_have_no_cycle():
    """The modules can be laid in a line in which every import points to an earlier one."""
    waiting = {name: {used for used in imports(name) if used in EVERYTHING} - {name} for name in EVERYTHING}
    while waiting:
        # Whoever imports nobody left, or is imported by nobody left, is in no cycle.
        imported = set().union(*waiting.values())
        free = {name for name, used in waiting.items() if not used & set(waiting) or name not in imported}
        assert free, f"import cycle among {sorted(waiting)}"
        for name in free:
            del waiting[name]
