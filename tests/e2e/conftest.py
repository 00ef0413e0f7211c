import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from world import make_world

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A world that nobody changes."""
    return make_world(tmp_path_factory.mktemp("shared") / "world")


@pytest.fixture
def world(tmp_path):
    """A world of one's own."""
    return make_world(tmp_path / "world")


@pytest.fixture
def posttrain(monkeypatch, capsys):
    """The command line, in this process: (arguments) -> exit code, stdout, stderr."""
    import sys

    from posttrain.cli import main as cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["posttrain", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        streams = capsys.readouterr()
        assert "Traceback" not in streams.out + streams.err
        return code, streams.out, streams.err

    return call
