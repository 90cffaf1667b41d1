"""Set up a fresh notebook runtime such as Colab. This cell comes first in the notebook:

    ![ -d ~/irpo ] || git clone --quiet --depth 1 https://github.com/OWNER/NAME ~/irpo
    %run ~/irpo/scripts/set_up_runtime.py

It installs the packages and changes to the folder notebooks/. Packages of the runtime stay as they
are if pyproject.toml allows their versions. If a package that is already imported was replaced, the
runtime must restart; then run the cell again, which takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTALLERS = {"pip", "setuptools", "wheel"}  # the notebooks do not use them: no restart
# Compiled for one version of torch; transformers imports them where they are installed.
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    before = versions()
    imported = imported_packages() - INSTALLERS
    pip("install", "--quiet", "--editable", str(ROOT))
    after = versions()
    if "torch" in before and before["torch"] != after.get("torch"):
        stale = [name for name in BUILT_FOR_TORCH if before.get(name, "") == after.get(name)]
        if stale:
            pip("uninstall", "--quiet", "--yes", *stale)
            after = versions()
    os.chdir(ROOT / "notebooks")
    replaced = sorted(name for name in imported if before.get(name) != after.get(name))
    if replaced:
        print(f"Replaced while in use: {', '.join(replaced)}.")
        print("Restart the runtime (in Colab: Runtime > Restart session) and run this cell again.")
    else:
        print(f"Ready. The working folder is {Path.cwd()}. Run the next cell.")


def pip(*arguments: str) -> None:
    """Run pip for this Python. Raises `RuntimeError` with pip's message if it fails."""
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)} failed:\n{done.stderr.strip()[-2000:]}")


def versions() -> dict[str, str]:
    """Installed packages and their versions; names in small letters."""
    importlib.invalidate_caches()
    found = importlib.metadata.distributions()
    return {d.metadata["Name"].lower(): d.version for d in found if d.metadata["Name"]}


def imported_packages() -> set[str]:
    """Packages of which this process has imported a module; names in small letters."""
    packages = importlib.metadata.packages_distributions()
    modules = {name.partition(".")[0] for name in list(sys.modules)}
    return {package.lower() for name in modules for package in packages.get(name, [])}


if __name__ == "__main__":
    main()
