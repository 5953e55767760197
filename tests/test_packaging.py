"""The package: what it installs is what the scripts need, and every file says the same of it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project():
    """pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported(module):
    """Files of ours that a file of ours imports."""
    nodes = list(ast.walk(ast.parse((ROOT / f"{module}.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name for name in names if (ROOT / f"{name}.py").exists()}


def test_modules_that_are_installed_need_no_other_of_ours(project):
    modules = set(project["tool"]["setuptools"]["py-modules"])
    assert modules == {"varibad_hyper", "rl2_hyper", "hyperinit", "gridworld"}
    assert set().union(*map(imported, modules)) <= modules


def test_python_versions_are_the_same_everywhere(project):
    least, below = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["project"]["requires-python"]).groups()
    versions = [f"3.{minor}" for minor in range(int(least), int(below))]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == versions and "bash .ci/run" in workflow
    assert f"with Python {versions[0]} to {versions[-1]}:" in (ROOT / "README.md").read_text()
    assert project["tool"]["ruff"]["target-version"] == f"py{versions[0].replace('.', '')}"


def test_citation_names_this_version_and_the_paper(project):
    citation = (ROOT / "CITATION.cff").read_text()
    readme = (ROOT / "README.md").read_text()
    assert f"\nversion: {project['project']['version']}\n" in citation
    names = re.findall(r"given-names: (.*)\n +family-names: (.*)", citation)
    assert " and ".join(f"{last}, {first}" for first, last in names) == re.search(r"author += {(.*)}", readme)[1]
    assert re.search(r"title += {(.*)}", readme)[1] in re.findall(r"^ +title: (.*)$", citation, re.M)
    assert f"year: {re.search(r'year += {(.*)}', readme)[1]}\n" in citation


@pytest.mark.slow
def test_installs_and_is_imported_from_elsewhere(tmp_path):
    """As `pip install -e .` does, but without the dependencies, which are here already."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "README.md", ROOT / "LICENSE"]:
        shutil.copy(file, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    done = subprocess.run([*pip, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    code = """
import gymnasium as gym
import gridworld, hyperinit, varibad_hyper, rl2_hyper
for module in (gridworld, hyperinit, varibad_hyper, rl2_hyper):
    print(module.__file__)
print(gym.make("GridWorld-v0").reset()[0])
"""
    env = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *files, observation = done.stdout.splitlines()
    assert {Path(file).parent for file in files} == {target} and observation == "[0. 0.]"

    (metadata,) = target.glob("*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.M)
    listed = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-optional.txt").read_text()
    pins = [line for line in listed.splitlines() if not line.startswith("#")]
    assert sorted(re.split(r"[=;]", line)[0].strip() for line in needed) == sorted(
        line.partition("==")[0] for line in pins
    )
    for line in needed:
        name, pinned = re.match(r"([\w-]+)==([\w.]+)", line).groups()
        assert any(pin.startswith(f"{name}=={pinned}") for pin in pins)
