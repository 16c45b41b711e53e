"""A run as one xarray tree, which ArviZ reads in either of its generations.

ArviZ 1.x works on :class:`xarray.DataTree` itself; 0.x wraps the same tree in its
``InferenceData``. The file format is netCDF by way of h5netcdf for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lehr.annealing.run import Run

__all__ = ["from_netcdf", "to_arviz", "to_netcdf", "to_xarray"]

_IS_DATATREE = int(version("arviz").split(".")[0]) >= 1


def to_xarray(
    run: Run,
    prior: Mapping[str, Any] | None = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """The tree of ``run``; see :meth:`lehr.Run.to_arviz` for its groups.

    Raises:
        ValueError: if what is given has not one draw for each of the posterior's.
    """
    groups = {
        "/posterior": _dataset(run.samples, ("chain", "draw")),
        "/sample_stats": _dataset(run.sample_stats, ("chain", "draw")),
        "/anneal": _dataset({k: v for k, v in run.levels.items()}, ("noise_level",)),
    }
    if run.observations:
        groups["/observed_data"] = _dataset(run.observations, ())
    if prior:
        groups["/prior"] = _dataset({k: np.asarray(v)[None] for k, v in prior.items()}, ("chain", "draw"))
    for group, given in (("posterior_predictive", posterior_predictive), ("log_likelihood", log_likelihood)):
        if given:
            shaped = {name: _by_chain(run, group, name, value) for name, value in given.items()}
            groups[f"/{group}"] = _dataset(shaped, ("chain", "draw"))
    if run.log_weights is not None:
        groups["/particles"] = _dataset({**run.particles, "log_weight": run.log_weights}, ("particle",))
    attrs = {
        "inference_library": "lehr",
        "inference_library_version": version("lehr"),
        "created_at": datetime.now(UTC).isoformat(),
        "method": run.method,
        "sampling_time": run.attrs["seconds"],
        **{k: v for k, v in run.attrs.items() if k != "seconds"},
    }
    if run.log_weights is not None:
        attrs |= {"log_evidence": run.log_evidence, "log_evidence_se": run.log_evidence_se}
        groups["/posterior"].attrs["particles"] = "equally weighted, in order of ancestry, cut into blocks as chains"
    for dataset in groups.values():
        dataset.attrs |= attrs
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})


def to_arviz(run: Run, *groups: Mapping[str, Any] | None) -> Any:
    """``InferenceData`` with ArviZ 0.x, the tree itself from 1.0 on; ``groups`` as for :func:`to_xarray`."""
    return _as_arviz(to_xarray(run, *groups))


def to_netcdf(run: Run, path: str | Path) -> Path:
    """Write the tree of ``run`` to ``path``, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_xarray(run).to_netcdf(path, engine="h5netcdf")
    return path


def from_netcdf(path: str | Path) -> Any:
    """A saved run, as :meth:`lehr.Run.to_arviz` gives it.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        return _as_arviz(tree.load())


def _as_arviz(tree: xr.DataTree) -> Any:
    if _IS_DATATREE:
        return tree
    import arviz as az  # here, since it is slow to import

    return az.InferenceData.from_datatree(tree)


def _by_chain(run: Run, group: str, name: str, value: Any) -> np.ndarray:
    """One value for each draw, in the chains of the posterior."""
    value = np.asarray(value)
    chains, draws = next(iter(run.samples.values())).shape[:2]
    if value.shape[:2] == (chains, draws):
        return value
    if value.shape[:1] != (chains * draws,):
        raise ValueError(
            f"{group}[{name!r}] has shape {value.shape}; expected one value for each posterior draw, with leading "
            f"dimensions ({chains * draws},) as get_samples() orders them, or ({chains}, {draws})."
        )
    return value.reshape(chains, draws, *value.shape[1:])


def _dataset(arrays: dict[str, np.ndarray], leading: tuple[str, ...]) -> xr.Dataset:
    """Arrays with named leading dimensions; the rest are named after the variable, as ArviZ does."""
    variables = {}
    for name, array in arrays.items():
        rest = tuple(f"{name}_dim_{i}" for i in range(np.ndim(array) - len(leading)))
        variables[name] = (leading + rest, array)
    sizes = {d: s for dims, array in variables.values() for d, s in zip(dims, np.shape(array), strict=True)}
    return xr.Dataset(variables, coords={d: np.arange(s) for d, s in sizes.items()})
