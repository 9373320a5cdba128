"""Execute notebooks from top to bottom: `python notebooks/run.py [--write] [notebook ...]`.

Needs the extra `notebooks`. Stops at the first cell that fails. `--write` keeps the new outputs in the files.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Execute notebooks from top to bottom.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="files (default: all beside this script)")
    parser.add_argument("--write", action="store_true", help="keep the new outputs in the files")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take")
    arguments = parser.parse_args()
    paths = arguments.notebooks or sorted(HERE.glob("*.ipynb"))
    if not paths:
        print(f"there are no notebooks in {HERE}", file=sys.stderr)
        return 1
    for path in paths:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        client = NotebookClient(
            notebook,
            timeout=arguments.timeout,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            client.execute()
        except CellExecutionError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        if arguments.write:
            nbformat.write(notebook, path)
        print(f"{path}: {len(notebook.cells)} cells in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
