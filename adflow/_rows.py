"""Where the rows of one feature level lie: RAM, or a nameless file; plumbing of ``features.py``."""

from __future__ import annotations

import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from adflow._files import write_error
from adflow.errors import InputError, ResourceError

Shape = tuple[int, int, int]  # (channels, height, width)


class Store(ABC):
    """Rows [C, h, w] of one level: appended one by one, then read in any order."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.count = 0
        self.closed = False

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def append(self, row: Tensor) -> None:
        """Add one contiguous row [1, C, h, w] of the store's dtype."""

    @abstractmethod
    def finish(self) -> None:
        """Allow reading."""

    @abstractmethod
    def whole(self) -> Tensor:
        """Return all rows [N, C, h, w], without copying where they lie together here; not to be written to."""

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> Tensor:
        """Return a copy of some rows [n, C, h, w]."""

    @abstractmethod
    def close(self) -> None:
        """Give the room back."""

    def check_open(self) -> None:
        """Raise InputError when the bank has been closed."""
        if self.closed:
            raise InputError("this feature bank has been closed", hint="Read it inside its `with` block.")


class RamStore(Store):
    """Rows in one tensor."""

    def __init__(self, shape: Shape, dtype: torch.dtype, capacity: int) -> None:
        super().__init__(shape, dtype)
        try:
            self.tensor = torch.empty((capacity, *shape), dtype=dtype)
        except (RuntimeError, MemoryError) as error:
            raise ResourceError(
                f"not enough RAM for {capacity} rows of features {shape}",
                hint="Lower --feature-memory, so that they go to disk, or store them as bfloat16 (--feature-dtype).",
            ) from error

    def append(self, row: Tensor) -> None:
        self.tensor[self.count] = row[0]
        self.count += 1

    def finish(self) -> None:
        self.tensor = self.tensor[: self.count]

    def whole(self) -> Tensor:
        self.check_open()
        return self.tensor

    def rows(self, indices: Sequence[int]) -> Tensor:
        self.check_open()
        return self.tensor[torch.tensor(indices, dtype=torch.long)]

    def close(self) -> None:
        self.tensor = torch.empty((0, *self.shape), dtype=self.dtype)
        self.closed = True


class DiskStore(Store):
    """Rows in a file without a name: it vanishes when closed, and also when the process is killed.

    Single rows are read with plain reads, so that the pages of a large file do not pile up in this process.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(shape, dtype)
        self.folder = folder
        try:
            self.file: IO[bytes] = tempfile.TemporaryFile(prefix="adflow-features-", dir=folder)  # noqa: SIM115
        except OSError as error:
            raise write_error(folder, error) from error
        self.lock = threading.Lock()
        self.bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize

    def append(self, row: Tensor) -> None:
        try:
            self.file.write(_bytes(row))
        except OSError as error:
            raise write_error(self.folder, error) from error
        self.count += 1

    def finish(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            raise write_error(self.folder, error) from error

    def whole(self) -> Tensor:
        self.check_open()
        # Mode "c": pages that somebody writes to become private copies, the file stays as it is.
        numbers = np.memmap(self.file, dtype=_numpy_dtype(self.dtype), mode="c", shape=(self.count, *self.shape))
        return torch.from_numpy(numbers).view(self.dtype)

    def rows(self, indices: Sequence[int]) -> Tensor:
        self.check_open()
        found = torch.empty((len(indices), *self.shape), dtype=self.dtype)
        with self.lock:
            for place, index in enumerate(indices):
                self.file.seek(index * self.bytes)
                chunk = self.file.read(self.bytes)
                if len(chunk) != self.bytes:
                    raise ResourceError(f"the feature file in {self.folder} is cut short", hint="Fit again.")
                _bytes(found[place])[:] = chunk
        return found

    def close(self) -> None:
        self.file.close()
        self.closed = True


class SubsetStore(Store):
    """Some rows of another store, which must stay open; nothing is copied until all of them are asked for."""

    def __init__(self, base: Store, chosen: Sequence[int]) -> None:
        super().__init__(base.shape, base.dtype)
        self.base = base
        self.chosen = list(chosen)
        self.count = len(self.chosen)

    def append(self, row: Tensor) -> None:
        raise InputError("a subset of features cannot grow", hint="Build a bank of all images.")

    def finish(self) -> None:
        """Nothing to do: the rows are there."""

    def whole(self) -> Tensor:
        self.check_open()
        return self.base.whole()[torch.tensor(self.chosen, dtype=torch.long)]

    def rows(self, indices: Sequence[int]) -> Tensor:
        self.check_open()
        return self.base.rows([self.chosen[i] for i in indices])

    def close(self) -> None:
        self.closed = True


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[np.generic]:
    """Return a numpy type of the same width; numpy has no bfloat16, whose bits travel as int16."""
    return np.dtype(np.int16 if dtype is torch.bfloat16 else str(dtype).removeprefix("torch."))


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor without copying."""
    return tensor.view(torch.uint8).numpy().data.cast("B")
