"""What `python examples/household.py` leaves, at a size that takes seconds and learns nothing. One for all tests:
conftest.py imports it."""
import pytest

from examples import household as example

TINY = {"base": 2, "sender": 2, "train": 8, "test": 4, "actor": 1, "student": 1}


@pytest.fixture(scope="session")
def household(tmp_path_factory):
    """The folder with its household_out."""
    folder = tmp_path_factory.mktemp("household")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(example.SIZES, True, TINY)
        example.main(["--fast"])
    return folder
