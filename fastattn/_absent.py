"""Why the compiled module cannot be imported. Imported itself only then, so it must do without NumPy."""

import importlib.util
from pathlib import Path


def why_absent(failure: ImportError) -> str:
    """Say what is the case, and what to do."""
    if failure.name is not None and failure.name.partition(".")[0] == "numpy":
        return f"fastattn needs NumPy, which cannot be imported ({failure}): pip install numpy"
    if importlib.util.find_spec("fastattn._core") is None:
        folder = Path(__file__).parent
        if not folder.is_dir():
            return (
                f"fastattn is in a zip archive ({folder.parent}), from which Python loads no compiled module: unpack it"
            )
        return (
            f"fastattn is not compiled in {folder}: if that is the source tree, build it there, pip install -e "
            f"{folder.parent}, or start Python in another folder or with -P, so that an installed fastattn is found"
        )
    return f"fastattn's compiled module cannot be imported: {failure}"
