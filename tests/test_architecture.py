from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT

OURS = ("shards", "configs", "codec", "pipeline", "trainer", "demo", "benchmarks")
STDLIB = set(sys.stdlib_module_names)
ALLOWED = {  # beyond the standard library and the package itself
    "shards": {"aiohttp", "fsspec", "huggingface_hub", "miniaudio", "numpy", "pyarrow", "webdataset"},
    "configs": {"pydantic", "click", "shards", "tqdm"},
}
OF_OURS = {  # which of our packages each one may import beside itself
    "shards": set(),
    "configs": {"shards"},
    "codec": {"shards"},
    "pipeline": {"shards", "configs", "codec"},
    "trainer": {"shards", "configs", "codec"},
}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@cache
def sources(package: str) -> dict[str, ast.Module]:
    """Name of the file → its syntax tree."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in files}


def imported(tree: ast.Module) -> Iterator[str]:
    """Top-level packages of every import, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test sees them"
            assert node.module
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and called(node) in ("importlib.import_module", "__import__"):
            assert not isinstance(node.args[0], ast.Constant) or str(node.args[0].value).split(".")[0] not in OURS


def imports_of(package: str) -> dict[str, set[str]]:
    return {file: set(imported(tree)) for file, tree in sources(package).items()}


def called(call: ast.Call) -> str:
    """`a.b.c` of a call a.b.c(…)."""
    parts, node = list[str](), call.func
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else ["?"]), *reversed(parts)])


def calls(package: str) -> Iterator[tuple[str, ast.Call, str]]:
    for file, tree in sources(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{file}:{node.lineno}", node, called(node)


def test_every_package_is_here() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == {*OURS, "tests"}
    assert all(len(sources(package)) > 1 for package in OURS)


@pytest.mark.parametrize("package", OF_OURS)
def test_packages_know_only_what_lies_below_them(package: str) -> None:
    for file, names in imports_of(package).items():
        assert names & {*OURS, "tests"} <= OF_OURS[package] | {package}, file


@pytest.mark.parametrize("package", ALLOWED)
def test_the_contract_and_the_settings_stay_light(package: str) -> None:
    for file, names in imports_of(package).items():
        assert names <= STDLIB | ALLOWED[package] | {package}, file


@pytest.mark.parametrize("package", [package for package in OURS if package not in ("pipeline", "benchmarks")])
def test_only_the_pipeline_knows_transformers(package: str) -> None:
    for file, names in imports_of(package).items():
        assert "transformers" not in names, file


def test_only_sidons_encoder_knows_transformers() -> None:
    assert [file for file, names in imports_of("pipeline").items() if "transformers" in names] == [
        "pipeline/sidon_encoder.py"
    ]


@pytest.mark.parametrize("package", OURS)
def test_nothing_is_unpickled(package: str) -> None:
    for file, names in imports_of(package).items():
        assert not names & UNPICKLERS, file
    for where, call, name in calls(package):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = None
        if name == "torch.load":
            value, wanted = given.get("weights_only"), True
        elif name in ("np.load", "numpy.load", "np.lib.format.read_array"):
            value, wanted = given.get("allow_pickle"), False
        else:
            assert name not in ("pandas.read_pickle", "pd.read_pickle"), where
            assert not name.startswith("webdataset.") or name.split(".")[1] != "autodecode", where
            continue
        assert isinstance(value, ast.Constant), where
        assert value.value is wanted, where
    for file, tree in sources(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy"):
                assert "load" not in {alias.name for alias in node.names}, file


@pytest.mark.parametrize("package", OURS)
def test_nothing_is_evaluated_and_no_shell_is_called(package: str) -> None:
    for where, call, name in calls(package):
        assert name not in ("eval", "exec", "os.system", "os.popen"), where
        assert not any(keyword.arg == "shell" for keyword in call.keywords), where


IMPORTS = """
import importlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print(*sorted(sys.modules))
"""


def import_without(blocked: str, modules: list[str]) -> list[str]:
    """Imports `modules` in a fresh process where `blocked` cannot be imported → all that it imported."""
    process = subprocess.run(
        [sys.executable, "-c", IMPORTS, blocked, ",".join(modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def modules_of(package: str) -> list[str]:
    """All but `__main__`."""
    files = [Path(file).with_suffix("") for file in sources(package)]
    return [".".join(file.parts) for file in files if file.name not in ("__main__", "__init__")]


def test_the_trainer_works_without_transformers_and_the_pipeline() -> None:
    modules = import_without("transformers,pipeline", modules_of("trainer"))
    assert "trainer.loop" in modules
    assert "torch" in modules


def test_the_contract_works_without_torch() -> None:
    modules = import_without("torch,click,pydantic,transformers,snac,huggingface_hub", modules_of("shards"))
    assert "shards.reader" in modules


def test_the_settings_work_without_anything_heavy() -> None:
    import_without("torch,pyarrow,transformers,numpy,soundfile,webdataset", modules_of("configs"))


def anchors(page: Path) -> set[str]:
    """Names that a Markdown page's headings have on the web."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [str(path.relative_to(ROOT)) for pages in ("*.md", "docs/*.md", "shards/*.md") for path in ROOT.glob(pages)]
)
def test_pages_are_finished_and_their_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not re.findall(r"\b(?:TODO|FIXME|[A-Z]+_(?:TIME|TABLE|FIGURE))\b", text)
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text):
        led = (ROOT / page).parent / target if target else ROOT / page
        assert led.exists(), target
        assert not anchor or anchor in anchors(led), f"{target}#{anchor}"
