"""For people who extend posttrain: tiny real models, fakes, and a contract suite per seam.

An engine, source, signal, term, method or task set from outside proves itself by passing the
``check_*`` function of its seam; each raises ``AssertionError`` with the broken promise in words.
"""

from posttrain.testing.characters import CharRenderer
from posttrain.testing.contracts import check_method, check_term
from posttrain.testing.fakes import (
    FakePolicy,
    FakeTaskSet,
    RuleTaskSet,
    TablePolicy,
    as_group,
    example_trajectory,
    fake_tools,
)
from posttrain.testing.seams import (
    check_learner,
    check_policy,
    check_signal,
    check_source,
    check_taskset,
)
from posttrain.testing.tiny import tiny_model, tiny_tokenizer

__all__ = [
    "CharRenderer",
    "FakePolicy",
    "FakeTaskSet",
    "RuleTaskSet",
    "TablePolicy",
    "as_group",
    "check_learner",
    "check_method",
    "check_policy",
    "check_signal",
    "check_source",
    "check_taskset",
    "check_term",
    "example_trajectory",
    "fake_tools",
    "tiny_model",
    "tiny_tokenizer",
]
