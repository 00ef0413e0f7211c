"""CPU time of the training path, its share of the arithmetic limit, and where the rest goes.

    python benchmarks/training_profile.py                           # the table
    python benchmarks/training_profile.py --against OTHER/src       # and another source tree's
    python benchmarks/training_profile.py --sizes 7M --work grpo --operators
    python benchmarks/training_profile.py --device cuda --dtype bfloat16 --sizes 0.6B

Models are random, with Qwen3's layout. One step is packing, forward, backward and update; `score`
is log-probs of the GRPO batch without a gradient. Times are CPU seconds on one thread, the median
of `--pairs` runs; two source trees take turns in two processes. The limit is the FLOPs that these
tokens need (causal pairs only, shared prompts once, backward twice the forward), divided by the
rate of a large matrix product measured in the same process. On a GPU times are those of the wall,
after a synchronisation; the script has not been run on one yet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.learner import Optimizer
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.regularisers import ReferenceKL
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.supervised.likelihood import CrossEntropy

WORK = ("grpo", "sft", "dpo", "score")


@dataclass(frozen=True)
class Size:
    """A Qwen3 layout, by what decides its cost."""

    hidden: int
    layers: int
    heads: int
    heads_kv: int
    head_dim: int
    inner: int
    vocab: int


SIZES = {
    "0.6M": Size(96, 4, 4, 2, 24, 256, 2048),
    "1.3M": Size(128, 4, 4, 2, 32, 384, 4096),
    "7M": Size(256, 6, 4, 2, 64, 768, 8192),
    "40M": Size(512, 10, 8, 4, 64, 1536, 16384),
    "0.6B": Size(1024, 28, 16, 8, 128, 3072, 151936),  # Qwen3-0.6B
    "1.7B": Size(2048, 28, 16, 8, 128, 6144, 151936),  # Qwen3-1.7B
}
SMALL = ("0.6M", "1.3M", "7M", "40M")


# --- one case --------------------------------------------------------------------------------


def make_model(folder: Path, size: Size) -> Path:
    """Save a random model with the library's test tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.testing import tiny_tokenizer

    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads_kv,
        head_dim=size.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_groups(work: str, vocab: int, shape: tuple[int, int, int, int]):
    """Random groups with the columns that the work needs: (groups, size, prompt, completion)."""
    import numpy as np

    from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
    from posttrain.core.trajectory import Column, Group, Scored, Trajectory

    rng = np.random.default_rng(0)
    num_groups, size, prompt_length, length = shape
    asker = Producer(kind=Kind.ENVIRONMENT, name="bench")
    writer = Producer(kind=Kind.LEARNER if work in ("grpo", "score") else Kind.EXTERNAL, name="b")
    live = writer.kind is Kind.LEARNER
    groups = []
    for index in range(num_groups):
        spread = rng.integers(-prompt_length // 8, prompt_length // 8 + 1)
        prompt = rng.integers(6, vocab, prompt_length + spread)
        members = []
        for k in range(size):
            # Completions of the same mean length, as they come: from half to one and a half.
            own = int(rng.integers(length // 2, length * 3 // 2 + 1))
            span = Span(
                length=own,
                role=Role.ASSISTANT,
                producer=writer,
                versions=(0, 0) if live else None,
                sampling=Sampling() if live else None,
                logprobs=np.full(own, -3.0, np.float32) if live else None,
            )
            trajectory = Trajectory(
                task=f"bench/{index}",
                tokens=np.concatenate([prompt, rng.integers(6, vocab, own)]).astype(np.int32),
                prompt_length=len(prompt),
                spans=(Span(length=len(prompt), role=Role.USER, producer=asker), span),
            )
            total = len(trajectory)
            columns = {
                Column.BEHAVIOUR_LOGPROB: np.full(total, -3.0, np.float32),
                Column.ADVANTAGE: np.full(total, rng.normal(), np.float32),
                Column.REFERENCE_LOGPROB: np.full(total, -3.0, np.float32),
            }
            if work == "dpo":
                columns[Column.PREFERENCE] = np.array(1.0 if k == 0 else -1.0)
            members.append(Scored(trajectory=trajectory, columns=columns))
        groups.append(Group(task=f"bench/{index}", members=tuple(members)))
    return groups


SHAPES = {
    "grpo": (8, 8, 128, 64),
    "score": (8, 8, 128, 64),
    "sft": (32, 1, 64, 128),
    "dpo": (16, 2, 128, 64),
}


def make_step(
    work: str, size: Size, folder: Path, *, device: str = "cpu", dtype: str = "float32"
) -> tuple[Callable[[], float], float]:
    """A step to repeat, and the FLOPs that it needs."""
    import torch

    from posttrain.engines.local.engine import LocalEngine
    from posttrain.numerics.batch import pack
    from posttrain.training.objective import StageObjective

    engine = LocalEngine(device=torch.device(device), dtype=dtype)
    make_model(folder, size)
    terms = {
        "grpo": (ClippedPolicyGradient(), ReferenceKL(weight=0.01)),
        "score": (CrossEntropy(),),
        "sft": (CrossEntropy(),),
        "dpo": (Dpo(beta=0.1),),
    }[work]
    groups = make_groups(work, size.vocab, SHAPES[work])
    objective = StageObjective(terms)
    learner = engine.learner(
        str(folder), name="bench", optimizer=Optimizer(lr=1e-4), lora=None, seed=0
    )
    trajectories = [m.trajectory for g in groups for m in g.members]

    def step() -> float:
        if work == "score":
            learner.policy.logprobs(trajectories)
            return 0.0
        batches = pack(groups, needs=objective.needs, max_tokens=4096)
        return learner.step(batches, objective, lr_scale=1.0).loss

    batches = pack(groups, needs=objective.needs, max_tokens=4096)
    needed = flops(size, batches)
    return step, needed if work == "score" else 3 * needed


def flops(size: Size, batches) -> float:
    """FLOPs that a forward pass cannot save: two per weight and token, and causal pairs."""
    width, width_kv = size.heads * size.head_dim, size.heads_kv * size.head_dim
    layer = size.hidden * (2 * width + 2 * width_kv + 3 * size.inner)
    total = 0.0
    for batch in batches:
        pairs = 0
        for segment in batch.segments:
            parent = 0 if segment.parent is None else batch.segments[segment.parent].length
            pairs += segment.length * (segment.length + 1) // 2 + segment.length * parent
        total += 2 * layer * size.layers * batch.num_tokens
        total += 4 * width * pairs * size.layers
        total += 2 * size.hidden * size.vocab * len(batch.target_N)
    return total


def now(device: str) -> float:
    """Seconds: of this process on a CPU, of the wall when a GPU has done everything."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def matmul_rate(device: str, dtype: str) -> float:
    """FLOP/s of a large product, the best of five."""
    import torch

    width = 1024 if device == "cpu" else 8192
    options = {"device": device, "dtype": getattr(torch, dtype)}
    a, b = torch.randn(width, width, **options), torch.randn(width, width, **options)
    best = 0.0
    for _ in range(5):
        started = now(device)
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * width**3 / (now(device) - started))
    return best


# --- processes -------------------------------------------------------------------------------


def work_here(name: str, work: str, device: str, dtype: str) -> None:
    """The worker: one step per line of standard input, answered with a line of JSON."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        step, needed = make_step(work, SIZES[name], place, device=device, dtype=dtype)
        for _ in sys.stdin:
            rate = matmul_rate(device, dtype)
            started = now(device)
            loss = step()
            seconds = now(device) - started
            answer = {"seconds": seconds, "loss": loss, "flops": needed, "rate": rate}
            print("@" + json.dumps(answer), flush=True)


class Worker:
    """A process with a source tree of its own."""

    def __init__(self, source: Path, case: tuple[str, str, str, str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def step(self) -> dict[str, float]:
        """Ask for one step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"the worker ended with {self._process.wait()}")

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(case: tuple[str, str, str, str], sources: list[Path], pairs: int) -> str:
    """A row of the table."""
    workers = [Worker(s, case) for s in sources]
    found: list[list[dict[str, float]]] = [[] for _ in workers]
    for turn in range(pairs + 2):
        for index, worker in enumerate(workers):
            answer = worker.step()
            if turn >= 2:  # the first steps allocate
                found[index].append(answer)
    for worker in workers:
        worker.close()
    seconds = [statistics.median(a["seconds"] for a in answers) for answers in found]
    rate = max(a["rate"] for answers in found for a in answers)
    needed = found[0][0]["flops"]
    cells = [*case[:2], f"{needed / 1e9:.2f}", f"{1e3 * seconds[0]:.0f}"]
    cells.append(f"{needed / rate / seconds[0]:.0%}")
    if len(sources) > 1:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(*found, strict=True)]
        ratios.sort()
        cells += [f"{1e3 * seconds[1]:.0f}", f"{needed / rate / seconds[1]:.0%}"]
        cells.append(f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
    return "| " + " | ".join(cells) + f" | {rate / 1e9:.0f} |"


def operators(name: str, work: str) -> None:
    """Where the CPU time of one step goes, by operator."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        step, _ = make_step(work, SIZES[name], Path(folder) / "model")
        step()
        step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
    print(
        found.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45
        )
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SMALL), choices=list(SIZES))
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--against", type=Path, help="another source tree, to take turns with")
    parser.add_argument("--operators", action="store_true", help="a profile instead of the table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work_here(*arguments.worker)
        return
    here = Path(__file__).resolve().parent.parent / "src"
    sources = [here] + ([arguments.against.resolve()] if arguments.against else [])
    if not arguments.operators:
        other = "ms, other | of limit | other / this | " if len(sources) > 1 else ""
        print(f"| model | work | GFLOP | ms | of limit | {other}GFLOP/s |")
        print("|---" * (6 + 3 * (len(sources) - 1)) + "|")
    where = (arguments.device, arguments.dtype)
    for name in arguments.sizes:
        for work in arguments.work:
            if arguments.operators:
                print(f"\n{name} {work}")
                operators(name, work)
            else:
                print(compare((name, work, *where), sources, arguments.pairs), flush=True)


if __name__ == "__main__":
    main()
