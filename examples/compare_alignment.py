"""Does alignment help on your model? python examples/compare_alignment.py MODEL TEXT HOOK

Trains the same dictionary with and without alignment, over several seeds, on the same activations (harvested once), and
prints what was measured on held-out text. Differences smaller than those between seeds mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio

import gnomon
from gnomon.resources import TrainResult

METRICS = ("fvu", "l0", "dead_fraction", "ce_loss_score")


def make_spec(arguments: argparse.Namespace, alignment: str, seed: int) -> dict[str, object]:
    """One run; a spec may be a mapping, too."""
    return {
        "kind": "train",
        "activations": {
            "kind": "harvest",
            "model": {"source": arguments.model},
            "text": [{"url": arguments.text}],
            "hooks": [arguments.hook],
            "token_budget": arguments.tokens,
        },
        "d_sae": arguments.d_sae,
        "activation": {"kind": "topk", "k": arguments.k},
        "alignment": alignment,
        "optimizer": {"lr": 3e-3},
        "batch_size": 1024,
        "token_budget": arguments.tokens,
        "seed": seed,
    }


async def main() -> None:
    """Submit all runs at once, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("hook")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="activations to train on")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()

    runs = [(alignment, seed) for alignment in ("none", "orth") for seed in range(arguments.seeds)]
    async with gnomon.AsyncClient() as client:
        jobs = [await client.submit(make_spec(arguments, *run), name="{} {}".format(*run)) for run in runs]
        results = await asyncio.gather(*(job.wait() for job in jobs))

    print("alignment  seed  " + "  ".join(f"{name:>14}" for name in METRICS))
    for (alignment, seed), result in zip(runs, results, strict=True):
        assert isinstance(result, TrainResult)
        found = [getattr(result.metrics, name) for name in METRICS]
        values = "  ".join(f"{float('nan') if value is None else value:14.4f}" for value in found)
        print(f"{alignment:<9}  {seed:<4}  {values}")


if __name__ == "__main__":
    asyncio.run(main())
