"""Settings and fixtures for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Deterministic, so that a red run can be repeated; no deadline, because CI machines are shared.
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real adapters and models, where the machine has them (LORA_MERGE_SHARED or ../shared)."""
    root = Path(__file__).resolve().parents[1]
    place = Path(os.environ.get("LORA_MERGE_SHARED", root.parent / "shared"))
    if not (place / "adapters").is_dir():
        pytest.skip("no real adapters on this machine (set LORA_MERGE_SHARED)")
    return place
