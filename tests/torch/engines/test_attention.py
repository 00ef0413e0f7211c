"""Packed attention: values by numpy in float64 from the definition, gradients by differences."""

import numpy as np
import pytest
import torch

from posttrain.engines.local import tiles as tiling
from posttrain.engines.local.attention import PackedPlan
from posttrain.engines.local.flex import FlexBlocks
from posttrain.engines.local.tiles import Tiles
from posttrain.numerics.batch import Segment

CPU = torch.device("cpu")
H, D, SCALING = 4, 8, 0.3


def segments_of(*groups):
    """Groups as (prompt length, completion lengths): prompt first, completions behind it."""
    out, at = [], 0
    for prompt, completions in groups:
        parent = None
        if prompt:
            out.append(Segment(at, prompt, None))
            parent, at = len(out) - 1, at + prompt
        for length in completions:
            out.append(Segment(at, length, parent))
            at += length
    return tuple(out)


def interleaved():
    """Completions of two prompts in turn: a group's queries stand in several places."""
    lengths, parents = (5, 3, 6, 2, 6, 4), (None, None, 0, 1, 0, 1)
    starts = np.cumsum([0, *lengths])
    return tuple(Segment(int(s), n, p) for s, n, p in zip(starts, lengths, parents, strict=False))


LAYOUTS = {
    "groups": segments_of((5, (3, 1, 7)), (2, (4, 4)), (5, (2, 9, 1, 1))),
    "one prompt, one completion": segments_of((6, (4,)), (3, (9,))),
    "no prompts": segments_of((0, (3, 5, 5, 2))),
    "a prompt nobody continues": segments_of((4, ()), (4, (2, 3))),
    "many of one length": segments_of(*[(4, (3, 3, 3))] * 3),
    "long ones": segments_of((130, (7, 150, 129))),
    "interleaved": interleaved(),
}


def reads(segments):
    """[T, T] bool and distances: which token reads which, from the definition of a segment."""
    total = sum(s.length for s in segments)
    sees, position = np.zeros((total, total), bool), np.zeros(total, int)
    for s in segments:
        own = np.arange(s.start, s.start + s.length)
        position[own] = np.arange(s.length)
        if s.parent is not None:
            prompt = segments[s.parent]
            before = np.arange(prompt.start, prompt.start + prompt.length)
            position[own] += prompt.length
            sees[np.ix_(own, before)] = True
        sees[np.ix_(own, own)] = np.tri(s.length, dtype=bool)
    return sees, position[:, None] - position[None, :]


def by_numpy(q, k, v, segments, *, window=None):
    """[T, H, D] in float64."""
    sees, distance = reads(segments)
    if window is not None:
        sees = sees & (distance < window)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = SCALING * np.einsum("thd,shd->hts", q, k)
    scores = np.where(sees, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v)


def inputs(segments, *, heads_kv=2, size_v=D, seed=0):
    rng = np.random.default_rng(seed)
    total = sum(s.length for s in segments)
    shapes = ((total, H, D), (total, heads_kv, D), (total, heads_kv, size_v))
    return [rng.normal(0, 1.5, s) for s in shapes]


def as_leaves(arrays):
    return [torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in arrays]


def attend(leaves, segments, window=None):
    plan = PackedPlan.of(segments, device=CPU)
    return plan.attend(*leaves, scaling=SCALING, window=window)


