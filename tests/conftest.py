"""Settings for the whole suite: strict numerics, and notebook cells to run on request."""

import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    """Add `--flags "slow gpu"`: notebook cells with these flags run too."""
    parser.addoption("--flags", default="", help="also run notebook cells with these flags (slow, gpu)")
