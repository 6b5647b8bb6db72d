"""Draws the loss curves of docs/benchmarks.md from the measurements that are kept beside it.

    python tests/perf/plot_losses.py                        docs/measurements/*.json -> docs/loss_*.svg
    python tests/perf/plot_losses.py --keep RAW --as NAME   a result of train_vs_stock.py -> docs/measurements/NAME.json

Same measurements, same bytes: nothing of the day or the machine gets into a drawing. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).parents[2] / "docs"
MEASUREMENTS = DOCS / "measurements"

#: Steps of the trailing mean.
WINDOW = 20
COLOURS = {"ours:0": "#1f6fb2", "stock:0": "#c9552b", "stock:1": "#d9a441"}


def keep(raw: Path, name: str) -> None:
    """Stores what is plotted and reported, rounded: losses to five digits, seconds to milliseconds."""
    measured = json.loads(raw.read_text())
    for key, run in measured.items():
        if isinstance(run, dict):
            measured[key] = run | {
                "losses": [float(f"{loss:.5g}") for loss in run["losses"]],
                "seconds": [round(seconds, 3) for seconds in run["seconds"]],
            }
    (MEASUREMENTS / f"{name}.json").write_text(json.dumps(measured) + "\n")


def smoothed(losses: list[float]) -> np.ndarray:
    """Trailing mean, over fewer steps at the start."""
    sums = np.cumsum([0.0, *losses])
    steps = np.arange(1, len(losses) + 1)
    first = np.maximum(0, steps - WINDOW)
    return (sums[steps] - sums[first]) / (steps - first)


def draw(measured: dict[str, Any], path: Path) -> None:
    """Loss of every run; with ours and stock side by side, their difference as well."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams |= {"svg.hashsalt": "mamba", "svg.fonttype": "none", "path.simplify_threshold": 1.0}
    runs = {key: run["losses"] for key, run in measured.items() if isinstance(run, dict)}
    long = max(map(len, runs.values())) > 2 * WINDOW
    compared = {"ours:0", "stock:0"} <= runs.keys()
    figure = Figure(figsize=(10 if compared else 6, 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 2 if compared else 1))
    for key, losses in runs.items():
        steps, name = range(1, len(losses) + 1), key.replace(":", ", seed ")
        axes[0].plot(
            steps, losses, color=COLOURS[key], alpha=0.3 if long else 1, linewidth=0.7, label=None if long else name
        )
        if long:
            axes[0].plot(steps, smoothed(losses), color=COLOURS[key], label=f"{name} (mean of {WINDOW} steps)")
    axes[0].set(xlabel="optimizer step", ylabel="training loss, nats per token", yscale="log", title=measured["preset"])
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].legend(frameon=False)
    if compared:
        difference = list(np.subtract(runs["ours:0"], runs["stock:0"]))
        axes[1].axhline(0, color="black", linewidth=0.5)
        axes[1].plot(
            range(1, len(difference) + 1), difference, color="gray", alpha=0.5, linewidth=0.7, label="each step"
        )
        axes[1].plot(
            range(1, len(difference) + 1), smoothed(difference), color="black", label=f"mean of {WINDOW} steps"
        )
        axes[1].set(xlabel="optimizer step", ylabel="ours - stock", title="difference")
        axes[1].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="result of train_vs_stock.py")
    parser.add_argument("--as", dest="name", help="name of the measurement it becomes")
    options = parser.parse_args()
    if options.keep:
        keep(options.keep, options.name)
    for path in sorted(MEASUREMENTS.glob("losses_*.json")):
        draw(json.loads(path.read_text()), DOCS / f"loss_{path.stem.removeprefix('losses_')}.svg")


if __name__ == "__main__":
    main()
