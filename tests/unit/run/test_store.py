"""Trajectories and uses come back exactly, and equal content is equal bytes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import files
from posttrain.core.errors import DataError, DiskFull
from posttrain.core.files import hash_file
from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
from posttrain.core.trajectory import End, Trajectory
from posttrain.run.store import (
    ProducerTokens,
    Use,
    UseRole,
    read_texts,
    read_trajectories,
    read_uses,
    tokens_by_producer,
    write_trajectories,
    write_uses,
)

floats = st.floats(0, 10, allow_nan=False)
versions = st.integers(0, 2**63 - 1)
samplings = st.builds(
    Sampling,
    temperature=floats,
    top_k=st.integers(0, 2**63 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1, exclude_max=True),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    length, kind = draw(st.integers(1, 5)), draw(st.sampled_from(Kind))
    logprob = st.floats(max_value=0, allow_nan=False, width=32)
    logprobs = draw(st.none() | st.lists(logprob, min_size=length, max_size=length))
    return Span(
        length=length,
        role=draw(st.sampled_from(Role)),
        producer=Producer(kind=kind, name=draw(st.text()), digest=draw(st.none() | st.text())),
        versions=draw(st.tuples(versions, versions)) if kind is Kind.LEARNER else None,
        sampling=draw(st.none() | samplings),
        logprobs=None if logprobs is None else np.array(logprobs, np.float32),
    )


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    parts = tuple(draw(st.lists(spans(), max_size=4)))
    num_tokens = sum(s.length for s in parts)
    token = st.integers(-(2**31), 2**31 - 1)
    tokens = draw(st.lists(token, min_size=num_tokens, max_size=num_tokens))
    return Trajectory(
        task=draw(st.text()),
        tokens=np.array(tokens, np.int32),
        prompt_length=draw(st.integers(0, num_tokens)),
        spans=parts,
        end=draw(st.sampled_from(End)),
        parent=draw(st.none() | st.text()),
    )


def bits(array: np.ndarray | None) -> tuple[str, bytes] | None:
    return None if array is None else (str(array.dtype), array.tobytes())


def content(t: Trajectory) -> tuple[object, ...]:
    """Everything a trajectory holds, arrays by their bits, for an exact comparison."""
    held = [
        (s.length, s.role, s.producer, s.versions, repr(s.sampling), bits(s.logprobs))
        for s in t.spans
    ]
    return t.id, t.task, bits(t.tokens), t.prompt_length, t.end, t.parent, held


def rollout(i: int = 0, *, logprob: float | None = -0.5, task: str = "sums/1") -> Trajectory:
    me = Producer(kind=Kind.LEARNER, name="run-7f3a")
    asked = Span(length=1, role=Role.USER, producer=Producer(kind=Kind.ENVIRONMENT, name="sums"))
    said = Span(
        length=2,
        role=Role.ASSISTANT,
        producer=me,
        versions=(i, i),
        sampling=Sampling(seed=i),
        logprobs=None if logprob is None else np.full(2, logprob, np.float32),
    )
    tokens = np.array([5, 6, i], np.int32)
    return Trajectory(task=task, tokens=tokens, prompt_length=1, spans=(asked, said))


uses = st.builds(
    Use,
    trajectory=st.text(),
    task=st.text(),
    kind=st.sampled_from(Kind),
    producer=st.text(),
    stage=st.text(),
    step=versions,
    role=st.sampled_from([UseRole.TRAIN, UseRole.EVAL]),
    reward=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    advantage=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    prompt_tokens=versions,
    completion_tokens=versions,
    first_version=st.none() | versions,
    last_version=st.none() | versions,
) | st.builds(
    lambda use, reason: replace(use, role=UseRole.DISCARDED, reason=reason),
    st.just(
        Use(
            trajectory="ab",
            task="t",
            kind=Kind.TEACHER,
            producer="p",
            stage="s",
            step=0,
            role=UseRole.TRAIN,
            prompt_tokens=1,
            completion_tokens=2,
        )
    ),
    st.text(),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(trajectories(), max_size=6))
def test_trajectories_come_back_exactly(given_trajectories: list[Trajectory]) -> None:
    distinct = {}
    for t in given_trajectories:
        distinct.setdefault(t.id, t)
    with TemporaryDirectory() as folder:
        path = Path(folder, "t.parquet")
        digest = write_trajectories(path, given_trajectories)
        assert digest == hash_file(path)
        back = read_trajectories(path)
    assert [content(t) for t in back] == [content(t) for t in distinct.values()]


def test_log_probs_that_are_missing_zero_or_not_numbers_stay_apart(tmp_path: Path) -> None:
    given_ones = [rollout(0, logprob=None), rollout(1, logprob=0.0), rollout(2, logprob=np.nan)]
    given_ones.append(rollout(3, logprob=-np.inf))
    write_trajectories(tmp_path / "t", given_ones)
    back = [t.spans[1].logprobs for t in read_trajectories(tmp_path / "t")]
    assert back[0] is None
    assert [x.tolist() for x in back[1:2]] == [[0.0, 0.0]]
    assert np.isnan(back[2]).all()
    assert np.isneginf(back[3]).all()


def test_one_row_per_id_in_order_of_first_appearance(tmp_path: Path) -> None:
    first, again = rollout(1, logprob=-0.5), rollout(1, logprob=-0.25)
    assert first.id == again.id
    write_trajectories(tmp_path / "t", [first, rollout(0), again, rollout(0)])
    back = read_trajectories(tmp_path / "t")
    assert [t.id for t in back] == [first.id, rollout(0).id]
    assert back[0].spans[1].logprobs.tolist() == [-0.5, -0.5]


def test_more_rows_than_one_row_group(tmp_path: Path) -> None:
    many = [rollout(i) for i in range(5000)]
    write_trajectories(tmp_path / "t", many)
    assert pq.ParquetFile(tmp_path / "t").num_row_groups == 2
    back = read_trajectories(tmp_path / "t")
    assert [t.id for t in back] == [t.id for t in many]


def test_texts_stand_beside_the_tokens(tmp_path: Path) -> None:
    a, b = rollout(0), rollout(1)
    write_trajectories(tmp_path / "t", [a, b], {b.id: "6 é"})
    assert read_texts(tmp_path / "t") == {b.id: "6 é"}
    assert len(read_trajectories(tmp_path / "t")) == 2
    with pytest.raises(DataError, match="a text for ffff"):
        write_trajectories(tmp_path / "t", [a], {"ffff": "?"})


def with_said(t: Trajectory, **changes: object) -> Trajectory:
    return replace(t, spans=(t.spans[0], replace(t.spans[1], **changes)))


def test_stop_strings_come_back_and_are_part_of_the_id(tmp_path: Path) -> None:
    stopped = with_said(rollout(), sampling=Sampling(seed=0, stop=("\n\n", "END")))
    write_trajectories(tmp_path / "t", [stopped, rollout()])
    read = {t.id: t.spans[1].sampling for t in read_trajectories(tmp_path / "t")}
    assert read == {stopped.id: stopped.spans[1].sampling, rollout().id: Sampling(seed=0)}


@pytest.mark.parametrize("stop", [("",), "END"])
def test_stop_strings_are_a_tuple_of_something(stop: object) -> None:
    with pytest.raises(DataError, match="stop="):
        Sampling(stop=stop)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trajectory", "complaint"),
    [
        (with_said(rollout(), logprobs=np.zeros(2)), "array of float64"),
        (replace(rollout(), tokens=np.array([1, 2, 3])), "array of int64"),
        (with_said(rollout(), sampling=Sampling(temperature=1)), "would be read back as"),
        (with_said(rollout(), versions=(np.int64(1), 1)), "would be read back as"),
        (with_said(rollout(), sampling=Sampling(seed=2**63)), "does not fit"),
    ],
)
def test_what_would_not_come_back_is_refused_before_it_is_written(
    tmp_path: Path, trajectory: Trajectory, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        write_trajectories(tmp_path / "t", [trajectory])
    assert os.listdir(tmp_path) == []


def test_a_row_that_is_not_what_its_id_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_trajectories(path, [rollout(0), rollout(1)])
    table = pq.read_table(path)
    edited = table.set_column(1, table.field("task"), pa.array(["sums/1", "sums/2"]))
    pq.write_table(edited, path)
    with pytest.raises(DataError, match="row 1: the content has id"):
        read_trajectories(path)


@settings(max_examples=60, deadline=None)
@given(st.lists(uses, max_size=6))
def test_uses_come_back_exactly(given_uses: list[Use]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "u.parquet")
        assert write_uses(path, given_uses) == hash_file(path)
        back = read_uses(path)
    assert back == given_uses
    assert all(type(u.kind) is Kind and type(u.role) is UseRole for u in back)


@pytest.mark.parametrize(
    "changes",
    [
        {"role": UseRole.DISCARDED},
        {"reason": "stale"},
        {"reward": float("nan")},
        {"advantage": float("inf")},
        {"prompt_tokens": -1},
    ],
)
def test_a_use_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(DataError):
        replace(use(), **changes)


def use(name: str = "aa", **changes: object) -> Use:
    plain = Use(
        trajectory=name,
        task="sums/1",
        kind=Kind.LEARNER,
        producer="me",
        stage="rl",
        step=0,
        role=UseRole.TRAIN,
        prompt_tokens=3,
        completion_tokens=10,
    )
    return replace(plain, **changes)


def test_string_columns_are_dictionary_encoded_and_zstd(tmp_path: Path) -> None:
    write_uses(tmp_path / "u", [use(str(i)) for i in range(1000)])
    group = pq.ParquetFile(tmp_path / "u").metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    assert {c.compression for c in columns} == {"ZSTD"}
    encoded = {c.path_in_schema for c in columns if "RLE_DICTIONARY" in c.encodings}
    assert {"task", "kind", "producer", "stage", "role"} <= encoded


WRITE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_store import rollout, use
from posttrain.run.store import write_trajectories, write_uses
ts = [rollout(i) for i in range(300)]
folder = Path(sys.argv[1])
print(write_trajectories(folder / "t", ts, {ts[7].id: "seven"}))
print(write_uses(folder / "u", [use(t.id, reward=0.5) for t in ts]))
"""


