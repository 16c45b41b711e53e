"""What a model must be for a path to follow it; each fault named before anything is compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lehr.potentials.product import members
from lehr.programs.dependence import connected
from lehr.programs.diffusion import Diffusion, base, diffusions
from lehr.programs.reading import is_energy

__all__ = ["check_connections", "check_event", "is_one_model", "is_reversible", "refuse_hole", "refuse_nan"]

Site = dict[str, Any]


def check_connections(sites: list[Site], depends: Mapping[str, set[str]], discrete: Iterable[str]) -> None:
    """Refuse a model whose sites depend on each other as no path can follow; warn of masses that nobody knows.

    Args:
        sites: all of them.
        depends: by site, the latents that it depends on.
        discrete: the names of the discrete latents.

    Raises:
        ValueError: if a Diffusion has parameters that depend on another, if what is observed says nothing of
            x, or if a score depends on a discrete latent.
    """
    latent = {s["name"] for s in sites if diffusions(s["fn"]) and not s["is_observed"]}
    listed = ", ".join(map(repr, sorted(latent)))
    reached = connected(depends, latent)
    for site in sites:
        name = site["name"]
        others = sorted((depends[name] - {name}) & latent)
        if name in latent and others:
            raise ValueError(
                f"the Diffusion at site {name!r} has parameters that depend on the Diffusion site {others[0]!r}. What "
                f"they are above the end of the ladder, where {others[0]!r} is noise, no model says. Make one "
                "potential of both, or tie them by an observed site."
            )
        if site["is_observed"] and name not in reached:
            raise ValueError(
                f"the observed site {name!r} has no path to {listed}: neither x nor any latent that shares a site with "
                "it enters, so that it says nothing of x. Write its parameters, or its obs, as a function of x."
            )
        labels, models = sorted(depends[name] & set(discrete)), diffusions(site["fn"])
        if labels and not all(is_energy(d) for d in models):
            raise ValueError(
                f"the Diffusion at site {name!r} is known through a score and depends on the discrete latent "
                f"{labels[0]!r}: a score does not know the mass of a label. Give a calibrated energy, or observe the "
                "label."
            )
        if labels and not all(d.potential.is_diffusion and d.potential.is_calibrated for d in models):
            warnings.warn(
                f"the Diffusion at site {name!r} depends on the discrete latent {labels[0]!r}, and is a product, or an "
                "energy that was not calibrated: each label's normaliser is unknown, and so are the masses of the "
                "labels. Give a calibrated energy for each, or observe the label.",
                stacklevel=2,
            )


def check_event(site: Site) -> None:
    """Raise a ValueError if what is observed at a Diffusion site is no event, or no batch of events."""
    if not (diffusions(site["fn"]) and site["is_observed"]):
        return
    expected, got = site["fn"].shape(), jnp.shape(site["value"])
    events = len(site["fn"].event_shape)
    try:
        fits = np.broadcast_shapes(expected[: len(expected) - events], got[: len(got) - events]) is not None
    except ValueError:
        fits = False
    if not fits or got[len(got) - events :] != site["fn"].event_shape:
        raise ValueError(
            f"the observed Diffusion at site {site['name']!r} is over events of shape {site['fn'].event_shape}"
            f"{f' in a batch of {expected[: len(expected) - events]}' if len(expected) > events else ''}, and what is "
            f"observed has shape {got}: crop, pad or reshape x in obs= to the shape that the potential was made for."
        )


def refuse_hole(name: str, held: np.ndarray) -> None:
    """Refuse a canvas of which some numbers are held by no factor.

    Args:
        name: of its site.
        held: which are held, of the canvas's shape.
    """
    if np.all(held):
        return
    ends = zip(np.min(np.argwhere(~held), 0), np.max(np.argwhere(~held), 0) + 1, strict=True)
    where = ", ".join(f"{low}:{high}" for low, high in ends)
    raise ValueError(
        f"the canvas of site {name!r}, of shape {held.shape}, has a hole: no model sees {int(np.sum(~held))} of its "
        f"numbers, within {name}[{where}], and the density is none. Cover them by another Region or by an observed "
        "Diffusion site."
    )


def is_reversible(fn: Any) -> bool:
    """Whether a site is a product of diffusion models, each with a reverse kernel."""
    fn = base(fn)
    return isinstance(fn, Diffusion) and all(p.is_diffusion for p in members(fn.potential))


def is_one_model(fn: Any) -> bool:
    """Whether a site is a diffusion model by itself, neither a product nor a power."""
    return isinstance(base(fn), Diffusion) and base(fn).potential.is_diffusion


def refuse_nan(what: str, value: Any) -> None:
    """Refuse data that are not finite."""
    value = np.asarray(value) if isinstance(value, float) else value
    if isinstance(value, jax.core.Tracer) or not jnp.issubdtype(getattr(value, "dtype", int), jnp.floating):
        return
    bad = int(np.sum(~np.isfinite(np.asarray(value))))
    if bad:
        raise ValueError(
            f"{what} holds {bad} value{'s' * (bad > 1)} that {'are' if bad > 1 else 'is'} NaN or infinite. Fill them "
            "with any finite number and mask them in the model, e.g. dist.Normal(...).mask(observed)."
        )
