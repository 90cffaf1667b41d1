"""The three ways to install name the same things, and the repository keeps its promises of form."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from irpo_utils import models

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and line[0] != "#"]
    return {name.lower().replace("_", "-"): version for name, version in pins}


def declared() -> list[str]:
    return PROJECT["dependencies"] + [
        d for extra in PROJECT["optional-dependencies"].values() for d in extra
    ]


@pytest.mark.parametrize("requirement", declared())
def test_lock_satisfies_every_declared_range(requirement):
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    assert parsed.name.lower() in locked(), f"{parsed.name} is not in requirements.lock"
    assert parsed.specifier.contains(locked()[parsed.name.lower()]), requirement


def test_lock_pins_torch_without_a_build_tag():
    assert locked()["torch"] == "2.13.0"
    assert not any("nvidia" in name or "+" in version for name, version in locked().items())


def test_conda_takes_python_and_pip_and_everything_else_from_the_lock():
    """environment.yml cannot drift from the lock, since it names nothing but the lock."""
    import yaml

    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert content["channels"] == ["conda-forge"]
    conda = [d for d in content["dependencies"] if isinstance(d, str)]
    [pip] = [d["pip"] for d in content["dependencies"] if isinstance(d, dict)]
    assert {re.split(r"[<>=]", d)[0] for d in conda} == {"python", "pip"}
    assert pip == ["--requirement requirements.lock", "--editable ."]
    assert f"python{PROJECT['requires-python']}" in conda


def test_make_installs_the_lock_and_readme_names_the_commands():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    assert "--requirement requirements.lock" in makefile
    for target in ("run", "test", "lab"):
        assert re.search(rf"^{target}:", makefile, re.M) and f"make {target}" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "pip install -e ." in readme and "python -m irpo_utils run" in readme


def test_python_range_is_said_once_the_same_everywhere():
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= v < (3, 14)" in (ROOT / "Makefile").read_text()
    assert "3.11" in (ROOT / "README.md").read_text() and "3.13" in (ROOT / "README.md").read_text()


def test_installed_package_carries_the_seed_models():
    assert PROJECT["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    folders = {f"{folder.name}/*" for folder in models.FOLDERS.values()}
    assert {*folders, "ops/*.yaml"} <= set(package_data["irpo_utils"])


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines()]


def test_no_pickles_and_no_evaluation_of_text_as_code():
    forbidden = re.compile(
        r"(?<![\w.])(?:eval|exec)\(|import pickle|trust_remote_code=True|weights_only=False"
    )
    for path in tracked():
        assert path.suffix not in {".pkl", ".pt", ".bin", ".pth"}, path
        if path.suffix == ".py" and "tests" not in path.parts:
            assert not forbidden.search(path.read_text()), path


def test_code_that_is_read_has_lines_of_a_readable_length():
    for path in tracked():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("irpo_utils", "scripts"):
            long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 135]
            assert not long, f"{path}: lines {long}"


def test_every_figure_has_its_table_and_its_record():
    for png in (ROOT / "figures").glob("*.png"):
        for suffix in (".svg", ".csv", ".json"):
            assert png.with_suffix(suffix).exists(), f"{png.name} lacks {suffix}"