@pytest.mark.parametrize("segments", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_values_are_those_of_the_definition(segments, heads_kv):
    arrays = inputs(segments, heads_kv=heads_kv)
    out = attend(as_leaves(arrays), segments).detach().numpy()
    np.testing.assert_allclose(out, by_numpy(*arrays, segments), atol=2e-5)


@pytest.mark.parametrize("window", [1, 3, 6, 400])
def test_a_window_counts_from_the_beginning_of_the_prompt(window):
    segments = LAYOUTS["groups"]
    arrays = inputs(segments)
    out = attend(as_leaves(arrays), segments, window).detach().numpy()
    np.testing.assert_allclose(out, by_numpy(*arrays, segments, window=window), atol=2e-5)


@pytest.mark.parametrize("segments", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads_kv", [2, 4])
def test_the_blocks_of_a_gpu_read_the_same(segments, window, heads_kv):
    """The forward pass alone: FlexAttention has no backward pass on a CPU."""
    arrays = inputs(segments, heads_kv=heads_kv)
    leaves = [leaf.detach() for leaf in as_leaves(arrays)]
    out = FlexBlocks(segments, device=CPU).attend(*leaves, scaling=SCALING, window=window)
    expected = by_numpy(*arrays, segments, window=window)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("segments", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size_v", [D, 6], ids=["kernel", "plain"])
def test_gradients_are_finite_differences(segments, size_v):
    arrays = inputs(segments, size_v=size_v)
    rng = np.random.default_rng(1)
    direction = rng.normal(size=(*arrays[0].shape[:2], size_v))
    leaves = as_leaves(arrays)
    (attend(leaves, segments) * torch.tensor(direction, dtype=torch.float32)).sum().backward()
    step = 1e-5
    for index, array in enumerate(arrays):
        # One random direction per input touches every entry of its gradient at once.
        along = rng.normal(size=array.shape)
        sides = []
        for sign in (1, -1):
            moved = [a + sign * step * along if i == index else a for i, a in enumerate(arrays)]
            sides.append((by_numpy(*moved, segments) * direction).sum())
        expected = (sides[0] - sides[1]) / (2 * step)
        found = float((leaves[index].grad.double().numpy() * along).sum())
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("segments", LAYOUTS.values(), ids=LAYOUTS)
def test_tiles_and_masks_give_the_same_gradients(segments):
    direction = torch.randn(sum(s.length for s in segments), H, D)
    both = []
    for plan in (PackedPlan.of(segments, device=CPU), None):
        leaves = as_leaves(inputs(segments))
        if plan is None:
            masks = tiling_masks(segments)
            out = masks.attend(*leaves, scaling=SCALING, window=10**9)
        else:
            out = plan.attend(*leaves, scaling=SCALING, window=None)
        both.append(torch.autograd.grad((out * direction).sum(), leaves))
    for ours, masked in zip(*both, strict=True):
        torch.testing.assert_close(ours, masked, atol=2e-5, rtol=1e-4)


def tiling_masks(segments):
    from posttrain.engines.local.masked import MaskedBlocks

    return MaskedBlocks.of(segments, device=CPU)


def test_large_scores_overflow_nowhere():
    """Padding stands beside keys that it does not read: their scores may be anything."""
    segments = LAYOUTS["groups"]
    arrays = inputs(segments)
    leaves = as_leaves([40 * arrays[0], 40 * arrays[1], arrays[2]])
    out = attend(leaves, segments)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_a_shared_prompt_is_read_once_per_group(monkeypatch):
    """The work of a group: one tile for all its completions, with the prompt's keys once."""
    seen = []
    forward = tiling._forward

    def watched(q, k, v, causal, scaling):
        seen.append((causal, k.shape[0] * k.shape[1]))
        return forward(q, k, v, causal, scaling)

    monkeypatch.setattr(tiling, "_forward", watched)
    segments = segments_of((256, (40,) * 16), (256, (40,) * 16))
    attend(as_leaves(inputs(segments)), segments)
    assert sum(keys for causal, keys in seen if not causal) == 2 * 256
    assert sum(keys for causal, keys in seen if causal) == sum(s.length for s in segments)


def test_equal_runs_side_by_side_are_not_copied():
    tiles = Tiles.of(segments_of((0, (12,) * 5)), device=CPU)
    (rows,) = tiles.own
    x = torch.randn(60, 3)
    assert rows.take(x).data_ptr() == x.data_ptr()


def test_bfloat16_is_as_close_as_its_precision():
    segments = LAYOUTS["groups"]
    arrays = inputs(segments)
    leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in as_leaves(arrays)]
    out = attend(leaves, segments)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves)
    np.testing.assert_allclose(out.detach().float().numpy(), by_numpy(*arrays, segments), atol=0.06)
