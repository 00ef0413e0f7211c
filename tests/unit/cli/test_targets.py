"""Where commands may write: a folder or file of their own, known before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from posttrain.cli.targets import OUT_FILE, OUT_FOLDER, out_file, out_folder
from posttrain.core.config import convert
from posttrain.core.errors import ConfigError, PosttrainError, RunError
from posttrain.core.files import write_atomic
from posttrain.recipe import Recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("file")
    return tmp_path


@pytest.mark.parametrize(
    "path",
    ["", ".", " ", "file", "file/below", "pipe", "broken", "/dev/null", "model", "model/a/b"],
)
def test_folders_that_are_refused(here, path):
    before = sorted(os.listdir(here))
    with pytest.raises(ConfigError):
        OUT_FOLDER.convert(path, None, None)
    assert sorted(os.listdir(here)) == before


@pytest.mark.parametrize("path", ["", ".", "model", "/dev/null", "pipe", "file/below"])
def test_files_that_are_refused(here, path):
    with pytest.raises(PosttrainError):
        OUT_FILE.convert(path, None, None)


def test_paths_are_absolute_from_the_start(here, monkeypatch):
    folder, file = out_folder(Path("a/../b/c")), out_file(Path("d/e.json"))
    monkeypatch.chdir("/")
    assert folder == here / "b" / "c"
    assert file == here / "d" / "e.json"
    assert not (here / "b").exists()


def test_a_link_to_a_file_stays_a_link(here):
    assert out_file(Path("link")) == here / "file"
    write_atomic(here / "link", "new")
    assert (here / "link").is_symlink()
    assert (here / "file").read_text() == "new"


@pytest.mark.parametrize("name", ["pipe", "model"])
def test_what_is_no_file_is_never_replaced(here, name):
    facts = os.lstat(here / name)
    with pytest.raises(RunError, match="is not a file"):
        write_atomic(here / name, "x")
    assert os.lstat(here / name).st_ino == facts.st_ino


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/abs",
        "a\\b",
        "a\x00",
        "a\nb",
        ".hidden",
        "-x",
        " a",
        "a ",
        "x" * 101,
        "~",
    ],
)
def test_names_of_recipes_that_would_leave_the_folder(name):
    with pytest.raises(ConfigError):
        convert({"name": name, "model": "m"}, Recipe, origin="r.yaml")


@pytest.mark.parametrize("name", ["r", "first", "tour", "a b", "v1.2+x-y_z", "über", "x" * 100])
def test_names_of_recipes_that_are_folders(name):
    assert Recipe(name=name, model="m").name == name
