"""A suite of many programs, each of which runs once, in less time: for the tests, and for the kernels of notebooks.

Before JAX lowers a program, it makes a context of MLIR, which takes 6 ms: longer than to lower a small program. Here many
programs share one, unless XLA_FLAGS is empty, as in `make test XLA_FLAGS=`, where all is as users have it. The function that
makes contexts is no public one: where JAX has another name for it, each program has its own again.
"""

import gc
import os
import sys
from functools import lru_cache
from itertools import count
from pathlib import Path

PROGRAMS = 100  # share a context, which keeps their constants
# To be run when a kernel starts. JAX is not imported yet, since a notebook may choose its devices first.
IN_KERNELS = f"get_ipython().events.register('post_run_cell', __import__('runpy').run_path({str(Path(__file__))!r})['share_contexts'])"

gc.set_threshold(50_000, 20, 50)  # a run holds millions of objects: looking for circles is 5% of its time


def share_contexts(*_) -> None:
    """Once JAX is imported, let its programs share contexts."""
    mlir = sys.modules.get("jax._src.interpreters.mlir")
    make = getattr(mlir, "make_ir_context", None)
    if make is None or hasattr(make, "shared") or not os.environ.get("XLA_FLAGS"):
        return
    number, shared = count(), lru_cache(1)(lambda _: make())
    mlir.make_ir_context = lambda: shared(next(number) // PROGRAMS)
    mlir.make_ir_context.shared = True
