"""The set-up cell for Colab: what it installs, when it asks for a restart, and where it leads."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

import set_up_runtime  # noqa: E402  in scripts/


@pytest.fixture
def runtime(monkeypatch, tmp_path):
    """A runtime with torch 2.6, torchvision and numpy, of which torch and numpy are imported."""
    installed = {"torch": "2.6.0", "torchvision": "0.21.0", "numpy": "2.1.0", "pip": "25.0"}
    calls = []

    def pip(*arguments):
        calls.append(arguments)
        if arguments[0] == "install":
            installed.update(pip.new)
        else:
            for name in arguments[3:]:
                del installed[name]

    pip.new, pip.calls = {"irpo-utils": "1.0", "pip": "26.0"}, calls
    monkeypatch.setattr(set_up_runtime, "pip", pip)
    monkeypatch.setattr(set_up_runtime, "versions", lambda: dict(installed))
    monkeypatch.setattr(set_up_runtime, "imported_packages", lambda: {"torch", "numpy", "pip"})
    monkeypatch.chdir(tmp_path)
    return pip


def test_ready_where_nothing_in_use_was_replaced(runtime, capsys):
    set_up_runtime.main()
    assert runtime.calls == [("install", "--quiet", "--editable", str(ROOT))]
    assert Path.cwd() == ROOT / "notebooks"
    assert capsys.readouterr().out.startswith("Ready.")


def test_asks_for_a_restart_and_is_ready_after_it(runtime, capsys):
    runtime.new["numpy"] = "2.4.0"
    set_up_runtime.main()
    said = capsys.readouterr().out
    assert "Replaced while in use: numpy." in said and "Restart" in said and "Ready" not in said
    set_up_runtime.main()
    assert capsys.readouterr().out.startswith("Ready.")


def test_what_was_compiled_for_the_replaced_torch_is_removed(runtime, capsys):
    runtime.new["torch"] = "2.13.0"
    set_up_runtime.main()
    assert runtime.calls[1:] == [("uninstall", "--quiet", "--yes", "torchvision")]
    assert "torch." in capsys.readouterr().out


def test_torchvision_that_came_with_the_new_torch_stays(runtime):
    runtime.new |= {"torch": "2.13.0", "torchvision": "0.28.0"}
    set_up_runtime.main()
    assert len(runtime.calls) == 1


def test_a_failed_installation_is_reported():
    with pytest.raises(RuntimeError, match="no-such-option"):
        set_up_runtime.pip("--no-such-option")


def test_versions_and_imported_packages_of_this_process():
    versions = set_up_runtime.versions()
    assert versions["pytest"] == pytest.__version__
    assert "pytest" in set_up_runtime.imported_packages() <= set(versions)


def test_the_documented_cell_runs_twice_in_a_notebook_kernel(tmp_path):
    """With a small repository in place of this one. pip reports what it would do."""
    page = (ROOT / "docs" / "colab.md").read_text()
    [cell] = re.findall(r"```\n(.*?)```", page, re.S)
    assert all(line in set_up_runtime.__doc__ for line in cell.splitlines())

    origin, clone = tmp_path / "origin", tmp_path / "irpo"
    for folder in ("scripts", "notebooks"):
        (origin / folder).mkdir(parents=True)
    shutil.copy(set_up_runtime.__file__, origin / "scripts")
    (origin / "notebooks" / "00.ipynb").touch()
    project = '[project]\nname = "small"\nversion = "1"\n[tool.setuptools]\npackages = []\n'
    (origin / "pyproject.toml").write_text(project)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "small"]):
        subprocess.run([*git, *words], cwd=origin, check=True)

    cell = cell.replace("https://github.com/OWNER/NAME", f"file://{origin}")
    program = tmp_path / "kernel.py"
    program.write_text(
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell()\n"
        f"for _ in range(2):\n    shell.run_cell({cell!r}).raise_error()\n"
        "import os; print(os.getcwd())\n"
    )
    environment = {"HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")}
    environment |= {"PIP_DRY_RUN": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Ready.") == 2 and "already exists" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(clone / "notebooks")
