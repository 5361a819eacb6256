"""A storage of fsspec on the local disk, `stuck:///folder`, that can be made to hang or be full.

Every process of a run finds it by its entry point, which `install` writes.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

TROUBLE = "WORLDFLUX_TEST_TROUBLE"  # names a file: what is in it, `hang` or `full`, befalls writes


class StuckFileSystem(LocalFileSystem):
    """Writes of weights wait for as long as the file of TROUBLE says `hang`."""

    protocol = ("stuck",)

    def _open(self, path: str, mode: str = "rb", **given: Any) -> Any:
        trouble = Path(os.environ[TROUBLE])
        if "w" in mode and path.endswith(".safetensors") and trouble.exists():
            (trouble.parent / "met").touch()
            if trouble.read_text() == "full":
                raise OSError(errno.ENOSPC, "no space left in the bucket")
            while trouble.exists():
                time.sleep(0.1)
        return super()._open(path, mode, **given)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given | {"auto_mkdir": True})


def install(folder: Path) -> None:
    """Have processes with `folder` on their path know the storage."""
    told = folder / "stuck_storage-1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: stuck-storage\nVersion: 1\n")
    (told / "entry_points.txt").write_text("[fsspec.specs]\nstuck=stuck_storage:StuckFileSystem\n")
