"""Counts and times, in the text format of Prometheus."""

import threading
from collections import defaultdict

#: Upper bounds of the buckets of times, in seconds.
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
HELP = {
    "requests": "Requests by outcome",
    "prompt_tokens": "Tokens of prompts",
    "cached_tokens": "Tokens of prompts that kept caches provided",
    "generated_tokens": "Tokens of answers",
    "prefix_lookups": "Prompts by whether a kept cache had their beginning",
    "failed_readings": "Answers that could not be read for the next turn",
    "time_to_first_token_seconds": "Time from a request to the first token of its answer",
    "request_seconds": "Time from a request to the end of its answers",
}


class Metrics:
    """Counters and histograms. All methods are safe for threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: dict[str, dict[tuple, float]] = defaultdict(lambda: defaultdict(float))
        self._times: dict[str, list[float]] = {}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name][tuple(sorted(labels.items()))] += by

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        with self._lock:
            # One number for each bound, then the sum of the times and their number.
            held = self._times.setdefault(name, [0.0] * (len(BUCKETS) + 2))
            for i, bound in enumerate(BUCKETS):
                held[i] += seconds <= bound
            held[-2] += seconds
            held[-1] += 1

    def total(self, name: str, **labels: str) -> float:
        """The value of a counter, over all labels that are not given."""
        with self._lock:
            wanted = set(labels.items())
            return sum(x for key, x in self._counts[name].items() if wanted <= set(key))

    def text(self, gauges: dict[str, tuple[str, float]]) -> str:
        """All values. Gauges are given by name, with their help and value."""
        lines = []
        with self._lock:
            for name, values in self._counts.items():
                lines += _head(f"{name}_total", HELP.get(name, name), "counter")
                lines += [f"fade_{name}_total{_labels(key)} {x:.10g}" for key, x in values.items()]
            for name, held in self._times.items():
                lines += _head(name, HELP.get(name, name), "histogram")
                bounds = [*map(str, BUCKETS), "+Inf"]
                for bound, x in zip(bounds, [*held[: len(BUCKETS)], held[-1]]):
                    lines.append(f'fade_{name}_bucket{{le="{bound}"}} {x:.10g}')
                lines += [f"fade_{name}_sum {held[-2]:.10g}", f"fade_{name}_count {held[-1]:.10g}"]
        for name, (about, x) in gauges.items():
            lines += [*_head(name, about, "gauge"), f"fade_{name} {x:.10g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP fade_{name} {about}", f"# TYPE fade_{name} {kind}"]


def _labels(key: tuple) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in key) + "}" if key else ""
