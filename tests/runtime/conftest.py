"""The reference: every case on stock SGLang, once for all tests."""

import pytest
from run_cases import run_cases


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    return run_cases("stock", tmp_path_factory.mktemp("stock"), max_total_tokens=16384)
