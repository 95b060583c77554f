"""Execute notebooks, and leave in them what they found and nothing of the machine they ran on.

    python experiments/notebooks/execute.py                                 # all of them, in place
    python experiments/notebooks/execute.py FILE.ipynb --out OTHER.ipynb    # one, and leave FILE as it is

Each runs in its own directory, with the environment's variables (`RUN`, `STEPS`). Needs the extra `notebooks`. In place
of the repository's path the outputs have nothing, so that paths in it are relative; there are no times, and a cell
that fails ends it with the cell's traceback and leaves the file as it was.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs. Raises `nbclient.exceptions.CellExecutionError` where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    options: dict[str, Any] = {"kernel_name": "python3", "timeout": 1800, "record_timing": False}
    with tempfile.TemporaryDirectory() as sockets:
        # Not TCP: on a shared machine nobody else may listen, or speak to the kernel.
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        NotebookClient(notebook, resources={"metadata": {"path": str(HERE)}}, config=config, **options).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [portable(output) for output in joined(cell.outputs)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbouring pieces of one stream made one: how it was cut is a matter of timing."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == "stream" and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def portable(value: Any) -> Any:
    """An output in which paths are relative to the repository."""
    if isinstance(value, dict):
        return nbformat.from_dict({key: portable(item) for key, item in value.items()})
    return re.sub(f"{re.escape(str(REPOSITORY))}/?", "", value) if isinstance(value, str) else value


def main() -> None:
    """Execute the notebooks that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--out", type=Path, help="where to write the one notebook that is given")
    options = parser.parse_args()
    if options.out and len(options.files) != 1:
        parser.error(f"--out is one file and {len(options.files)} notebooks are given; give one.")
    for path in options.files:
        nbformat.write(execute(path), options.out or path)


if __name__ == "__main__":
    main()
