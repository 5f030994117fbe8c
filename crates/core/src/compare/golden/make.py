"""Writes stats.json: intervals and quantiles as NumPy and SciPy have them.

    pip install numpy scipy && python make.py
"""

import json
import pathlib

import numpy as np
from scipy import stats

P = 0.975


def adjusted(tasks, more, total, squares, least, most):
    tasks = np.asarray(tasks, dtype=np.float64)
    n = len(tasks) + more
    # The tasks that nobody has seen, one by one.
    middle = (tasks.sum() + total) / n
    variance = (np.square(tasks).sum() + squares) / n - middle**2
    half = stats.t.ppf(P, len(tasks) - 1) * np.sqrt(variance / n)
    ends = np.clip([middle - half, middle + half], least, most)
    return [tasks.mean(), *ends]


def student(tasks):
    low, high = stats.t.interval(0.95, len(tasks) - 1, loc=np.mean(tasks), scale=stats.sem(tasks))
    return [np.mean(tasks), low, high]


draw = np.random.default_rng(7)
cases = []
for n, k in [(2, 1), (5, 1), (5, 4), (30, 1), (60, 3), (400, 8)]:
    shares = draw.integers(0, k + 1, n) / k
    others = draw.integers(0, k + 1, n) / k
    numbers = draw.normal(7, 3, n)
    cases.append({"of": "share", "tasks": list(shares), "expected": adjusted(shares, 4, 2, 2, 0, 1)})
    differences = shares - others
    cases.append(
        {"of": "difference", "tasks": list(differences), "expected": adjusted(differences, 2, 0, 1, -1, 1)}
    )
    cases.append({"of": "mean", "tasks": list(numbers), "expected": student(numbers)})

quantiles = [
    [p, freedom, float(stats.t.ppf(p, freedom))]
    for p in (0.9, 0.975, 0.995)
    for freedom in (1, 2, 3, 7, 19, 59, 399, 10000)
]
out = {"quantiles": quantiles, "cases": cases}
text = json.dumps(out, default=float)
pathlib.Path(__file__).with_name("stats.json").write_text(text + "\n")
