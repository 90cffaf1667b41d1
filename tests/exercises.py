"""Solutions and stubs of the exercises, as the sources of the notebooks have them."""

import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
sys.path[:0] = [str(NOTEBOOKS), str(NOTEBOOKS.parent / "scripts")]


def defined(notebook: str, name: str, solved: bool = True, begins: str | None = None, **scope):
    """What the one code cell of a notebook with `begins` (by default `def name(`) defines as `name`, solved or as a stub.

    `scope`: what earlier cells have imported.
    """
    from make_notebooks import view

    cells = view((NOTEBOOKS / "source" / f"{notebook}.py").read_text(), solved).cells
    [cell] = [
        cell
        for cell in cells
        if cell.cell_type == "code" and (begins or f"def {name}(") in cell.source
    ]
    exec(cell.source, scope)
    return scope[name]
