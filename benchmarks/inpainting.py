"""Inpainting of held-out digits: do 90 % credible intervals hold nine tenths of the hidden pixels?

The lower half of each digit is hidden, the upper half seen through noise of a size that the sampler must find out.
Truth is what the model's samples are: the digit under the noise at which the ladder ends. Coverage: over all hidden
pixels, and over those that the posterior is unsure of (standard deviation above twice that noise). Error: of the
posterior mean, root mean square. The chains are independent, and the likelihood grows on the way down, since its noise
is not known at the top. Beside it plain reverse diffusion with the likelihood's gradient, told the noise.
`python benchmarks/inpainting.py [digits]`
"""

import sys
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from report import report

import lehr

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "exact"))
from digits_judge import DATA, SIGMA, ladder, pictures

NOISE = 0.2
SEEN = np.zeros((8, 8), bool)
SEEN[:4] = True
DIGITS = lehr.load("digits")


def model(y, noise=None):
    x = numpyro.sample("x", lehr.Diffusion(DIGITS))
    if noise is None:
        noise = numpyro.sample("noise", dist.HalfNormal(0.5))
    numpyro.sample("y", dist.Normal(x, noise).mask(SEEN).to_event(2), obs=y)


def samplers():
    path = lehr.Path(model, lehr.guidance.Annealed(rate=2))
    steps = {"num_steps": 2, "num_samples": 20, "keep": "last", "progress": False}
    return {
        "AnnealedMCMC": (lehr.AnnealedMCMC(path, ladder=ladder(DIGITS, 60), num_chains=128, **steps), ()),
        "Reverse, told the noise": (
            lehr.Reverse(model, num_levels=ladder(DIGITS, 240), num_samples=400, progress=False),
            (NOISE,),
        ),
    }


def main(count=50):
    rows, results = [], {}
    rng = np.random.default_rng(0)
    truths = DATA.held_out[rng.permutation(len(DATA.held_out))[:count]]
    blurred = truths + SIGMA * rng.standard_normal(truths.shape)
    seen = np.where(SEEN, truths + NOISE * rng.standard_normal(truths.shape), 0.0)
    for name, (sampler, told) in samplers().items():
        inside, unsure, errors, noises = [], [], [], []
        for i in range(count):
            sampler.run(jax.random.key(i), seen[i], *told)
            draws = sampler.get_samples()
            x = pictures(DIGITS, draws["x"])[:, ~SEEN]
            low, high = np.quantile(x, [0.05, 0.95], axis=0)
            hidden = blurred[i][~SEEN]
            inside.append((low <= hidden) & (hidden <= high))
            unsure.append(x.std(0) > 2 * SIGMA)
            errors.append(np.mean((x.mean(0) - hidden) ** 2))
            noises.append(np.mean(draws["noise"]) if "noise" in draws else NOISE)
        inside, unsure = np.array(inside), np.array(unsure)
        # pixels of one digit go together: the error is over digits
        error = inside.mean(1).std(ddof=1) / np.sqrt(count)
        figures = {
            "coverage": inside.mean(),
            "unsure": inside[unsure].mean(),
            "rms": np.sqrt(np.mean(errors)),
            "noise": np.mean(noises),
            "evaluations": sampler.last_run.attrs["evaluations_per_chain"],
        }
        results[name] = {k: float(v) for k, v in figures.items()}
        rows.append(
            (
                name,
                f"{figures['evaluations']:.0f}",
                f"{figures['coverage']:.3f} ± {error:.3f}",
                *(f"{figures[k]:.3f}" for k in ("unsure", "rms", "noise")),
            )
        )
        print(*rows[-1], sep="  ", flush=True)
    columns = ("sampler", "evals", "coverage", "of unsure pixels", "error of the mean", f"noise (truth {NOISE})")
    report("inpainting", f"Lower halves of {count} held-out digits", columns, rows, results)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
