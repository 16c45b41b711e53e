r"""The pickles of EDM (Karras et al., 2022), read as records.

An EDM checkpoint pickles its networks together with the Python source of their classes,
which unpickling would execute. Here each network becomes a record of what it was made
with and what it holds, and the source is left where it is:

    Record(class_name, arguments, tensors)    tensors by path, "model.enc.64x64_conv.weight"

To use one, rebuild its network in any framework and give it to :class:`lehr.ScoreNetwork` with
``prediction="edm"``, ``time_input="log_ratio/4"`` and the record's ``sigma_data``.

References:
    Karras et al., Elucidating the design space of diffusion models, NeurIPS 2022.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lehr.checkpoints.errors import CheckpointError
from lehr.checkpoints.torch_file import FORBIDDEN, Constructor, Reader, Storage, Tensor, read_torch

__all__ = ["Record", "read_edm"]


class Record(NamedTuple):
    """A network as it was pickled.

    Attributes:
        class_name: of the outermost module, such as ``"EDMPrecond"``.
        arguments: what it was made with, by name.
        attributes: its plain attributes, such as ``sigma_data``.
        tensors: its parameters and buffers by path.
    """

    class_name: str
    arguments: dict[str, Any]
    attributes: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_edm(file: str | Path, entry: str = "ema") -> Record:
    """The network in an EDM pickle. Nothing in the file is run.

    Args:
        file: a ``.pkl``.
        entry: which of its networks; the averaged one is ``"ema"``.

    Raises:
        CheckpointError: if it is damaged, asks for anything beyond networks, or has no such entry.
    """
    file = Path(file)
    try:
        with file.open("rb") as opened:
            content = _RecordReader(opened, str(file)).read()
    except CheckpointError:
        raise
    except (
        pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, MemoryError, OverflowError,
        RecursionError, TypeError, UnicodeDecodeError, ValueError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{file} is not an EDM pickle, or is damaged ({error}).") from error
    module = content.get(entry) if isinstance(content, dict) else None
    if not isinstance(module, _Module):
        there = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file} has no network {entry!r}; there is {there}.")
    tensors: dict[str, np.ndarray] = {}
    module.collect("", tensors, depth=0)
    arguments = _plain(module.state.get("_init_kwargs", {}))
    return Record(module.class_name, arguments, _plain(module.state), tensors)


def _plain(state: Any) -> dict[str, Any]:
    """The entries of ``state`` that are numbers, strings or lists of them."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return value is None or isinstance(value, bool | int | float | str)

    return {str(k): v for k, v in state.items() if is_plain(v)} if isinstance(state, dict) else {}


class _Module:
    """A module's state without its class."""

    class_name = "module"

    def __init__(self, state: Any = None, class_name: str = "module") -> None:
        self.class_name = class_name
        self.__setstate__(state or {})

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise CheckpointError("a module's state is no dictionary.")
        self.state: dict[Any, Any] = state

    def collect(self, prefix: str, tensors: dict[str, np.ndarray], depth: int) -> None:
        """Put all arrays below this module into ``tensors``, by path."""
        if depth > 50:
            raise CheckpointError("modules are nested deeper than a network is.")
        for kind in ("_parameters", "_buffers"):
            for name, value in dict(self.state.get(kind) or {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{prefix}{name}"] = value.array
        for name, child in dict(self.state.get("_modules") or {}).items():
            if isinstance(child, _Module):
                child.collect(f"{prefix}{name}.", tensors, depth + 1)


def _reconstruct(meta: Any) -> _Module:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise CheckpointError("a record of a class lacks its name.")
    return _Module(meta.get("state"), meta["class_name"])


def _storage(data: Any) -> Storage:
    content = read_torch(data) if isinstance(data, bytes) else None
    if not isinstance(content, Storage):
        raise CheckpointError("a stored tensor is no storage.")
    return content


class _Number(NamedTuple):
    """The type of a numpy scalar; its state, the byte order, is the common one."""

    name: Any

    def __setstate__(self, _: Any) -> None: ...


def _scalar(dtype: Any, data: Any) -> int | float:
    if not isinstance(dtype, _Number) or dtype.name not in ("f8", "f4", "i8", "i4") or not isinstance(data, bytes):
        raise CheckpointError("a number is of no known type.")
    return np.frombuffer(data, "<" + dtype.name, count=1)[0].item()


class _RecordReader(Reader):
    """Tensors and records of modules; the source of their classes is data like any other."""

    forbidden: ClassVar[set[str]] = FORBIDDEN - {"NEWOBJ"}
    allowed: ClassVar[dict[str, Any]] = {
        "torch_utils.persistence._reconstruct_persistent_obj": Constructor(_reconstruct),
        "torch.storage._load_from_bytes": Constructor(_storage),
        "dnnlib.util.EasyDict": dict,
        "numpy.dtype": Constructor(lambda name, *_: _Number(name)),
        "numpy.core.multiarray.scalar": Constructor(_scalar),
        "numpy._core.multiarray.scalar": Constructor(_scalar),
        "torch.nn.modules.container.ModuleDict": _Module,
        "torch.nn.modules.container.ModuleList": _Module,
        "torch.nn.modules.container.Sequential": _Module,
    }
