"""Settings for the whole suite: strict numerics, and notebook cells to run on request."""

import fcntl
import gc
import os
import sys
from importlib.metadata import version
from itertools import chain, combinations, groupby
from pathlib import Path

# Most programs of the suite run once, and half of its time is their compilation: it is kept short, in notebooks and other
# processes too, unless XLA_FLAGS is set, as `make test XLA_FLAGS=` does for programs as users have them.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12): QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
# What one worker or notebook has compiled, the others read from here, and so does the next run.
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # no program says where its operations were written

# A worker has processors of its own, with its notebooks: the threads of two would wait for each other, for 3 times as long.
if worker := os.environ.get("PYTEST_XDIST_WORKER") if hasattr(os, "sched_setaffinity") else None:
    own = sorted(os.sched_getaffinity(0))[int(worker[2:]) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, own or os.sched_getaffinity(0))

import jax
import pytest

sys.path.insert(0, str(ROOT / ".ci"))
gc.set_threshold(50_000, 20, 50)  # a run holds millions of objects: looking for circles is 5% of its time

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    """Add `--flags "slow gpu"`: notebook cells with these flags run too, and with slow all combinations."""
    parser.addoption("--flags", default="", help="also run notebook cells with these flags (slow, gpu); with slow all tests")


def pytest_configure(config):
    """Say what the mark of the suite means, and to other modules whether all cases run."""
    config.addinivalue_line("markers", "combinations(*names): run a cover of these parameters, all with --flags slow")
    os.environ["GGN_NB_ALL_CASES"] = str("slow" in config.getoption("flags"))


def cover(cases):
    """Of cases with a tuple of values each, some that have all pairs of values: of two parameters or one, all values."""
    strength = 2 if any(len(case) > 2 for case in cases) else 1
    parts = {case: set(combinations(enumerate(case), min(strength, len(case)))) for case in cases}
    missing, chosen = set(chain(*parts.values())), set()
    while missing:
        best = max(parts, key=lambda case: len(missing & parts[case]))
        missing -= parts[best]
        chosen.add(best)
    return chosen


def pytest_collection_modifyitems(config, items):
    """Of each test that is marked for it, leave out what is not in a cover of its cases."""
    if "slow" in config.getoption("flags"): return
    for _, cases in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cases = [(case, mark) for case in cases if (mark := case.get_closest_marker("combinations"))]
        values = lambda case, mark: tuple(id(case.callspec.params[name]) for name in mark.args or case.callspec.params)
        each = {values(*found): found[0] for found in reversed(cases)}
        kept = [each[chosen] for chosen in cover(each)]
        for case, _ in cases:
            if case not in kept: case.add_marker(pytest.mark.skip(reason="one of the combinations that run with --flags slow"))


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """A function that fills a folder once, whichever of the parallel workers comes first."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent

    def make(name, fill):
        folder = shared / name
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                folder.mkdir()
                fill(folder)
        return folder

    return make
