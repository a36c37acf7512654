"""The loss curves as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FORMATS = (".pdf", ".png", ".svg")


def save_loss_curves(losses: dict[str, list[float]], epochs: int, path: Path) -> None:
    """Draw the training loss of every step and its mean over each epoch, one colour for each training."""
    from matplotlib.figure import Figure  # noqa: PLC0415  an extra, and only this function needs it

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, steps) in zip(("tab:blue", "tab:orange"), losses.items(), strict=True):
        means = np.reshape(steps, (epochs, -1)).mean(axis=1)
        axes.plot(np.linspace(0, epochs, len(steps)), steps, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(np.arange(epochs) + 0.5, means, color=colour, marker="o", markersize=4, zorder=3, label=name)
    axes.set_yscale("log")
    axes.set(xlabel="epoch", xlim=(0, epochs), ylabel="cross-entropy")
    axes.set_title("Training loss on the UCI digits: each step, and the mean of each epoch")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
