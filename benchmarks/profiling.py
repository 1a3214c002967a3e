"""Where our steps' time goes, by torch operator and kernel."""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ours import Ours
from scenarios import Scenario, make_prompts
from torch._C._profiler import _ExperimentalConfig
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

ROWS = 24
KERNELS = (
    "linear",
    "experts",
    "gated_mlp",
    "rms_norm",
    "rotate_pairs",
    "rotate_halves",
    "quick_gelu",
    "attention",
    "route",
    "group_rows",
    "combine_rows",
)


@contextmanager
def named_kernels(kernels: Any) -> Iterator[None]:
    """The compiled kernels' calls are no torch operators: names them for the profiler."""

    def named(name: str) -> Any:
        plain = getattr(kernels, name)

        @functools.wraps(plain)
        def call(*arguments: Any, **options: Any) -> Any:
            with record_function(f"kernels::{name}"):
                return plain(*arguments, **options)

        return call

    for name in KERNELS if kernels is not None else ():
        setattr(kernels, name, named(name))
    try:
        yield
    finally:
        for name in KERNELS if kernels is not None else ():
            delattr(kernels, name)


def print_profile(ours: Ours, name: str, scenario: Scenario, tokens: int) -> None:
    """A table of self time per operator, summed over one run: all its steps, the prompts' included."""
    count = tokens + 1 if scenario.decode else 1
    ours.run(scenario, make_prompts(scenario, ours.config, seed=2), count)
    plain = [ours.run(scenario, make_prompts(scenario, ours.config, seed=s), count).tokens_per_s for s in (3, 4, 5)]
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    activities = [ProfilerActivity.CPU]
    with (
        named_kernels(ours.model.kernels),
        profile(activities=activities, experimental_config=every_thread, acc_events=True) as found,
    ):
        outcome = ours.run(scenario, make_prompts(scenario, ours.config, seed=6), count)
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in found.key_averages():
        times[event.key][0] += event.self_cpu_time_total
        times[event.key][1] += event.count
    total = sum(time for time, _ in times.values())
    steps = len(ours.sink.steps)
    print(
        f"\n{name}: {statistics.median(plain):.1f} tokens/s, {outcome.tokens_per_s:.1f} while profiled; {steps} steps"
    )
    print(f"{'':34}{'share':>7}{'ms':>10}{'calls':>9}")
    for key, (time, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]:
        print(f"{key[:33]:34}{time / total:7.1%}{time / 1e3:10.2f}{calls:9.0f}")
