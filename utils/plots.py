"""Pictures of a run's health, drawn from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from utils.files import replaced_atomically
from utils.metrics import read_metrics


def plot_run(metrics: Path, target: Path, *, title: str) -> None:
    """Draw every metric of a run over its steps, one panel each, as a PNG."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(read_metrics(metrics))
    names = sorted({name for row in rows for name in row} - {"step"})
    columns = min(3, max(1, len(names)))
    lines = -(-max(1, len(names)) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 2.6 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    with replaced_atomically(target) as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
