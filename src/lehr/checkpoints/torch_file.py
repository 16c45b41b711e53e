r"""PyTorch's files without PyTorch, and without running what is in them.

``torch.save`` writes a pickle beside raw storages: a zip archive with ``data.pkl`` and
``data/KEY``, or in the older format one stream of pickles followed by the storages. A pickle is a
program that may call anything, so this reader lets it call nothing but the few
constructors below, which rebuild arrays as views of storages: dictionaries, tensors,
parameters, sizes and sets. It reads the whole program first and refuses one that names
anything else. Sizes and views are checked against the bytes that are there, so that a
small file cannot ask for much memory.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from lehr.checkpoints.errors import CheckpointError

__all__ = ["Storage", "read_torch"]

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LARGEST_PICKLE = 100_000_000  # bytes of structure, tensors not counted
FORBIDDEN = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}  # other ways to call or to make something
DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class Storage(NamedTuple):
    """A flat run of numbers, of which tensors are views."""

    values: np.ndarray


class Tensor(NamedTuple):
    """A rebuilt array, out of a pickle's reach until all of it is read: arrays have a state that one could set."""

    array: np.ndarray


class Constructor:
    """A function that a pickle may call, and may do nothing else to."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise CheckpointError("a pickle tries to change a function of this program; it is refused.")


def read_torch(source: Path | bytes) -> Any:
    """What a file of ``torch.save`` holds, its tensors as numpy arrays.

    Args:
        source: the file, or its bytes.

    Returns:
        Dictionaries, lists, tuples, sets, strings, numbers and read-only arrays.

    Raises:
        CheckpointError: if it is not such a file, is damaged, or asks for anything beyond tensors.
    """
    name = "a stored tensor" if isinstance(source, bytes) else str(source)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            return _read_zip(file, name) if file.read(4) == b"PK\x03\x04" else _read_stream(file, name)
    except CheckpointError:
        raise
    except (
        pickle.UnpicklingError, zipfile.BadZipFile, AttributeError, EOFError, IndexError, KeyError, NotImplementedError,
        MemoryError, OverflowError, RecursionError, RuntimeError, TypeError, UnicodeDecodeError, ValueError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{name} is not a PyTorch file, or is damaged ({error}).") from error


def _read_zip(file: BinaryIO, name: str) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        size = file.seek(0, io.SEEK_END)
        if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries.values()):
            raise CheckpointError(f"{name} is a compressed archive, which PyTorch does not write; it is refused.")
        if sum(e.file_size for e in entries.values()) > size or len(entries) != len(archive.infolist()):
            raise CheckpointError(f"{name} is an archive whose entries overlap; it is refused.")
        programs = [n for n in entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(programs) != 1:
            raise CheckpointError(f"{name} is an archive, but not one of torch.save: it has no single data.pkl.")
        root = programs[0].removesuffix("data.pkl")
        if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
            raise CheckpointError(f"{name} was written on a big-endian machine; save it again on a common one.")
        storages: dict[str, Storage] = {}

        def storage(dtype: np.dtype[Any], key: str, length: int) -> Storage:
            if key not in storages:
                entry = entries.get(f"{root}data/{key}")
                if entry is None or entry.file_size != length * dtype.itemsize:
                    raise CheckpointError(f"{name} lacks storage {key!r}, or it has not the {length} entries stated.")
                storages[key] = Storage(np.frombuffer(archive.read(entry), dtype))
            if storages[key].values.dtype != dtype or storages[key].values.size != length:
                raise CheckpointError(f"{name} states two types or lengths for storage {key!r}.")
            return storages[key]

        return Reader(io.BytesIO(archive.read(programs[0])), name, storage).read()


def _read_stream(file: BinaryIO, name: str) -> Any:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    blank: dict[str, Storage] = {}

    def storage(dtype: np.dtype[Any], key: str, length: int) -> Storage:
        if key not in blank:
            spoken_for = sum(s.values.nbytes for s in blank.values())
            if spoken_for + length * dtype.itemsize > size:
                raise CheckpointError(f"{name} is truncated: storage {key!r} is larger than what is there.")
            blank[key] = Storage(np.zeros(length, dtype))
        if blank[key].values.dtype != dtype or blank[key].values.size != length:
            raise CheckpointError(f"{name} states two types or lengths for storage {key!r}.")
        return blank[key]

    if (Reader(file, name).read(), Reader(file, name).read()) != (MAGIC, PROTOCOL):
        raise CheckpointError(f"{name} is not a file of torch.save: it begins with something else.")
    if Reader(file, name).read().get("little_endian") is not True:
        raise CheckpointError(f"{name} was written on a big-endian machine; save it again on a common one.")
    content = Reader(file, name, storage).read()
    keys = Reader(file, name).read()
    if sorted(keys) != sorted(blank):
        raise CheckpointError(f"{name} states other storages than it uses.")
    for key in keys:
        values = blank[key].values
        if int.from_bytes(file.read(8), "little") != values.size:
            raise CheckpointError(f"{name} is damaged: storage {key!r} has another length than stated.")
        data = file.read(values.nbytes)
        if len(data) != values.nbytes:
            raise CheckpointError(f"{name} is truncated in storage {key!r}.")
        values[...] = np.frombuffer(data, values.dtype)
    return content


class Reader(pickle.Unpickler):
    """An unpickler that rebuilds tensors and refuses everything else.

    Args:
        file: positioned at a pickle; left after it.
        name: of the file, for errors.
        storage: from type, key and length to the storage; None where there can be none.
    """

    allowed: ClassVar[dict[str, Any]] = {}
    forbidden: ClassVar[set[str]] = FORBIDDEN

    def __init__(
        self, file: BinaryIO, name: str, storage: Callable[[np.dtype[Any], str, int], Storage] | None = None
    ) -> None:
        _scan(file, name, self.forbidden)
        super().__init__(file)
        self.name, self.storage = name, storage

    def read(self) -> Any:
        """What the pickle holds."""
        return _unwrap(self.load())

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a constructor; refuses those that are not needed for tensors."""
        known = {**KNOWN, **self.allowed}
        if f"{module}.{name}" not in known:
            raise CheckpointError(
                f"{self.name} asks for {module}.{name}, which is no part of a tensor. It is not run. "
                "Save the bare weights, torch.save(model.state_dict(), …), or as safetensors."
            )
        return known[f"{module}.{name}"]

    def persistent_load(self, identity: Any) -> Storage:
        """The storage that a tensor is a view of."""
        kind, type_of, key, _, length, *view = identity
        dtype = type_of._make() if isinstance(type_of, Constructor) else None
        if self.storage is None or kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise CheckpointError(f"{self.name} refers to {identity!r:.100}, which is no storage.")
        if not isinstance(key, str) or not isinstance(length, int) or length < 0:
            raise CheckpointError(f"{self.name} has a storage of key {key!r} and length {length!r}.")
        return self.storage(dtype, key, length)


