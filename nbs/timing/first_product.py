"""What the first product of a process takes, and its parts.

    python first_product.py CASE CONTESTANT [--num-samples NUM_SAMPLES]

Prints seconds as JSON: "checking" the data (tracing and compiling the check), "compiling" all other
programs, and "the rest", which is tracing and one run. The clock starts when packages are imported
and JAX has run: it counts making the product and multiplying once.
"""

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from ggn_nb.tools.testing import random_like
from ggn_nb.tools.timing import timing_case
from jax import random
from peers import MAKERS, import_peer

CHECK = "inspect_samples"  # the function that checks model, parameters and data when an operator is made


def time_parts(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call, by part: JAX reports what it spends on each program."""
    spent = Counter()

    def listen(event: str, seconds: float, fun_name: str = "", **_: Any) -> None:
        if CHECK in fun_name:
            spent["checking"] += seconds
        elif "backend_compile" in event:
            spent["compiling"] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    rest = seconds - sum(spent.values())
    return {"checking": spent["checking"], "compiling": spent["compiling"], "the rest": rest}


def time_first(case: str, contestant: str, num_samples: int | None = None) -> dict[str, float]:
    """Seconds of a contestant's first product, by part."""
    import_peer(contestant)
    model_fn, params, data = timing_case(case, num_samples)
    vec = jax.block_until_ready(random_like(random.key(1), params))

    def first():
        product = MAKERS[contestant](model_fn, params, data)
        return product.multiply(product.convert(vec))

    return time_parts(first)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("contestant", choices=MAKERS)
    parser.add_argument("--num-samples", type=int)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    parts = time_first(arguments.case, arguments.contestant, arguments.num_samples)
    print(json.dumps(parts))
