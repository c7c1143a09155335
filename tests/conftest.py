import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only get in each other's way
os.environ["HF_HUB_OFFLINE"] = "1"
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import pytest  # noqa: E402
import torch  # noqa: E402

from forked import Forked  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often test_survival.py kills each script")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: what only .ci/run waits for")
    config.option.markexpr = config.option.markexpr or "not long"


@pytest.fixture(scope="session")
def forked():
    """Runs a script's main in processes of its own, see forked.py."""
    server = Forked()
    yield server
    server.close()


@pytest.fixture
def refuses(capsys):
    """Calls a script's main with bad input: it must exit with 2 and one line that holds every given word."""
    def call(main, argv, *words):
        with pytest.raises(SystemExit) as exit_info:
            main([str(a) for a in argv])
        error = capsys.readouterr().err.strip()
        assert exit_info.value.code == 2, error
        line = error.splitlines()[-1]
        assert "Traceback" not in error and "error:" in line
        for word in words:
            assert str(word) in line, f"{word!r} is not in {line!r}"
        return line
    return call
