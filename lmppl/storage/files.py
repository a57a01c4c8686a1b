"""Files that are written whole or not at all, and the versions of what wrote them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path

from lmppl.errors import StorageError

__all__ = ["atomic_write", "versions"]

DISTRIBUTIONS = {
    "lmppl": "lmppl",
    "torch": "torch",
    "transformers": "transformers",
    "pyro": "pyro-ppl",
    "numpy": "numpy",
}


def versions() -> dict[str, str]:
    """Versions of Python, lmppl and what it computes with, from package metadata: imports nothing."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def atomic_write(path: str | Path, writer: Callable[[Path], object]) -> Path:
    """Write a file in one step: either the whole new file stands at `path`, or what stood there before.

    Parameters
    ----------
    path : str or Path
        Where the file goes; its folder must exist.
    writer : callable
        Writes the content to the path it is given, a new name in the same folder.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    StorageError
        With the path and the system's reason (no such folder, disk full, no permission).
    """
    path = Path(path)
    place = path.resolve()
    if place.exists() and not place.is_file():
        raise StorageError(f"cannot write {path}: it exists and is no regular file")
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(6)}.tmp")
    try:
        writer(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(place)
        _sync_folder(place.parent)
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        old = "; what stood there is as it was" if place.exists() else ""
        raise StorageError(f"cannot write {path}: {reason}{old}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename is durable by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
