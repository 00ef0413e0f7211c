"""Train the lab's base model from scratch: ``python -m posttrain.lab.pretrain OUT``.

A random model, a corpus generated with a fixed seed, and one SFT stage of the training loop. About
ten minutes on one CPU thread. The same library versions on the same kind of processor give the
same weights.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from posttrain.api import run
from posttrain.cli.console import Console
from posttrain.core.learner import Optimizer
from posttrain.lab.corpus import documents, write_rows
from posttrain.lab.tokenizer import build_tokenizer
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.presets import Sft
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.folder import RunFolder

SEED = 11
STEPS = 2_900
DOCUMENTS_PER_STEP = 128


def initial_model(folder: Path) -> None:
    """Save a random Qwen3 of about 0.6 million weights, and the lab's tokenizer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretraining(steps: int) -> Recipe:
    """One SFT stage on the corpus."""
    return Recipe(
        name="lab-base",
        model="initial",
        seed=SEED,
        threads=1,
        stages=(
            Stage(
                name="pretrain",
                method=Sft(data=Dataset(path="corpus.jsonl", name="lab-corpus", licence="CC0-1.0")),
                budget=Budget(steps=steps),
                groups_per_step=DOCUMENTS_PER_STEP,
                micro_batch_tokens=8192,
                checkpoint_every=200,
                optimizer=Optimizer(
                    lr=3e-3,
                    warmup_steps=100,
                    schedule="linear",
                    betas=(0.9, 0.98),
                    weight_decay=0.01,
                ),
            ),
        ),
    )


def pretrain(out: Path, *, steps: int = STEPS) -> Path:
    """Run the whole recipe in ``out``; returns the folder of the finished base."""
    material, trained = out / "material", out / "run"
    if not (material / "corpus.jsonl").is_file():
        initial_model(material / "initial")
        corpus = documents(seed=SEED, count=steps * DOCUMENTS_PER_STEP)
        write_rows(material / "corpus.jsonl", (d.row for d in corpus))
    with Console() as console:
        run(pretraining(steps), out=trained, root=material, observe=console.observe)
    (stage,) = RunFolder(trained).stages()
    base = out / "base"
    shutil.rmtree(base, ignore_errors=True)
    shutil.copytree(stage.model, base)
    return base


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    print(pretrain(arguments.out, steps=arguments.steps))


if __name__ == "__main__":
    main()
