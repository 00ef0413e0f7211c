"""A metric with raw data of its own: registered in one file, known everywhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from measurements import measured as made_up
from measurements import policy

from posttrain.cli.tables import measurement_table, readings_table
from posttrain.core.errors import ConfigError, DataError
from posttrain.core.events import ignore
from posttrain.measure import columns, recording, registry
from posttrain.measure.bootstrap import Floats
from posttrain.measure.estimators import per_prompt
from posttrain.measure.gates import Gate, check_gate, decide
from posttrain.measure.measure import measure_policy
from posttrain.measure.measurement import Measurement, TaskMeasurement
from posttrain.measure.readings import not_taken, take
from posttrain.measure.recording import TaskSamples, raw_column
from posttrain.measure.registry import Better, Metric, Topic, metrics
from posttrain.measure.spec import Measure
from posttrain.testing import FakePolicy, FakeTaskSet

SPEC = Measure(samples=8, max_new_tokens=4)


def register_vowels() -> None:
    """What the file of a new metric holds."""

    @raw_column("vowels", dtype=np.float32, per="sample", absent="vowels were not counted")
    def vowels_column(samples: TaskSamples) -> np.ndarray:
        shares = [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in samples.texts]
        return np.array(shares).reshape(-1, samples.num_samples)

    @per_prompt(
        "vowels",
        topic=Topic.FORM,
        meaning="vowels among the letters of a sample",
        unit="share",
        better=Better.NEITHER,
        source="count",
        columns=(vowels_column,),
        sentence=lambda value, k, task: f"{value:.0%} of letters are vowels",
        overview=("vowels", "vowels"),
    )
    def vowels(task: TaskMeasurement) -> Floats:
        return np.asarray(task.need(vowels_column).mean(axis=1, dtype=np.float64))


@pytest.fixture(autouse=True)
def own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered for one test only."""
    metrics()  # the shipped ones, all imported
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    monkeypatch.setattr(columns, "_COLUMNS", dict(columns._COLUMNS))
    monkeypatch.setattr(recording, "_RECORDS", dict(recording._RECORDS))
    register_vowels()
    return


def measured(share: float) -> Measurement:
    """One-letter answers, of which this share is the vowel a."""
    answers = {"a": share, "b": 1 - share}
    tasksets = [FakeTaskSet(size=30)]
    fake = FakePolicy(answers)
    return measure_policy("fake", fake, tasksets, spec=SPEC, protocol="p", observe=ignore)


def test_it_is_recorded_taken_shown_and_survives_the_file() -> None:
    result = measured(0.5)
    (task,) = result.tasks
    again = Measurement.from_json(result.to_json())
    assert np.array_equal(again.tasks[0].raw["vowels"], task.raw["vowels"])
    for side in (result, again):
        (reading,) = [r for r in take(side.tasks[0]) if r.name == "vowels"]
        assert reading.value == pytest.approx(np.mean(task.raw["vowels"]))
        assert 0.3 < reading.low < reading.value < reading.high < 0.7
        line = next(s for s in readings_table(side, SPEC).splitlines() if "vowels" in s)
        assert line.split()[0] == "vowels"
        assert reading.words in line
        assert "vowels" in measurement_table(side, SPEC)


@pytest.mark.parametrize(("share", "passed"), [(0.9, True), (0.1, False)])
def test_a_gate_may_ask_for_it_and_for_its_change(share: float, passed: bool) -> None:
    before, now = (measured(s).tasks[0] for s in (0.5, share))
    for bound in ({"at_least": 0.5}, {"at_least_gained": 0.1}):
        gate = Gate(task="letters", metric="vowels", **bound)
        check_gate(gate, SPEC)
        assert decide(gate, now=now, since=before, confidence=0.95).passed == passed


def test_a_measurement_without_it_says_so() -> None:
    old = made_up(np.zeros((6, 8)))
    assert "vowels were not counted: no vowels" in not_taken(old)
    gate = Gate(task="sums", metric="vowels", at_least=0.5)
    with pytest.raises(ConfigError, match="vowels were not counted"):
        decide(gate, now=old, since=old, confidence=0.95)


@pytest.mark.parametrize(
    "stored", [[[0.5]], {"dtype": "<i4", "shape": [30, 8], "zlib64": ""}, ["1"]]
)
def test_damaged_raw_data_are_refused(stored: object) -> None:
    document = json.loads(measured(0.5).to_json())
    document["tasks"][0]["vowels"] = stored
    with pytest.raises(DataError):
        Measurement.from_json(json.dumps(document))


def test_a_file_with_data_that_nobody_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = measured(0.5).to_json()
    monkeypatch.delitem(columns._COLUMNS, "vowels")
    with pytest.raises(DataError, match="vowels"):
        Measurement.from_json(text)
    with pytest.raises(DataError, match="no raw column 'vowls'"):
        TaskMeasurement(
            taskset="t", prompts=("t/0",), scores=np.zeros((1, 2)), success=1.0,
            lengths=np.ones((1, 2)), truncated=np.zeros((1, 2)), nll=np.ones((1, 2)),
            distinct=np.ones(1), raw={"vowls": np.zeros((1, 2))},
        )  # fmt: skip


def test_a_name_is_registered_once_and_says_what_it_means() -> None:
    with pytest.raises(ConfigError, match="'vowels' is registered twice"):
        register_vowels()
    about = {"topic": Topic.FORM, "unit": "u", "better": Better.NEITHER, "source": "s"}
    for name in ("Upper", "rate@x", "a b", ""):
        with pytest.raises(ConfigError, match="small letters"):
            Metric(name=name, meaning="m", **about)
    with pytest.raises(ConfigError, match="without meaning"):
        Metric(name="silent", meaning="", **about)


def test_the_shipped_columns_are_all_recorded() -> None:
    """Of a fake policy with a base, each column has values; none is recorded for nothing."""
    base = FakePolicy({"a": 0.3, "b": 0.7})
    (task,) = measure_policy(
        "fake", FakePolicy({"a": 0.5, "b": 0.5}), [FakeTaskSet()], spec=SPEC, protocol="p",
        observe=ignore, base=base,
    ).tasks  # fmt: skip
    assert task.raw.keys() == columns.raw_columns().keys()
    used = {c.name for m in metrics() for c in m.columns}
    assert used == columns.raw_columns().keys()
    assert policy(task).tasks[0] is task
