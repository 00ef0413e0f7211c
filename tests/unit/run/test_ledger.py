"""The chain shows every edit that a chain can show, and goes on after a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posttrain.core.errors import DataError, DiskFull, LedgerBroken, RunError
from posttrain.run import ledger as module
from posttrain.run.ledger import GENESIS, Ledger, RecordKind, read, verify


def noon() -> datetime:
    return datetime(2026, 11, 22, 13, 0, tzinfo=timezone(timedelta(hours=1)))


def ledger_of(path: Path, num_records: int) -> Ledger:
    ledger = Ledger.open(path, clock=noon)
    for i in range(num_records):
        kind = RecordKind.UPDATE if i else RecordKind.RUN
        ledger.append(kind, {"step": i, "loss": i / 3, "name": "é"})
    return ledger


def sample(num_records: int = 5) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "ledger.jsonl")
        ledger_of(path, num_records)
        return path.read_bytes()


SAMPLE = sample()
HEAD = hashlib.sha256(SAMPLE.split(b"\n")[-2]).hexdigest()
LINES = SAMPLE.split(b"\n")[:-1]


def verify_bytes(raw: bytes, *, head: str | None = None) -> module.Verified:
    with TemporaryDirectory() as folder:
        path = Path(folder, "ledger.jsonl")
        path.write_bytes(raw)
        return verify(path, head=head)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
bodies = st.dictionaries(st.text(), plain, max_size=4)


def test_the_exact_bytes_of_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path, clock=noon)
    ledger.append(RecordKind.RUN, {"seed": 7, "a": {"z": [1, 2.5, None], "b": "é\n"}})
    ledger.append(RecordKind.SAY, {})
    first = (
        '{"n":1,"t":"2026-11-22T12:00:00.000Z","kind":"run",'
        '"body":{"a":{"b":"é\\n","z":[1,2.5,null]},"seed":7},"prev":"' + 64 * "0" + '"}'
    ).encode()
    digest = hashlib.sha256(first).hexdigest()
    second = b'{"n":2,"t":"2026-11-22T12:00:00.000Z","kind":"say","body":{},"prev":"'
    second += digest.encode() + b'"}'
    assert path.read_bytes() == first + b"\n" + second + b"\n"
    assert ledger.head == hashlib.sha256(second).hexdigest()


def test_the_kinds_are_those_of_the_reference_and_six_more() -> None:
    reference = "run model source filter shard update checkpoint eval say sign"
    assert set(RecordKind) == {
        *reference.split(),
        *["gate", "stage", "proof", "saved", "file", "accept"],
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(bodies, max_size=4))
def test_what_is_appended_is_what_is_read(given_bodies: list[dict[str, object]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "ledger.jsonl")
        ledger = Ledger.open(path)
        appended = [ledger.append(RecordKind.EVAL, body) for body in given_bodies]
        assert read(path) == appended
        assert [dict(r.body) for r in appended] == given_bodies
        held = verify(path, head=ledger.head)
        assert (held.num_records, held.head) == (len(given_bodies), ledger.head)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_reopening_between_appends_changes_no_byte(reopen: list[bool]) -> None:
    with TemporaryDirectory() as folder:
        once, often = Path(folder, "once"), Path(folder, "often")
        steady, current = Ledger.open(once, clock=noon), Ledger.open(often, clock=noon)
        for i, again in enumerate(reopen):
            current = Ledger.open(often, clock=noon) if again else current
            assert current.append(RecordKind.EVAL, {"i": i}) == steady.append(
                RecordKind.EVAL, {"i": i}
            )
        assert once.read_bytes() == often.read_bytes()


def test_any_flipped_bit_before_the_last_line_is_detected() -> None:
    before_last = len(SAMPLE) - len(LINES[-1]) - 1
    for position in range(before_last):
        for bit in (0, 3, 5):
            raw = bytearray(SAMPLE)
            raw[position] ^= 1 << bit
            with pytest.raises(LedgerBroken, match="line "):
                verify_bytes(bytes(raw))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255))
def test_any_changed_byte_is_detected_against_a_known_head(position: int, change: int) -> None:
    raw = bytearray(SAMPLE)
    raw[position] ^= change
    with pytest.raises(LedgerBroken):
        verify_bytes(bytes(raw), head=HEAD)


def test_an_edit_of_the_last_line_shows_only_against_a_known_head() -> None:
    edited = SAMPLE.replace(b'"step":4', b'"step":9')
    assert verify_bytes(edited).num_records == 5
    with pytest.raises(LedgerBroken, match=HEAD):
        verify_bytes(edited, head=HEAD)
    assert verify_bytes(SAMPLE, head=HEAD).head == HEAD


@pytest.mark.parametrize("gone", range(4))
def test_a_deleted_line_is_detected(gone: int) -> None:
    with pytest.raises(LedgerBroken, match=f"line {gone + 1} "):
        verify_bytes(b"\n".join(LINES[:gone] + LINES[gone + 1 :]) + b"\n")


@pytest.mark.parametrize("num_gone", [1, 2, 5])
def test_deleted_lines_at_the_end_are_detected_against_a_known_head(num_gone: int) -> None:
    kept = b"".join(line + b"\n" for line in LINES[:-num_gone])
    assert verify_bytes(kept).num_records == 5 - num_gone
    with pytest.raises(LedgerBroken, match="none with digest"):
        verify_bytes(kept, head=HEAD)


@given(st.permutations(range(5)))
def test_any_other_order_is_detected(order: list[int]) -> None:
    assume(order != sorted(order))
    with pytest.raises(LedgerBroken):
        verify_bytes(b"".join(LINES[i] + b"\n" for i in order))


@given(st.integers(0, 4), st.sampled_from([*LINES, b"", b"{}", b"[]", b"null", b"\xff"]))
def test_an_inserted_line_is_detected(at: int, line: bytes) -> None:
    with pytest.raises(LedgerBroken, match="line "):
        verify_bytes(b"".join(x + b"\n" for x in [*LINES[:at], line, *LINES[at:]]))


def test_a_renumbered_insertion_breaks_the_chain_by_its_prev() -> None:
    fake = json.loads(LINES[2])
    fake["body"]["loss"] = 0.0
    raw = [*LINES[:2], json.dumps(fake, separators=(",", ":")).encode(), *LINES[3:]]
    with pytest.raises(LedgerBroken) as caught:
        verify_bytes(b"".join(x + b"\n" for x in raw))
    message = str(caught.value)
    assert f"line 4: prev is {hashlib.sha256(LINES[2]).hexdigest()}" in message
    assert f"{hashlib.sha256(raw[2]).hexdigest()}, the digest of line 3" in message
    assert "line 3 was changed" in message
    assert "put back a copy" in message


def edit_of(field: str, value: object) -> bytes:
    fields = json.loads(LINES[-1])
    fields[field] = value
    return b"".join(x + b"\n" for x in [*LINES[:-1], json.dumps(fields).encode()])


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 6), ("n", 5.0), ("n", True), ("t", 3), ("body", []), ("kind", "gift"), ("kind", []),
     ("prev", None), ("prev", GENESIS), ("more", 1)],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named_with_its_line(field: str, value: object) -> None:
    with pytest.raises(LedgerBroken, match="line 5"):
        verify_bytes(edit_of(field, value))


def test_an_unknown_kind_asks_for_another_version() -> None:
    with pytest.raises(LedgerBroken, match="did you mean 'gate'") as caught:
        verify_bytes(edit_of("kind", "gates"))
    assert "version of posttrain" in str(caught.value)


def test_a_head_from_earlier_still_holds_after_more_records(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path / "l", 3)
    early = ledger.head
    ledger.append(RecordKind.SIGN, {"head": early})
    assert verify(tmp_path / "l", head=early).head == ledger.head != early
    assert verify(tmp_path / "l", head=GENESIS).num_records == 4


def test_counts_by_kind(tmp_path: Path) -> None:
    ledger_of(tmp_path / "l", 4)
    assert verify(tmp_path / "l").kinds == {RecordKind.RUN: 1, RecordKind.UPDATE: 3}
    Ledger.open(tmp_path / "empty")
    empty = verify(tmp_path / "empty")
    assert (empty.num_records, empty.head, dict(empty.kinds)) == (0, GENESIS, {})


@pytest.mark.parametrize("cut", range(1, len(LINES[-1]) + 1))
def test_a_torn_last_line_is_set_aside_wherever_it_tore(cut: int) -> None:
    whole = b"".join(line + b"\n" for line in LINES[:-1])
    with TemporaryDirectory() as folder:
        path = Path(folder, "ledger.jsonl")
        path.write_bytes(whole + LINES[-1][:cut])
        assert verify(path).torn_bytes == cut
        assert len(read(path)) == 4
        assert path.read_bytes() == whole + LINES[-1][:cut]  # reading repairs nothing
        ledger = Ledger.open(path, clock=noon)
        assert path.read_bytes() == whole
        assert Path(folder, "ledger.jsonl.torn-1").read_bytes() == LINES[-1][:cut]
        ledger.append(RecordKind.UPDATE, {"step": 4, "loss": 4 / 3, "name": "é"})
        assert path.read_bytes() == SAMPLE


def test_every_torn_line_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "l"
    for torn in (b"one", b"two", b"\0\0\0"):
        with path.open("ab") as file:
            file.write(torn)
        Ledger.open(path)
    kept = [(tmp_path / f"l.torn-{k}").read_bytes() for k in (1, 2, 3)]
    assert kept == [b"one", b"two", b"\0\0\0"]


def test_damage_before_a_torn_line_is_refused_and_nothing_is_moved(tmp_path: Path) -> None:
    raw = SAMPLE.replace(b'"step":1', b'"step":7')[:-3]
    path = tmp_path / "l"
    path.write_bytes(raw)
    with pytest.raises(LedgerBroken, match="line 3"):
        Ledger.open(path)
    assert path.read_bytes() == raw
    assert os.listdir(tmp_path) == ["l"]


def test_two_writers_are_noticed(tmp_path: Path) -> None:
    mine = ledger_of(tmp_path / "l", 1)
    other = Ledger.open(tmp_path / "l")
    other.append(RecordKind.SAY, {})
    with pytest.raises(LedgerBroken, match="one writer"):
        mine.append(RecordKind.SAY, {})
    assert verify(tmp_path / "l").head == other.head


def fail_half_way(number: int) -> Callable[[int, bytes], None]:
    def half(fd: int, content: bytes) -> None:
        os.write(fd, content[:10])
        raise OSError(number, os.strerror(number))

    return half


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, DiskFull), (errno.EIO, RunError)])
def test_a_failed_append_leaves_the_ledger_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    path = tmp_path / "l"
    ledger = ledger_of(path, 2)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_all", fail_half_way(number))
        with pytest.raises(expected):
            ledger.append(RecordKind.SAY, {"text": "lost"})
    assert path.read_bytes() == before
    ledger.append(RecordKind.SAY, {"text": "kept"})
    assert verify(path).num_records == 3


def test_append_is_on_the_disk_when_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_of(tmp_path / "l", 1)
    synced: list[bytes] = []
    sync = os.fsync

    def spy(fd: int) -> None:
        synced.append((tmp_path / "l").read_bytes())
        sync(fd)

    monkeypatch.setattr(module.os, "fsync", spy)
    ledger.append(RecordKind.SAY, {})
    assert synced == [(tmp_path / "l").read_bytes()]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"a": {"b": [0, float("nan")]}}, r"body\.a\.b\[1\] is nan"),
        ({"a": float("inf")}, r"body\.a is inf"),
        ({"a": {1: 2}}, r"body\.a has the key 1"),
        ({"p": Path("/x")}, r"body\.p"),
        ({"s": {1}}, r"body\.s"),
        ({"t": "\ud800"}, r"body\.t"),
        ({"\ud800": 1}, "a key of body"),
    ],
)
def test_what_json_would_bend_is_refused(
    tmp_path: Path, body: dict[str, object], place: str
) -> None:
    ledger = ledger_of(tmp_path / "l", 1)
    with pytest.raises(DataError, match=place):
        ledger.append(RecordKind.SAY, body)
    assert verify(tmp_path / "l").head == ledger.head


def test_a_record_does_not_change_with_the_body_it_was_made_from(tmp_path: Path) -> None:
    inner = [1]
    body: dict[str, object] = {"kind": RecordKind.SAY, "list": inner, "pair": (1, 2)}
    record = Ledger.open(tmp_path / "l").append(RecordKind.SAY, body)
    inner.append(2)
    assert record.body == {"kind": "say", "list": [1], "pair": [1, 2]}
    assert read(tmp_path / "l") == [record]


def test_times_are_now_in_utc(tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    record = Ledger.open(tmp_path / "l").append(RecordKind.SAY, {})
    assert record.time.endswith("Z")
    assert before <= datetime.fromisoformat(record.time) <= datetime.now(UTC)


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage", b"3 abc"])
def test_a_damaged_head_does_not_hide_a_cut(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "l"
    path.write_bytes(SAMPLE)
    module.head_file(path).write_bytes(content)
    for use in (verify, Ledger.open):
        with pytest.raises(LedgerBroken, match="does not name the last record"):
            use(path)
