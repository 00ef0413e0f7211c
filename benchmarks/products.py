"""Matrix products of float32 numbers by MKL and by oneDNN, over the shapes of a model.

    python benchmarks/products.py --sizes 7m --rows 64 640 --threads 1 2

Read it before changing the rule in ``posttrain/products.py``. GFLOP/s, medians of runs in turn:
forward x wᵀ, gradient of the inputs g w, gradient of the weights gᵀ x, and *cold*, the products of
one decoding step one after the other, so that weights come from where they lie.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from against_trl.machine import multipliers, shapes
from against_trl.plan import SIZES, Dims
from torch import Tensor

from posttrain.numerics.matmul import by_onednn, maker

REPEATS = 15
Multiply = Callable[[Tensor, Tensor], Tensor]


def in_turn(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS + 2):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def rates(operations: float, works: dict[str, Callable[[], object]]) -> str:
    """GFLOP/s of each, as a column of the table."""
    found = in_turn(works)
    return " / ".join(f"{operations / found[name] / 1e9:4.0f}" for name in works)


def one_shape(rows: int, inputs: int, outputs: int, ways: dict[str, Multiply]) -> str:
    """Three products of a layer."""
    x, w, g = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    operations = 2.0 * rows * inputs * outputs
    columns = (
        {n: lambda f=f: f(x, w) for n, f in ways.items()},
        {n: lambda f=f: f(g, w.t()) for n, f in ways.items()},
        {n: lambda f=f: f(g.t(), x.t()) for n, f in ways.items()},
    )
    return " | ".join(rates(operations, works) for works in columns)


def cold(rows: int, dims: Dims, ways: dict[str, Multiply]) -> str:
    """Every matrix of the model once, one after the other."""
    pairs = [
        (torch.randn(rows, inputs), torch.randn(outputs, inputs))
        for inputs, outputs, often in shapes(dims)
        for _ in range(often)
    ]
    operations = sum(2.0 * rows * w.numel() for _, w in pairs)
    return rates(operations, {n: lambda f=f: [f(x, w) for x, w in pairs] for n, f in ways.items()})


def main() -> None:
    """Print a table for each size and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["7m"], choices=SIZES)
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 640])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    ways = multipliers()
    print(f"{maker() or 'unknown maker'}, {torch.backends.cpu.get_cpu_capability()}:", end=" ")
    print("oneDNN" if by_onednn() else "torch's choice", "computes here")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size in args.sizes:
            for rows in args.rows:
                print(f"\n{size}, {rows} rows, {threads} threads: {' / '.join(ways)}")
                print("inputs -> outputs | forward | inputs' gradient | weights' gradient")
                for inputs, outputs in sorted({(i, o) for i, o, _ in shapes(SIZES[size])}):
                    print(f"{inputs:6d} -> {outputs:6d} |", one_shape(rows, inputs, outputs, ways))
                print(f"cold, a step of decoding | {cold(rows, SIZES[size], ways)}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
