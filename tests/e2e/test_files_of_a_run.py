"""Whatever a run writes lies in its folder, where the folder says."""

from world import grpo, listing, ppo, recipe, sft, unnamed, write_recipe

CONTENT = recipe(
    sft(gates=[{"task": "say", "at_least": 0.0, "otherwise": "warn"}]),
    grpo(lora={"rank": 2}),
    ppo(budget={"steps": 2}),
)


def test_every_file_of_a_finished_run_has_its_name(world, posttrain, monkeypatch):
    monkeypatch.chdir(world)
    path, out = write_recipe(world, CONTENT), world / "out"
    before = listing(world)
    code, _, errors = posttrain("run", path, "--out", "out")
    assert code == 0, errors
    assert posttrain("report", "out")[0] == 0
    assert posttrain("compare", "out")[0] == 0
    assert unnamed(out) == set()
    elsewhere = {k: v for k, v in listing(world).items() if not k.startswith("out/")}
    assert elsewhere == before

    for stray in ("measurements/notes.txt", "stages/grpo-1/x", "model/config.json", "a.json"):
        (out / stray).parent.mkdir(exist_ok=True)
        (out / stray).write_text("{}")
        assert unnamed(out) == {stray}, "the check sees what is unknown"
        (out / stray).unlink()
