"""The recipe of pipeline.yaml in Python: the same tree, hence the same identity.

Run ``python recipes/pipeline.py``; YAML is shorter, Python can compute and be imported.
"""

from pathlib import Path

from posttrain import (
    Budget,
    Dataset,
    Gate,
    Grpo,
    JsonlTasks,
    Kind,
    Lora,
    Measure,
    Opd,
    Optimizer,
    Recipe,
    Sft,
    Stage,
)

ANSWER = 8  # tokens
LETTERS = JsonlTasks(path="data/letters_tasks.jsonl", held_out=24)
PRODUCTS = JsonlTasks(
    path="data/products_tasks.jsonl", reward="data/rewards.py:product", held_out=16
)

LEARN = Stage(
    name="learn",
    intends="expansion",
    method=Sft(
        data=Dataset(
            path="data/letters_demos.jsonl",
            author=Kind.HUMAN,
            name="first-letters",
            licence="CC0-1.0",
        )
    ),
    budget=Budget(epochs=20),
    groups_per_step=16,
    optimizer=Optimizer(lr=1e-3, warmup_steps=5, schedule="linear"),
    gates=(Gate(task="letters", at_least=0.5),),
)
SHARPEN = Stage(
    name="sharpen",
    intends="reshaping",
    method=Grpo(tasks=("products",), group_size=16, max_new_tokens=ANSWER, aggregate="token_mean"),
    budget=Budget(steps=30),
    groups_per_step=16,
    lora=Lora(rank=16, alpha=32),
    optimizer=Optimizer(lr=2e-3),
    gates=(Gate(task="products", at_least=0.3),),
)
UNITE = Stage(
    name="unite",
    intends="consolidation",
    init="base",
    method=Opd(
        tasks=("letters", "products"),
        teachers={"letters": LEARN.name, "products": SHARPEN.name},
        group_size=2,
        max_new_tokens=ANSWER,
        top_k=32,
    ),
    budget=Budget(steps=60),
    groups_per_step=32,
    optimizer=Optimizer(lr=1e-3, warmup_steps=5, schedule="linear"),
    gates=tuple(
        Gate(task=task, at_least=0.3, otherwise="warn") for task in ("letters", "products")
    ),
)

RECIPE = Recipe(
    name="pipeline",
    model="../src/posttrain/lab/base",
    threads=1,
    tasks={"letters": LETTERS, "products": PRODUCTS},
    measure=Measure(samples=32, max_new_tokens=ANSWER),
    stages=(LEARN, SHARPEN, UNITE),
)

if __name__ == "__main__":
    from posttrain.api import run  # loads torch

    outcome = run(RECIPE, out=Path("out/pipeline"), root=Path(__file__).parent)
    print(f"finished {', '.join(outcome.finished)} in {outcome.out}")
