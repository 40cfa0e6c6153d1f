"""Train one dictionary and look at it: python examples/train.py MODEL TEXT HOOK

MODEL is a folder in Hugging Face layout, a .gguf file or a hub id; TEXT is a .txt, .jsonl, .json or .parquet file;
HOOK is a module of the model, such as model.layers.10. A service must be running: `gnomon up`.
"""

from __future__ import annotations

import argparse

import gnomon


def main() -> None:
    """Submit a job, wait for it, and load what it published."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("hook")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="activations to train on")
    arguments = parser.parse_args()

    spec = gnomon.TrainSpec(
        activations=gnomon.HarvestSpec(
            model=gnomon.ModelSource(source=arguments.model),
            text=(gnomon.TextSource(url=arguments.text),),
            hooks=(arguments.hook,),
            token_budget=arguments.tokens,
        ),
        d_sae=arguments.d_sae,
        activation=gnomon.TopK(k=arguments.k),
        optimizer=gnomon.Adam(lr=3e-3),
        batch_size=1024,
        token_budget=arguments.tokens,
    )
    with gnomon.Client() as client:
        result = client.submit(spec, name=f"{arguments.hook}, {arguments.d_sae} features").wait(progress=True)
        dictionary = gnomon.load(result.dictionary_id, client=client)

    scores = dictionary.alignment()
    print(dictionary)
    print(f"FVU {result.metrics.fvu:.4f}, L0 {result.metrics.l0:.1f}")
    print(f"alignment from {float(scores.min()):.6f} to {float(scores.max()):.6f}")


if __name__ == "__main__":
    main()