def test_another_process_at_another_time_writes_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        code = [sys.executable, "-c", WRITE, str(folder), str(Path(__file__).parent)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": f"UTC{seed}"}
        done = subprocess.run(code, env=environment, capture_output=True, text=True, check=True)
        digests.append(done.stdout.split())
    assert digests[0] == digests[1]
    assert digests[0] == [hash_file(tmp_path / "1" / "t"), hash_file(tmp_path / "1" / "u")]
    ts = [rollout(i) for i in range(300)]
    changed = write_trajectories(tmp_path / "t", ts, {ts[7].id: "Seven"})
    assert changed != digests[0][0]


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_uses(tmp_path / "u", [use()])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(DiskFull):
        write_uses(tmp_path / "u", [])
    with pytest.raises(DiskFull):
        write_trajectories(tmp_path / "t", [rollout()])
    assert read_uses(tmp_path / "u") == [use()]
    assert os.listdir(tmp_path) == ["u"]


def test_files_of_another_sort_are_refused_by_name(tmp_path: Path) -> None:
    write_uses(tmp_path / "u", [use()])
    (tmp_path / "text").write_text("not parquet")
    raw = bytearray((tmp_path / "u").read_bytes())
    raw[20:60] = bytes(40)
    (tmp_path / "damaged").write_bytes(raw)
    with pytest.raises(DataError, match=r"holds uses/1"):
        read_trajectories(tmp_path / "u")
    with pytest.raises(DataError, match="text cannot be read"):
        read_uses(tmp_path / "text")
    with pytest.raises(DataError, match="damaged cannot be read"):
        read_uses(tmp_path / "damaged")
    with pytest.raises(FileNotFoundError):
        read_uses(tmp_path / "nowhere")


def test_tokens_by_producer_counts_uses_and_distinct_trajectories(tmp_path: Path) -> None:
    teacher = {"kind": Kind.TEACHER, "producer": "big"}
    write_uses(tmp_path / "1", [use("aa"), use("bb", completion_tokens=5), use("cc", **teacher)])
    write_uses(
        tmp_path / "2",
        [use("aa", step=1), use("dd", role=UseRole.DISCARDED, reason="stale"), use(stage="sft")],
    )
    write_uses(tmp_path / "3", [])

    def entry(*key: object, n: tuple[int, int], tokens: tuple[int, int]) -> ProducerTokens:
        stage, kind, producer, role = key
        return ProducerTokens(
            stage=stage,
            kind=kind,
            producer=producer,
            role=role,
            num_uses=n[0],
            num_trajectories=n[1],
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
        )

    assert tokens_by_producer(tmp_path / name for name in "123") == [
        entry("rl", Kind.LEARNER, "me", UseRole.DISCARDED, n=(1, 1), tokens=(3, 10)),
        entry("rl", Kind.LEARNER, "me", UseRole.TRAIN, n=(3, 2), tokens=(9, 25)),
        entry("rl", Kind.TEACHER, "big", UseRole.TRAIN, n=(1, 1), tokens=(3, 10)),
        entry("sft", Kind.LEARNER, "me", UseRole.TRAIN, n=(1, 1), tokens=(3, 10)),
    ]
    assert tokens_by_producer([]) == []
