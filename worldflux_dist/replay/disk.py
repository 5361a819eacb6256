"""Whole files on a local disk or an object store: the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

Location = Any  # a pathlib.Path, or a UPath that is no local path (the library gives no base class)


class Disk:
    """The calls that make a write durable, each apart, so that a test can cut the power between."""

    def replace(self, path: Location, data: bytes, check: Callable[[], None]) -> None:
        """Make `data` the content of `path`, durably. `check` is called at the last moment.

        Raises OSError, and whatever `check` raises; the old content is then still there.
        """
        if not isinstance(path, Path):
            check()
            path.write_bytes(data)
            return
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                self.write(file, data)
                self.sync(file.fileno())
            check()
            self.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the folder itself may be gone
                temporary.unlink(missing_ok=True)
            raise
        self.sync_folder(path.parent)

    def write(self, file: Any, data: bytes) -> None:
        file.write(data)
        file.flush()

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, temporary: Path, path: Path) -> None:
        temporary.replace(path)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
