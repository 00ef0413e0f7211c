"""Measurements: what they refuse, what they compare, and that files keep every bit."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from measurements import measured, policy

from posttrain.core.errors import DataError, RunError
from posttrain.measure.columns import raw_columns
from posttrain.measure.measurement import Measurement, require_comparable


def rich(seed: int = 0) -> Measurement:
    rng = np.random.default_rng(seed)
    graded = measured(
        rng.random((3, 5)),
        "graded",
        success=0.1,
        lengths=rng.integers(1, 2**31 - 1, (3, 5)),
        truncated=rng.random((3, 5)) < 0.5,
        nll=np.array([[np.nan, np.inf, -0.0, 1e-45, 3.3]] * 3, np.float32),
        kl_base=rng.normal(size=(3, 2)),
        distinct=[1, 5, 2],
        answers=[[0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [0, 1, 1, 0, 1]],
        self_bleu=rng.random(3),
        repetition=rng.random((3, 5)),
        recheck=rng.random((3, 2)) < 0.5,
    )
    return policy(measured(rng.random((4, 7)) < 0.5), graded)


def test_counts_follow_the_threshold() -> None:
    task = measured(np.array([[0.2, 0.5, 0.9], [0.0, 0.1, 0.4]]), success=0.5)
    assert task.successes.tolist() == [[False, True, True], [False] * 3]
    assert task.counts.tolist() == [2, 0]
    assert task.num_samples == 3


def test_a_score_equal_to_the_threshold_succeeds_though_float32_rounds_it_down() -> None:
    assert float(np.float32(0.9)) != 0.9
    assert measured(np.array([[0.9]]), success=0.9).counts.tolist() == [1]
    assert float(np.float32(0.7)) < 0.7
    assert measured(np.array([[0.7]]), success=0.7).counts.tolist() == [1]


def test_arrays_are_copies_that_nobody_can_change() -> None:
    scores = np.zeros((1, 2), np.float32)
    task = measured(scores)
    scores[:] = 1.0
    assert task.counts.tolist() == [0]
    with pytest.raises(ValueError, match="read-only"):
        task.scores[0, 0] = 1.0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"scores": np.zeros((3, 4))}, "for 2 prompts"),
        ({"scores": np.zeros((2, 0))}, "at least one of each"),
        ({"scores": np.full((2, 4), np.nan)}, "not finite"),
        ({"lengths": np.zeros((2, 3))}, "lengths of shape"),
        ({"distinct": np.zeros((2, 4))}, "distinct of shape"),
        ({"kl_base": np.zeros((2, 5))}, "kl_base of shape"),
        ({"kl_base": np.zeros((2, 0))}, "kl_base of shape"),
        ({"recheck": np.zeros((2, 5))}, "recheck of shape"),
        ({"answers": np.zeros((2, 3))}, "answers of shape"),
        ({"answers": np.full((2, 4), 4)}, "outside 0 to 3"),
        ({"self_bleu": np.zeros((2, 4))}, "self_bleu of shape"),
        ({"repetition": np.zeros(2)}, "repetition of shape"),
        ({"prompts": ("a", "a")}, "every prompt once"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says):
        measured(np.zeros((2, 4)), **fields)


def test_json_round_trip_keeps_every_bit() -> None:
    first = rich()
    second = Measurement.from_json(first.to_json())
    assert second.to_json() == first.to_json()
    assert (second.policy, second.digest, second.protocol) == ("base", "d" * 64, "p" * 64)
    for a, b in zip(first.tasks, second.tasks, strict=True):
        assert (a.taskset, a.prompts, a.success) == (b.taskset, b.prompts, b.success)
        for name in ("scores", "lengths", "truncated", "nll", "distinct"):
            x, y = (np.asarray(object.__getattribute__(m, name)) for m in (a, b))
            assert x.dtype == y.dtype
            assert x.tobytes() == y.tobytes()
    assert first.tasks[1].raw.keys() == raw_columns().keys()
    assert second.tasks[0].raw == {}
    for name in raw_columns():
        x, y = (np.asarray(m.tasks[1].raw[name]) for m in (first, second))
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()
    assert np.shape(second.tasks[1].raw["kl_base"]) == (3, 2)


def test_a_negative_zero_score_keeps_its_sign() -> None:
    again = Measurement.from_json(policy(measured(np.array([[-0.0, 1.0]]))).to_json())
    assert np.signbit(again.tasks[0].scores).tolist() == [[True, False]]


def test_successes_are_readable_in_the_file() -> None:
    document = json.loads(policy(measured(np.array([[1, 0, 1], [0, 0, 0]]))).to_json())
    assert document["tasks"][0]["scores"] == ["101", "000"]


def damaged(change: str) -> str:
    document = json.loads(rich().to_json())
    task = document["tasks"][1]
    match change:
        case "cut":
            return rich().to_json()[:-20]
        case "format":
            document["format"] = "posttrain.measurement/9"
        case "unknown field":
            document["colour"] = "blue"
        case "base64":
            task["nll"]["zlib64"] = "!" + task["nll"]["zlib64"]
        case "shape":
            task["nll"]["shape"] = [3, 6]
        case "negative shape":
            task["nll"]["shape"] = [-3, -5]
        case "dtype":
            task["lengths"]["dtype"] = "<f4"
        case "bits":
            task["truncated"][0] = "10x10"
        case "prompt missing":
            task["prompts"].pop()
    return json.dumps(document)


@pytest.mark.parametrize(
    "change",
    [
        "cut",
        "format",
        "unknown field",
        "base64",
        "shape",
        "negative shape",
        "dtype",
        "bits",
        "prompt missing",
    ],
)
def test_a_damaged_file_is_refused(change: str) -> None:
    Measurement.from_json(damaged("nothing"))
    with pytest.raises(DataError):
        Measurement.from_json(damaged(change))


def test_task_by_name() -> None:
    both = rich()
    assert both.task("graded") is both.tasks[1]
    with pytest.raises(RunError, match="did you mean 'graded'"):
        both.task("gradde")
    with pytest.raises(DataError, match="twice"):
        policy(both.tasks[0], both.tasks[0])


def test_other_protocols_are_refused_with_what_differs() -> None:
    base = policy(measured(np.zeros((3, 4))))
    require_comparable(base, policy(measured(np.ones((3, 4))), name="tuned"))

    def refusal(other: Measurement) -> str:
        with pytest.raises(RunError) as caught:
            require_comparable(base, other)
        return str(caught.value)

    more = refusal(policy(measured(np.zeros((3, 8))), name="tuned", protocol="q" * 64))
    assert "4 and 8 samples" in more
    assert "pppppppp and qqqqqqqq" in more
    fewer = refusal(policy(measured(np.zeros((2, 4))), name="tuned", protocol="q" * 64))
    assert "3 and 2 prompts, 2 in common" in fewer
    bar = refusal(policy(measured(np.zeros((3, 4)), success=0.5), name="tuned", protocol="q" * 64))
    assert "score of 1.0 and 0.5" in bar
    missing = refusal(
        policy(measured(np.zeros((3, 4)), "products"), name="tuned", protocol="q" * 64)
    )
    assert "only base was measured on 'sums'" in missing
    assert "only tuned was measured on 'products'" in missing
    assert "decoding, seeds, verifier or prompt texts" in refusal(replace(base, protocol="q" * 64))


def test_equal_protocols_that_contradict_themselves_are_refused() -> None:
    base = policy(measured(np.zeros((3, 4))))
    turned = measured(np.zeros((3, 4)), prompts=("sums/2", "sums/1", "sums/0"))
    with pytest.raises(RunError, match="in another order"):
        require_comparable(base, policy(turned, name="tuned"))


PARTS = {
    "decoding": "temperature 1",
    "template": "none",
    "prompts of sums": "a" * 64,
    "verifier of sums": "b" * 64,
    "prompts of products": "c" * 64,
    "verifier of products": "d" * 64,
}


def known(**changes: str) -> Measurement:
    tasks = tuple(measured(np.zeros((3, 4)), name) for name in ("sums", "products"))
    parts = PARTS | {name.replace("_", " "): value for name, value in changes.items()}
    return replace(policy(*tasks), parts=parts)


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("decoding", "temperature 0.7", "the decoding ('temperature 1' and 'temperature 0.7')"),
        ("template", "e" * 64, "the template ('none' and "),
        ("prompts_of_sums", "e" * 64, "what differs: the prompts of sums\n"),
        ("verifier_of_products", "e" * 64, "what differs: the verifier of products\n"),
    ],
)
def test_the_part_of_the_protocol_that_differs_is_named(part: str, value: str, says: str) -> None:
    with pytest.raises(RunError) as caught:
        require_comparable(known(), known(**{part: value}))
    assert says in str(caught.value)
    others = [n for n in PARTS if n != part.replace("_", " ")]
    assert not any(f"the {name}" in str(caught.value) for name in others)


def test_known_parts_decide_and_a_task_set_left_out_does_not_matter() -> None:
    one, other = known(), replace(known(verifier_of_products="e" * 64), protocol="q" * 64)
    require_comparable(one, replace(one, protocol="q" * 64))
    with pytest.raises(RunError, match="verifier of products"):
        require_comparable(one, other)
    require_comparable(one.only(["sums"]), other.only(["sums"]))
    assert [t.taskset for t in one.only(["products", "sums", "sums"]).tasks] == ["products", "sums"]
    with pytest.raises(RunError, match="did you mean 'sums'"):
        one.only(["sum"])


def test_files_without_parts_are_held_to_their_digests() -> None:
    old = replace(known(), parts={})
    require_comparable(old, known())
    with pytest.raises(RunError, match="decoding, seeds, verifier or prompt texts"):
        require_comparable(old, replace(known(), protocol="q" * 64))


def test_parts_survive_the_file_and_old_files_load() -> None:
    again = Measurement.from_json(known().to_json())
    assert dict(again.parts) == PARTS
    document = json.loads(rich().to_json())
    del document["parts"]
    for task in document["tasks"]:
        for name in ("answers", "self_bleu", "repetition", "recheck"):
            del task[name]
    old = Measurement.from_json(json.dumps(document))
    assert not old.parts
    assert old.tasks[1].raw.keys() == {"kl_base"}
