"""The shipped digits: samples against held-out digits, classes, masses of a mixture, and an unwanted class divided out.

Score: the accuracy at which a support vector machine tells samples from held-out digits under the same noise (½ if
they are alike, ± .016 by chance for one set; ± is the standard error of the mean over sets of samples, twelve of the
plain model's and three of others). Wanted: the share of samples that a machine, trained on the model's training digits,
takes for what was asked.
`python benchmarks/digits.py [samples]`
"""

import sys
import time
from pathlib import Path

import numpy as np
from report import report

import lehr

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "exact"))
from digits_judge import DATA, SIGMA, classifier, flat, held_out, reverse, smc, two_sample_score

PAIR, PROBS = (1, 7), (0.3, 0.7)
UNWANTED, SHARE = 8, 0.05  # p²/(.95 q + .05 p)
PLAIN = np.flatnonzero(np.arange(10) != UNWANTED)
SEEDS, FEW = range(12), range(3)


def redrawn(n, seed):
    """What a model that knows its training digits by heart would make: some of them twice, which tells them apart."""
    rng = np.random.default_rng(seed)
    x = DATA.events[rng.integers(0, len(DATA.events), n)]
    return x + SIGMA * rng.normal(size=x.shape)


def main():
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    digits, judge = lehr.load("digits"), classifier()
    rows, results = [], {}

    def add(name, wanted, score, seconds):
        scores = [] if score is None else np.atleast_1d(score).tolist()
        results[name] = {"wanted": wanted, "two_sample_score": scores, "seconds": seconds}
        spread = f" ± {np.std(scores, ddof=1) / len(scores) ** 0.5:.3f}" if len(scores) > 1 else ""
        shown = f"{np.mean(scores):.3f}{spread}" if scores else "–"
        rows.append((name, "–" if wanted is None else f"{wanted:.3f}", shown, f"{seconds:.0f}"))
        print(*rows[-1], sep="  ", flush=True)

    add("held-out digits", float(judge.score(flat(DATA.held_out), DATA.held_out_labels)), None, 0.0)
    add("training digits, with replacement", None, [two_sample_score(redrawn(n, s), held_out(n)) for s in SEEDS], 0.0)
    for name, sample in (("AnnealedSMC", smc), ("Reverse", reverse)):
        started = time.monotonic()
        scores = [two_sample_score(sample(digits, n, seed=s), held_out(n)) for s in SEEDS]
        add(name, None, scores, (time.monotonic() - started) / len(SEEDS))
        started, each = time.monotonic(), []
        for label in range(10):
            each.append(np.mean(judge.predict(flat(sample(digits.given(label), n // 10, seed=label))) == label))
        add(f"{name}, class by class", float(np.mean(each)), None, time.monotonic() - started)
    started = time.monotonic()
    found = judge.predict(flat(smc(lehr.Mixture([digits.given(k) for k in PAIR], PROBS), n)))
    add(
        f"{PROBS[0]} of {PAIR[0]}, {PROBS[1]} of {PAIR[1]}",
        float(np.mean(found == PAIR[0])),
        None,
        time.monotonic() - started,
    )
    started = time.monotonic()
    contrast = lehr.Contrast(digits, lehr.Mixture([digits.given(UNWANTED), digits], [1 - SHARE, SHARE]))
    sets = [smc(contrast, 2 * n, seed=s) for s in FEW]
    others = float(np.mean(judge.predict(flat(np.concatenate(sets))) != UNWANTED))
    scores = [two_sample_score(x[::2], held_out(n, PLAIN)) for x in sets]
    add(f"no {UNWANTED}", others, scores, (time.monotonic() - started) / len(FEW))
    started = time.monotonic()
    scores = [two_sample_score(smc(digits, n, seed=s, num_levels=60, num_steps=1), held_out(n)) for s in FEW]
    add("AnnealedSMC, 60 levels, each with a transition", None, scores, (time.monotonic() - started) / len(FEW))
    results["calibration"] = lehr.zoo()["digits"]["calibration"]
    report("digits", f"8×8 digits, {n} samples", ("samples", "wanted", "two-sample score", "seconds"), rows, results)


if __name__ == "__main__":
    main()