def _scan(file: BinaryIO, name: str, forbidden: set[str]) -> None:
    """Read a pickle through without running it; refuse one that is more than data and calls by name."""
    start = file.tell()
    for operation, argument, position in pickletools.genops(file):
        read = (position or 0) - start
        if operation.name in forbidden:
            raise CheckpointError(f"{name} is a pickle with {operation.name}, which no tensor needs; it is not run.")
        if "PUT" in operation.name and int(argument or 0) > read:
            raise CheckpointError(f"{name} is a pickle with a memo out of all proportion; it is not run.")
        if read > LARGEST_PICKLE:
            raise CheckpointError(f"{name} holds more structure than a model has; it is not read.")
    file.seek(start)


def _unwrap(value: Any) -> Any:
    """``value`` with its tensors as arrays."""
    match value:
        case Tensor():
            return value.array
        case dict():
            return {_unwrap(k): _unwrap(v) for k, v in value.items()}
        case list() | set():
            return type(value)(map(_unwrap, value))
        case tuple() if not isinstance(value, Storage):
            return tuple(map(_unwrap, value))
        case Constructor():
            raise CheckpointError("a function stands where data should be; it is refused.")
    return value


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    counts = (offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > 32:
        raise CheckpointError("a tensor is no view of a storage.")
    if not all(isinstance(n, int) and n >= 0 for n in counts):
        raise CheckpointError(f"a tensor has offset {offset!r}, size {size!r} and stride {stride!r}.")
    values, length = storage.values, math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if length else 0
    if length > values.size or (length and last >= values.size):
        raise CheckpointError(f"a tensor of size {tuple(size)} reaches beyond its storage of {values.size} entries.")
    steps = [step * values.itemsize for step in stride]
    return Tensor(np.lib.stride_tricks.as_strided(values[offset:], tuple(size), steps, writeable=False))


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"a parameter is no tensor but a {type(tensor).__name__}.")
    return tensor


class _Dictionary(dict[Any, Any]):
    """An OrderedDict, whose attributes (a state dict's metadata) are dropped."""

    def __setstate__(self, _: Any) -> None: ...


KNOWN: dict[str, Any] = {
    "collections.OrderedDict": Constructor(_Dictionary),
    "torch._utils._rebuild_tensor_v2": Constructor(_rebuild_tensor),
    "torch._utils._rebuild_parameter": Constructor(_rebuild_parameter),
    "torch.Size": Constructor(tuple),
    "builtins.set": Constructor(set),
    "__builtin__.set": Constructor(set),
    **{f"torch.{kind}": Constructor(functools.partial(np.dtype, dtype)) for kind, dtype in DTYPES.items()},
}
