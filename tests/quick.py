"""A suite of many programs, each of which runs once, in less time: for the tests, and for the kernels of notebooks.

A context of MLIR takes a third of the time in which JAX lowers a small program. JAX makes one for each; here many programs
share one. It is no public function of JAX that makes them: where it has another name, all goes on as without.
"""

import gc
import sys
from functools import lru_cache
from itertools import count
from pathlib import Path

PROGRAMS = 100  # share a context, which keeps their constants
# To be run when a kernel starts. JAX is not imported yet, since a notebook may choose its devices first.
IN_KERNELS = f"get_ipython().events.register('post_run_cell', __import__('runpy').run_path({str(Path(__file__))!r})['share_contexts'])"

gc.set_threshold(50_000, 20, 50)  # a run holds millions of objects: looking for circles is 5% of its time


def share_contexts(*_) -> None:
    """Where JAX is imported, let its programs share contexts."""
    mlir = sys.modules.get("jax._src.interpreters.mlir")
    make = getattr(mlir, "make_ir_context", None)
    if make is None or hasattr(make, "shared"):
        return
    number, shared = count(), lru_cache(1)(lambda _: make())
    mlir.make_ir_context = lambda: shared(next(number) // PROGRAMS)
    mlir.make_ir_context.shared = True
