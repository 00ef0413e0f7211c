"""TRL's side: its own trainers, set to do nothing but train, with the settings that suit them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

from against_trl.plan import Job, Steps
from against_trl.reward import even_words


def train(job: Job, gate: Steps) -> None:
    """Train until the gate stops it."""
    trainer = TRAINERS[job.work](job)
    trainer.add_callback(_Steps(gate, trainer, *_timed(trainer, "_generate_single_turn")))
    trainer.train()


def arguments(job: Job, rows: int) -> dict[str, object]:
    """Settings of all trainers. ``rows`` is how many rows of theirs an optimiser step holds."""
    if rows % job.theirs.rows:
        raise ValueError(f"{rows} rows per step in micro-batches of {job.theirs.rows}")
    return {
        "output_dir": str(Path(job.folder) / "trl"),
        "per_device_train_batch_size": job.theirs.rows,
        "gradient_accumulation_steps": rows // job.theirs.rows,
        "gradient_checkpointing": job.theirs.checkpointing,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": job.max_grad_norm,
        "max_steps": 10**6,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def weights(job: Job) -> dict[str, object]:
    """How models are loaded."""
    return {"dtype": job.dtype, "attn_implementation": "sdpa"}


def sft(job: Job) -> SFTTrainer:
    """Documents packed best-fit into blocks. A step holds as many tokens as ours, up to a block."""
    rows = _read(job, "documents")
    tokenizer, name = _student(job)
    mean = sum(len(r["text"].split()) + 1 for r in rows) / len(rows)
    per_batch = job.theirs.block * job.theirs.rows
    blocks = max(round(mean * job.load.groups / per_batch), 1) * job.theirs.rows
    return SFTTrainer(
        model=name,
        args=SFTConfig(
            **arguments(job, blocks),
            model_init_kwargs=weights(job),
            packing=True,
            packing_strategy="bfd",
            max_length=job.theirs.block,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def dpo(job: Job) -> DPOTrainer:
    """Pairs, with the reference's log-probs computed in the step, as ours are."""
    tokenizer, name = _student(job)
    return DPOTrainer(
        model=name,
        args=DPOConfig(**arguments(job, job.load.groups), model_init_kwargs=weights(job), beta=0.1),
        train_dataset=Dataset.from_list(_read(job, "pairs")),
        processing_class=tokenizer,
    )


def grpo(job: Job) -> GRPOTrainer:
    """Groups of rollouts; the loss is the mean over sequences, and there is no reference."""
    tokenizer, name = _student(job)
    options = {"generation_kwargs": None, "cache_implementation": job.theirs.cache}
    return GRPOTrainer(
        model=name,
        reward_funcs=even_words,
        args=GRPOConfig(
            **arguments(job, job.load.groups * job.load.group_size),
            **options,
            model_init_kwargs=weights(job),
            num_generations=job.load.group_size,
            max_completion_length=job.load.completion_tokens,
            use_transformers_continuous_batching=job.theirs.continuous,
            loss_type="grpo",
            beta=0.0,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(_prompts(job)),
        processing_class=tokenizer,
    )


def distillation(job: Job) -> DistillationTrainer:
    """One rollout per row, so a group is a row that stands as often as it has members."""
    tokenizer, name = _student(job)
    rows = [row for row in _prompts(job) for _ in range(job.load.group_size)]
    return DistillationTrainer(
        model=name,
        teacher_model=str(Path(job.folder) / "teacher"),
        args=DistillationConfig(
            **arguments(job, len(rows)),
            model_init_kwargs=weights(job),
            teacher_model_init_kwargs=weights(job),
            cache_implementation=job.theirs.cache,
            max_completion_length=job.load.completion_tokens,
            beta=1.0,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


TRAINERS: dict[str, Callable[[Job], object]] = {
    "sft": sft,
    "dpo": dpo,
    "grpo": grpo,
    "opd": distillation,
    "opd_distinct": distillation,
}


class _Steps(TrainerCallback):
    """Stands at the gate between the steps of a trainer."""

    def __init__(self, gate: Steps, trainer: object, generating: list[float]) -> None:
        self._gate, self._trainer, self._generating = gate, trainer, generating
        self._tokens = 0

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self._gate.open()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        seen = int(getattr(self._trainer, "_total_train_tokens", 0))
        parts = {"tokens": float(seen - self._tokens), "generate": sum(self._generating)}
        self._tokens = seen
        self._generating.clear()
        self._gate.step_done(parts)


def _timed(trainer: object, name: str) -> tuple[list[float]]:
    """Note the seconds that a method of the trainer takes, where it has one of that name."""
    spent: list[float] = []
    method = getattr(trainer, name, None)
    if method is not None:

        def timed(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            spent.append(time.perf_counter() - started)
            return result

        setattr(trainer, name, timed)
    return (spent,)


def _student(job: Job) -> tuple[object, str]:
    given = job.work in ("sft", "dpo")
    folder = str(Path(job.folder) / ("model" if given else "endless"))
    return AutoTokenizer.from_pretrained(folder), folder


def _read(job: Job, name: str) -> list[dict[str, str]]:
    lines = (Path(job.folder) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _prompts(job: Job) -> list[dict[str, str]]:
    """The prompts that our side trains on: the last row is kept for measuring."""
    return [{"prompt": row["prompt"]} for row in _read(job, "prompts")[:-1]]
