"""Who may import what: the layer table of the design, held by reading the imports. Nothing is run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffusers_edu"
SHIPPED = [
    *PACKAGE.glob("models/modeling_*.py"),
    *PACKAGE.glob("schedulers/scheduling_*.py"),
    *ROOT.glob("pipelines/pipeline_*.py"),
]
WORK = [path for folder in ("training", "evaluation", "hub") for path in (PACKAGE / folder).rglob("*.py")]
WORK += [PACKAGE / "schedulers" / "fitting.py"]
SCRIPTS = list(ROOT.glob("scripts/*.py"))
ALLOWED_IN_SHIPPED = {*sys.stdlib_module_names, "torch", "numpy", "diffusers", "transformers"}


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.relative_to(ROOT).as_posix())


def imports(source, module="m"):
    """Every name that a module imports, in full, wherever in it; `module` is its own full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            yield from (".".join([*package, *filter(None, [node.module]), alias.name]) for alias in node.names)


def has_relative_imports(source):
    return any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(ast.parse(source)))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def of_the_package(names):
    """The parts of this package among the imports: `training`, `rungs`, ... or a name taken from its top."""
    return {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "diffusers_edu"}


def runs_on_import(tree):
    """The top-level statements that do something other than define, import or guard a main."""
    for node in tree.body:
        guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        definition = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom)
        if not guard and not definition and any(isinstance(part, ast.Call) for part in ast.walk(node)):
            yield ast.unparse(node)


def test_the_reader_sees_every_kind_of_import():
    source = "import a.b\nfrom c import d\ndef f():\n    from ..models import e\n    from . import g\n    from .. import rungs"
    assert list(imports(source, "diffusers_edu.training.data")) == [
        "a.b", "c.d", "diffusers_edu.models.e", "diffusers_edu.training.g", "diffusers_edu.rungs",
    ]  # fmt: skip
    assert of_the_package(imports(source, "diffusers_edu.training.data")) == {"models", "training", "rungs"}
    assert of_the_package(["diffusers_edu", "diffusers_edu.VAEPipeline", "diffusers.X"]) == {"", "VAEPipeline"}
    assert has_relative_imports(source)
    assert not has_relative_imports("import a")
    assert list(runs_on_import(ast.parse("import a\nX = 1\nif __name__ == '__main__':\n    a.run()\na.run()"))) == ["a.run()"]


def test_the_files_that_the_rules_are_about_are_found():
    names = {path.name for path in SHIPPED}
    assert names >= {"modeling_stacked_dae.py", "modeling_vae.py", "scheduling_edu_ddpm.py", "pipeline_latent_diffusion.py"}
    assert {path.name for path in WORK} >= {"data.py", "objectives.py", "trainer.py"}


@by_name(SHIPPED)
def test_a_shipped_file_is_sufficient_to_itself(path):
    source = path.read_text()
    assert not has_relative_imports(source)
    assert {name.split(".")[0] for name in imports(source)} <= ALLOWED_IN_SHIPPED


def test_shipped_files_have_unique_names():
    # On a hub repository they land in one flat namespace.
    names = [path.stem for path in SHIPPED]
    assert len(set(names)) == len(names)


@by_name(WORK)
def test_training_evaluation_and_hub_import_their_own_folder_only(path):
    own = path.relative_to(PACKAGE).parts[0]
    assert of_the_package(imports(path.read_text(), module_of(path))) <= {own, "errors"}


@by_name(sorted(ROOT.glob("pipelines/pipeline_*.py")))
def test_a_pipeline_file_has_one_pipeline(path):
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    pipelines = [node.name for node in classes if any(ast.unparse(base).endswith("Pipeline") for base in node.bases)]
    assert len(pipelines) == 1
    assert pipelines[0].removesuffix("Pipeline").lower() == path.stem.removeprefix("pipeline_").replace("_", "")


@by_name(SCRIPTS)
def test_importing_a_script_does_nothing(path):
    assert list(runs_on_import(ast.parse(path.read_text()))) == []
