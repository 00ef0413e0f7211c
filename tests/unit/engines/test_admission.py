"""Rows enter once, in whatever mixture, and never more than the limits allow."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from posttrain.core.provenance import Sampling
from posttrain.engines.local.admission import Limits, Queue
from posttrain.protocols import Request


def queue_of(groups, *, rows=8, tokens=10_000, row_tokens=5, prefill_tokens=100):
    """One (prompt length, number of requests) per group."""
    requests = [
        Request(prompt=np.full(length, i, np.int32), sampling=Sampling(), max_new_tokens=row_tokens)
        for i, (length, count) in enumerate(groups)
        for _ in range(count)
    ]
    limits = Limits(rows=rows, tokens=tokens, row_tokens=row_tokens, prefill_tokens=prefill_tokens)
    return Queue.of(requests, limits)


def test_a_group_wider_than_the_batch_is_prefilled_once():
    queue = queue_of([(4, 20)], rows=8)
    fresh, rows = queue.admit()
    assert len(fresh) == 1
    assert [index for _, index in rows] == list(range(8))
    queue.leave(fresh[0])
    assert queue.drop_closed() == []
    again, more = queue.admit()
    assert again == []
    assert [index for _, index in more] == [8]


def test_a_prompt_is_let_go_when_nobody_needs_it():
    queue = queue_of([(4, 2)])
    (prompt,), rows = queue.admit()
    for _ in rows:
        assert queue.drop_closed() == []
        queue.leave(prompt)
    assert queue.drop_closed() == [prompt]
    assert queue.live == queue.num_waiting == 0


def test_prefill_stays_within_its_tokens_and_a_long_prompt_goes_alone():
    queue = queue_of([(40, 1), (50, 1), (300, 1)], prefill_tokens=100)
    assert [len(p.tokens) for p in queue.admit()[0]] == [40, 50]
    assert [len(p.tokens) for p in queue.admit()[0]] == [300]


def test_memory_counts_a_prompt_once_and_every_row_with_all_it_may_draw():
    """A prompt of 50 and rows of up to 20: (150 - 50) / 20 = 5 rows."""
    queue = queue_of([(50, 9)], tokens=150, row_tokens=20)
    assert len(queue.admit()[1]) == 5


def test_one_row_enters_even_where_nothing_fits():
    queue = queue_of([(50, 2)], tokens=10)
    assert len(queue.admit()[1]) == 1
    assert queue.admit() == ([], [])


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(20, 400),
    st.randoms(use_true_random=False),
)
def test_every_request_enters_once_within_the_limits(groups, num_rows, tokens, random):
    queue = queue_of(groups, rows=num_rows, tokens=tokens)
    total = queue.num_waiting
    seen, live, prefilled = [], [], []
    while queue.num_waiting or live:
        fresh, rows = queue.admit()
        prefilled += [id(p) for p in fresh]
        seen += [index for _, index in rows]
        live += [prompt for prompt, _ in rows]
        width = max(len(p.tokens) for p in queue.held)
        held = len(queue.held) * width + len(live) * queue.limits.row_tokens
        assert len(live) == queue.live <= num_rows
        assert held <= tokens or len(live) == 1 or not rows
        assert live, "somebody must get on"
        for _ in range(random.randint(1, len(live))):
            queue.leave(live.pop(random.randrange(len(live))))
        queue.drop_closed()
    assert sorted(seen) == list(range(total))
    assert len(prefilled) == len(set(prefilled)) == len(groups)
