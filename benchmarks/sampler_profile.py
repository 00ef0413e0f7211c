"""Where the local sampler's time goes: prefill and decode, against the arithmetic and a matmul.

    python benchmarks/sampler_profile.py --sizes 1M 7M --shapes 8x8x64 16x32x64 --repeats 5
    python benchmarks/sampler_profile.py --sizes 7M --shapes 8x8x64 --profile

A shape is prompts x rows per prompt x new tokens. Times are CPU times of the process (other work on
the machine does not enter), medians over repeats. The matmul rate is that of the model's largest
weight against as many rows as are decoded together, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.core.provenance import Sampling
from posttrain.engines.local.loading import load_model
from posttrain.engines.local.model import Model
from posttrain.engines.local.sampler import generate
from posttrain.protocols import Request
from posttrain.testing import tiny_tokenizer


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of a random Qwen3."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int


SIZES = {
    "0.6M": Size(4, 128, 384, 4, 2, 366),
    "1M": Size(4, 128, 512, 4, 2, 2048),
    "7M": Size(6, 256, 768, 8, 4, 8192),
    "40M": Size(10, 512, 1536, 8, 4, 16384),
}


def save_random(size: Size, folder: Path) -> None:
    """Save a random model of this shape, with the tiny tokenizer."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.width // size.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def build(size: Size, folder: Path) -> Model:
    """A random model of this shape, loaded as any other."""
    save_random(size, folder)
    return load_model(str(folder))


def requests_of(
    num_prompts: int, group: int, new: int, *, prompt: int, vocab: int
) -> list[Request]:
    """Requests that never end early: what is measured is the same for every version."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, vocab, prompt).astype(np.int32) for _ in range(num_prompts)]
    return [
        Request(prompt=prompts[i // group], sampling=Sampling(seed=i), max_new_tokens=new)
        for i in range(num_prompts * group)
    ]


def seconds(work, *, repeats: int) -> list[float]:
    """CPU seconds of each repeat, after one that is not counted."""
    work()
    out = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        out.append(time.process_time() - start)
    return out


def flops(model: Model, requests: Sequence[Request], *, new: int) -> tuple[float, float]:
    """(prefill, decode) multiply-adds times two, head only where a token is drawn."""
    config = model.causal.config
    body = sum(p.numel() for p in model.causal.model.layers.parameters())
    head = model.vocab_size * config.hidden_size
    wide = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    prompts = {r.prompt.tobytes(): len(r.prompt) for r in requests}.values()
    prefill = sum(2 * body * n + 2 * wide * n * n for n in prompts) + 2 * head * len(prompts)
    decode = 0.0
    for r in requests:
        n = len(r.prompt)
        reads = sum(n + t for t in range(1, new))
        decode += (new - 1) * 2 * (body + head) + 4 * wide * reads
    return prefill, decode


def matmul_rate(model: Model, rows: int) -> float:
    """FLOP/s of ``rows`` hidden states through the first MLP weight, hot."""
    weight = model.causal.model.layers[0].mlp.gate_proj.weight.detach()
    x = torch.randn(rows, weight.shape[1])
    times = max(1, int(2e9 / (2 * x.numel() * weight.shape[0])))

    def work() -> None:
        for _ in range(times):
            torch.nn.functional.linear(x, weight)

    with torch.inference_mode():
        best = min(seconds(work, repeats=5))
    return times * 2 * x.numel() * weight.shape[0] / best


def main() -> None:
    """Print one line per size and shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["0.6M", "1M", "7M"], choices=SIZES)
    parser.add_argument("--shapes", nargs="+", default=["8x8x64"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            model = build(SIZES[name], Path(folder))
        for shape in args.shapes:
            num_prompts, group, new = map(int, shape.split("x"))
            vocab = SIZES[name].vocab
            requests = requests_of(num_prompts, group, new, prompt=args.prompt, vocab=vocab)
            first = requests_of(num_prompts, group, 1, prompt=args.prompt, vocab=vocab)

            def whole(model=model, requests=requests) -> None:
                generate(model, requests, end_tokens=frozenset())

            def prefill(model=model, first=first) -> None:
                generate(model, first, end_tokens=frozenset())

            if args.profile:
                whole()
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    whole()
                print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
                continue
            total = statistics.median(seconds(whole, repeats=args.repeats))
            start = statistics.median(seconds(prefill, repeats=args.repeats))
            _, want_decode = flops(model, requests, new=new)
            rate = matmul_rate(model, num_prompts * group)
            achieved = want_decode / (total - start)
            print(
                f"{name:5} {shape:9} total {total:7.3f} s  first token {start:6.3f} s  "
                f"decode step {(total - start) / (new - 1) * 1e3:7.2f} ms  "
                f"decode {achieved / 1e9:6.1f} GFLOP/s, matmul {rate / 1e9:6.1f}, "
                f"share {achieved / rate:4.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
