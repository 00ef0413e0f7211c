"""The balancing loss of routers, as a configuration asks for it."""

from __future__ import annotations

from collections.abc import Mapping

ASKED, WEIGHT = "output_router_logits", "router_aux_loss_coef"


def balance_weight(config: Mapping[str, object]) -> float:
    """The coefficient of the balancing loss, whether or not training is to add it.

    Example:
        >>> balance_weight({"router_aux_loss_coef": 0.001}), balance_weight({})
        (0.001, 0.0)
    """
    weight = config.get(WEIGHT)
    return float(weight) if isinstance(weight, int | float) else 0.0


def balance_words(config: Mapping[str, object]) -> str | None:
    """What training does about it; None where the configuration has no such loss.

    Example:
        >>> balance_words({"router_aux_loss_coef": 0.001, "output_router_logits": True})
        'router_aux_loss_coef 0.001: the balancing loss is added to every step'
    """
    weight = balance_weight(config)
    if not weight:
        return None
    if config.get(ASKED) is True:
        return f"{WEIGHT} {weight:g}: the balancing loss is added to every step"
    return f"{WEIGHT} {weight:g}: no balancing loss is added, {ASKED} is off"
