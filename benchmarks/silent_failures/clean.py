"""Runs with nothing wrong: every refusal and every alarm in them is a false one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from silent_failures.faults import Base
from silent_failures.world import Setup

SEEDS = range(5)


class Clean(msgspec.Struct, kw_only=True):
    """One clean run."""

    name: str
    seed: int
    alarms: list[str] = []  # of the whole run
    failure: str | None = None  # a refusal, or an error

    @property
    def is_false(self) -> bool:
        """True when something was said of a run with nothing wrong."""
        return bool(self.alarms) or self.failure is not None


def _method(name: str, **options: Any) -> Callable[[Setup], None]:
    """The method of another name, with the rollouts or data of the base."""

    def change(setup: Setup) -> None:
        setup.method.update({"name": name, **options})

    return change


def _stage(**options: Any) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        setup.stage.update(options)

    return change


def _as_it_is(setup: Setup) -> None:
    """The base's own recipe."""


LORA = {"rank": 8, "alpha": 16, "target_modules": "all-linear"}

VARIANTS: Mapping[str, tuple[Base, Callable[[Setup], None]]] = MappingProxyType(
    {
        "sft": (Base.SFT, _as_it_is),
        "sft, adapters": (Base.SFT, _stage(lora=LORA, optimizer={"lr": 5e-3})),
        "sft, slow": (Base.SFT, _stage(optimizer={"lr": 1e-5})),
        "dft": (Base.SFT, _method("dft")),
        "dpo": (Base.DPO, _as_it_is),
        "dpo, adapters": (Base.DPO, _stage(lora=LORA, optimizer={"lr": 1e-3})),
        "ipo": (Base.DPO, _method("ipo")),
        "simpo": (Base.DPO, _method("simpo")),
        "kto": (Base.DPO, _method("kto")),
        "tr_dpo": (Base.DPO, _method("tr_dpo")),
        "grpo": (Base.GRPO, _as_it_is),
        "grpo, adapters": (Base.GRPO, _stage(lora=LORA, optimizer={"lr": 3e-3})),
        "grpo, two updates": (Base.GRPO, _stage(updates_per_draw=2)),
        "grpo, cooler": (
            Base.GRPO,
            _method("grpo", sampling={"temperature": 0.8}, kl_weight=0.0),
        ),
        "gspo": (Base.GRPO, _method("gspo")),
        "cispo": (Base.GRPO, _method("cispo")),
        "rloo": (Base.GRPO, _method("rloo")),
        "ppo": (Base.GRPO, _method("ppo")),
        "opd": (Base.OPD, _as_it_is),
        "opd_sampled": (Base.OPD, _method("opd_sampled")),
    }
)


def planned() -> Iterator[tuple[str, int]]:
    """All clean runs."""
    return ((name, seed) for seed in SEEDS for name in VARIANTS)
