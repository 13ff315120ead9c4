"""How good a found share is: `python -m training.found [--held-out] [--seeds N]`. Prints a table of Markdown.

The balance of every pair of the demo is found once with each seed. A share found with one seed is tried on the pictures
of all others; what the judge recognises in them is not known to what finds it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from klora.balance.search import SHARES
from klora.demo import catalogue
from klora.evaluation.demo_study import Recognition, demo_study
from klora.evaluation.statistics import Array, estimates
from klora.evaluation.study import StudyPair
from klora.evaluation.table import cell, heading, row
from klora.generation.balance import find_balance
from training.networks import load_pipeline


def measure_pair(pair: StudyPair, seeds: Sequence[int]) -> tuple[Array, Array]:
    """One pair, on one thread: (shares, seeds) whether both are recognised, (seeds,) the place of the share found."""
    torch.set_num_threads(1)
    known = catalogue.read_catalogue(catalogue.HOME)
    pipe, recognition = load_pipeline(catalogue.HOME / known["model"]), Recognition("cpu")
    recommended = known["recommended"]
    call = {"guidance_scale": recommended["guidance_scale"]}
    both, places = [], []
    for seed in seeds:
        found = find_balance(
            pipe,
            pair.subject.lora,
            pair.style.lora,
            prompt=pair.prompt,
            picture_seed=seed,
            call=call,
            steps=recommended["steps"],
        )
        both.append([recognition(image, pair)["both_recognised"] for image in found.images])
        places.append(SHARES.index(found.share))
    print(pair.name, flush=True)
    return np.array(both).T, np.array(places)


def tried_elsewhere(both: Array, places: Array) -> Array:
    """(seeds,) how often both are recognised at the shares found with the other seeds; `both` (shares, seeds)."""
    seeds = both.shape[1]
    return np.array([np.delete(both[places, seed], seed).mean() for seed in range(seeds)])


def table(both: Array, places: Array) -> str:
    """Markdown of what is recognised: `both` (pairs, shares, seeds), with the `places` (pairs, seeds) found."""
    pairs, _, seeds = both.shape
    found = np.stack([tried_elsewhere(*pair) for pair in zip(both, places, strict=True)])
    own = np.stack([both[i, places[i], range(seeds)] for i in range(pairs)])
    best = np.stack([both[i, both[i].mean(1).argmax()] for i in range(pairs)])
    rows = {"found, on other seeds": found, "each picture by its own five": own}
    rows |= {f"{share:g} for all": both[:, place] for place, share in enumerate(SHARES)}
    rows["the best share of each pair, with hindsight"] = best
    values = np.stack([one.reshape(-1, 1) for one in rows.values()])
    means, less = estimates(values, lambda mean: mean), estimates(values, lambda mean: mean[..., :1, :] - mean)
    lines = heading(["", "both %", "found has more"])
    for number, name in enumerate(rows):
        lines.append(row([name, cell(means[number][0], ".1f"), cell(less[number][0], "+.1f") if number else ""]))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="searches for each pair (4)")
    parser.add_argument("--held-out", action="store_true", help="only pairs of which nothing was chosen on")
    args = parser.parse_args()
    pairs = demo_study(held_out=args.held_out)
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        measured = pool.starmap(measure_pair, [(pair, range(args.seeds)) for pair in pairs], chunksize=1)
    print(table(np.stack([both for both, _ in measured]), np.stack([places for _, places in measured])))


if __name__ == "__main__":
    main()
