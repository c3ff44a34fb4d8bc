"""Every test gets its own state folder; torch is kept to two threads; examples are drawn the same way in every run."""

import os
import shutil

import pytest
import torch
from hypothesis import settings

# `make test-all` looks at new examples
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("BROADSHEET_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def jdk() -> bool:
    """Whether Java can be compiled and run here."""
    return bool(shutil.which("java") and shutil.which("javac"))
