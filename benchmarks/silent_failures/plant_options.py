"""Planters of faults in options, teachers, references and adapters."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from silent_failures.planting import finished, planted, same_as_twin
from silent_failures.result import Result
from silent_failures.shapes import (
    Tensors,
    add_rows,
    change_json,
    change_weights,
    mixture_of_experts,
)
from silent_failures.world import Setup


def _rate(value: float):  # type: ignore[no-untyped-def]
    def write(setup: Setup) -> None:
        setup.stage["optimizer"]["lr"] = value

    return write


planted("rate-not-finite", names="inf|finite|lr|learning_rate")(_rate(float("inf")))
planted("rate-negative", names="negative|lr|learning_rate")(_rate(-0.001))
planted("rate-far-too-high", names="kl|entropy|ratio|finite|nan|loss|gradient|chance")(_rate(1.0))
planted("rate-far-too-high-sft", names="loss|finite|nan|chance|gradient")(_rate(1.0))

RATE = re.compile(r"\b(lr|learning_rate): [\d.e-]+")


@planted("rate-as-text", names="lr|learning_rate|text|str", right=same_as_twin)
def rate_as_text(setup: Setup) -> None:
    setup.edits.append(lambda text: RATE.sub(r"\1: 1e-3", text))


@planted("option-misspelt", names="group_sice|num_generationz|unknown|unrecognized|unused")
def misspelt(setup: Setup) -> None:
    names = {"group_size:": "group_sice:", "num_generations:": "num_generationz:"}

    def edit(text: str) -> str:
        for right, wrong in names.items():
            text = text.replace(right, wrong)
        return text

    setup.edits.append(edit)


@planted("option-twice", names="twice|duplicate")
def option_twice(setup: Setup) -> None:
    def edit(text: str) -> str:
        return re.sub(r"\n( *)(lr|learning_rate): .*", r"\g<0>\n\1\2: 0.1", text, count=1)

    setup.edits.append(edit)


@planted("group-of-one", names="group|num_generations|zero|no_signal")
def group_of_one(setup: Setup) -> None:
    setup.method["group_size"] = 1


@planted("greedy-rollouts", names="greedy|temperature|no_signal")
def greedy(setup: Setup) -> None:
    setup.method["sampling"] = {"temperature": 0.0}


@planted("nucleus-rollouts", names="top_p|truncat|ratio")
def nucleus(setup: Setup) -> None:
    setup.method["sampling"] = {"temperature": 1.0, "top_p": 0.5}


@planted("prompt-beyond-context", names="context|longer|fits|tokens")
def beyond_context(setup: Setup) -> None:
    rows = setup.rows("tasks.jsonl")
    rows[7]["prompt"] = "Calculate " * 150 + rows[7]["prompt"] + " xyz" * 100
    setup.write("tasks.jsonl", rows)


@planted("nothing-to-train", names="nothing|no row|empty|left out|skipped")
def nothing_to_train(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    for row in rows:
        row["messages"][0]["content"] += " very long" * 40
    setup.write("demos.jsonl", rows)
    setup.method["data"]["too_long"] = "skip"


LORA = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def _adapted_twice(setup: Setup) -> None:
    """SFT with adapters, then RL with adapters and a KL to the reference."""
    rl = setup.stage
    rl["method"]["kl_weight"] = 0.01
    sft = {
        **rl,
        "name": "first",
        "method": {"name": "sft", "data": {"path": "demos.jsonl"}},
        "groups_per_step": 8,
        "lora": LORA,
        "optimizer": {"lr": 1e-2},
    }
    rl["lora"] = LORA
    setup.recipe["stages"] = [sft, rl]


def _starts_at_reference(result: Result, twin: Result) -> bool:
    kl = [v for name, v in result.first.items() if name == "kl" or name.endswith("/kl")]
    return bool(kl) and abs(kl[0]) < 1e-4


@planted(
    "reference-of-another-model", twin=_adapted_twice, names="reference", right=_starts_at_reference
)
def reference(setup: Setup) -> None:
    _adapted_twice(setup)


@planted("teacher-other-tokenizer", names="tokenizer|vocabular")
def teacher_tokenizer(setup: Setup) -> None:
    def permuted(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        moved = {t: i for t, i in vocab.items() if 9 <= i < 110}
        order = np.random.default_rng(0).permutation(list(moved.values())).tolist()
        vocab.update(zip(moved, order, strict=True))

    change_json(setup.folder / "teacher/tokenizer.json", permuted)


@planted("teacher-with-padding-rows", right=finished, must_work=True)
def padded_teacher(setup: Setup) -> None:
    add_rows(setup.folder / "teacher", 16)

    def unlikely(tensors: Tensors) -> Tensors:
        tensors["model.embed_tokens.weight"][-16:] = 0
        return tensors

    change_weights(setup.folder / "teacher", unlikely)


def _adapters(setup: Setup, *targets: str) -> None:
    setup.stage["lora"] = {**LORA, "target_modules": list(targets) or "all-linear"}


@planted(
    "adapter-reaches-nothing",
    twin=lambda s: _adapters(s, "q_proj", "v_proj"),
    names="query_key_value|target",
)
def reaches_nothing(setup: Setup) -> None:
    _adapters(setup, "query_key_value")


def _reaches_experts(result: Result, twin: Result) -> bool:
    return "experts" in result.first


@planted("adapter-misses-experts", twin=_adapters, names="expert", right=_reaches_experts)
def misses_experts(setup: Setup) -> None:
    mixture_of_experts(setup.model)
    _adapters(setup)


@planted(
    "router-loss-left-out",
    twin=lambda s: mixture_of_experts(s.model, router_aux_loss_coef=0.0),
    names="router|aux|balanc",
    right=lambda r, t: any("aux" in name or "router" in name for name in r.first),
)
def router_loss(setup: Setup) -> None:
    mixture_of_experts(setup.model, output_router_logits=True, router_aux_loss_coef=0.01)
