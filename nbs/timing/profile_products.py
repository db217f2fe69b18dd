"""Where the time of a gradient and of a product goes, on one core of a CPU.

    python profile_products.py CASE [--num-samples NUM_SAMPLES]

Prints, as JSON, for the gradient and for a product by policy: milliseconds by kind of instruction,
and the floating-point operations that the compiler counts. On one core, the times of instructions
add up; the restriction to it needs Linux.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ggn_nb import create_ggn_mv
from ggn_nb.tools.timing import timing_case, timing_gradient

KINDS = {" convolution(": "convolutions", " dot(": "matrix products"}
REST = "the rest"


def kind_of(text: str) -> str:
    """The kind of an instruction, by what it contains."""
    for mark, kind in KINDS.items():
        if mark in text:
            return kind
    return REST


def kinds_of(program: str) -> dict[str, str]:
    """The kind of each instruction of a compiled program, by its name.

    A fused instruction contains those that it calls. Loops and calls are left out: the instructions
    inside of them are there themselves.
    """
    blocks = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", program, re.M | re.S)
    bodies, kinds = dict(blocks), {}
    for line in (line for body in bodies.values() for line in body.splitlines()):
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
        if name and not re.search(r" (while|call|conditional)\(", line):
            called = re.findall(r"calls=%?([\w.\-]+)", line)
            kinds[name[1]] = kind_of(" ".join([line, *(bodies.get(c, "") for c in called)]))
    return kinds


def trace(run: Callable[[], None]) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of every event that JAX's profiler sees during a call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        for line in (line for plane in planes for line in plane.lines):
            for event in line.events:
                yield event.name, event.duration_ns / 1e6


def profile(fn: Callable, *args: Any, runs: int = 5) -> dict:
    """Milliseconds of one run by kind of instruction, and floating-point operations."""
    program = jax.jit(fn).lower(*args).compile()

    def repeat(times: int) -> None:
        for _ in range(times):
            jax.block_until_ready(program(*args))

    repeat(1)
    kinds = kinds_of(program.as_text())
    milliseconds = dict.fromkeys([*KINDS.values(), REST], 0.0)
    for name, duration in trace(partial(repeat, runs)):
        if name in kinds:
            milliseconds[kinds[name]] += duration / runs
    return {"milliseconds": milliseconds, "flops": program.cost_analysis()["flops"]}


def profile_case(name: str, num_samples: int | None = None) -> dict[str, dict]:
    """The profile of the gradient, and of a product by policy."""
    model_fn, params, data = timing_case(name, num_samples)
    make = partial(create_ggn_mv, model_fn, params, data, "cross_entropy")
    quarter = len(data["target"]) // 4
    operators = {
        "cached": make(),
        "cached, batch_size": make(linearize="cached", batch_size=quarter),
        "recomputed": make(linearize="recomputed"),
    }
    found = {"gradient": profile(partial(timing_gradient, model_fn), params, data)}
    for policy, G in operators.items():
        found[policy] = profile(lambda G, v: G(v), G, params)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--num-samples", type=int)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(json.dumps(profile_case(arguments.case, arguments.num_samples)))
