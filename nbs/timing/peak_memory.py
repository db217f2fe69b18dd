"""The most memory that a process ever holds for one product with the multilayer perceptron.

    python peak_memory.py NUM_SAMPLES [--batch-size BATCH_SIZE]

Prints a number of bytes, without those of the data. It reads /proc, so it needs Linux.
"""

import argparse
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from ggn_nb import create_ggn_mv
from ggn_nb.tools.timing import timing_case


def read_peak() -> int:
    """The most bytes that this process ever held. (resource.getrusage may report a parent's.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def measure_peak(num_samples: int, batch_size: int | None) -> int:
    """Bytes at the peak, after one product that recomputes its linearisation."""
    model_fn, params, _ = timing_case("MLP", 1)
    data = {"input": jnp.zeros((num_samples, 784)), "target": jnp.zeros(num_samples, int)}
    options = {"linearize": "recomputed", "batch_size": batch_size}
    G = create_ggn_mv(model_fn, params, data, "cross_entropy", **options)
    jax.block_until_ready(G(params))
    return read_peak() - data["input"].nbytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_samples", type=int)
    parser.add_argument("--batch-size", type=int)
    arguments = parser.parse_args()
    print(measure_peak(arguments.num_samples, arguments.batch_size))
