"""The result as a picture: the model learning, and where it ends beside the compressors, and what each stage made of it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.quickstart.judge import wilson

STAGES = ("pretrained", "fine-\ntuned", "rein-\nforced")
INK, MUTED, LINE, MODEL, PLAIN, REACH = "#1f2933", "#6b7785", "#e3e7eb", "#0f766e", "#b9c4cf", "#c2410c"


@dataclass(frozen=True)
class Curve:
    """Training as it went: seconds of training, bits a byte of the batches, and of the held-out text at some of those times."""

    seconds: Sequence[float]
    bits: Sequence[float]
    heldout_seconds: Sequence[float] = ()
    heldout_bits: Sequence[float] = ()


@dataclass(frozen=True)
class Shares:
    """Accepted samples of `samples` each: pretrained, fine-tuned and, where it was, reinforced."""

    accepted: tuple[int, ...]
    samples: int


def draw(title: str, curve: Curve, model_bits: float, baselines: dict[str, float], shares: Shares | None) -> bytes:
    """A PNG of two or three panels; raises ImportError where matplotlib is not installed.

    baselines   label -> bits a byte, in the order they are drawn; the one called "xz -9" is the line to get below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(wspace=0.06, w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(13, 4.3) if shares else (11, 4.3), dpi=120, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if shares else 2, gridspec_kw={"width_ratios": [1.35, 1.15, 0.7] if shares else [1.35, 1.15]})
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    for panel in panels:
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.spines["bottom"].set_color(MUTED)
        panel.tick_params(colors=MUTED, length=0, labelsize=9.5)
        panel.set_axisbelow(True)
    _draw_curve(panels[0], curve, model_bits, baselines)
    _draw_bars(panels[1], model_bits, baselines)
    if shares:
        _draw_shares(panels[2], shares)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "weft"})
    return buffer.getvalue()


def _heading(panel: Any, text: str) -> None:
    panel.set_title(text, loc="left", fontsize=10.5, color=INK, pad=10)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """A centred running mean [len(values)], over less near the ends."""
    sums = np.concatenate(([0.0], np.cumsum(values.astype(float))))
    places = np.arange(len(values))
    low, high = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / np.maximum(high - low, 1)


def _draw_curve(panel: Any, curve: Curve, model_bits: float, baselines: dict[str, float]) -> None:
    _heading(panel, "Bits a byte while it learns")
    seconds, bits = np.asarray(curve.seconds, float), np.asarray(curve.bits, float)
    top = max([4.0, *baselines.values()])
    panel.plot(seconds, bits, color=MODEL, alpha=0.22, linewidth=0.8)
    panel.plot(seconds, smooth(bits, max(1, len(bits) // 40)), color=MODEL, linewidth=1.8, label="training batches")
    if len(curve.heldout_seconds):
        panel.plot(curve.heldout_seconds, curve.heldout_bits, color=INK, marker="o", markersize=3.5, linewidth=0, label="held out, sample")
    end = float(seconds[-1]) if len(seconds) else 1.0
    panel.plot([end], [model_bits], marker="o", markersize=7, color=INK, clip_on=False, linewidth=0, label="held out, all of it")
    lowest = min([model_bits, *baselines.values(), *bits.tolist()])
    panel.set_xlim(0, end * 1.02)
    panel.set_ylim(max(0.0, lowest - 0.35), top)
    for label, value in baselines.items():
        if label in ("gzip -9", "xz -9"):
            panel.axhline(value, color=REACH if label == "xz -9" else MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            panel.text(end * 1.035, value, label, ha="left", va="center", fontsize=9, color=REACH if label == "xz -9" else MUTED)
    panel.grid(axis="y", color=LINE)
    panel.set_xlabel("seconds of training", fontsize=9.5, color=MUTED)
    panel.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def _draw_bars(panel: Any, model_bits: float, baselines: dict[str, float]) -> None:
    _heading(panel, "Bits a byte of held-out text (fewer is better)")
    rows = [*baselines.items(), ("this model", model_bits)]
    values = [value for _, value in rows]
    places = np.arange(len(rows))[::-1]
    panel.barh(places, values, height=0.62, color=[PLAIN] * len(baselines) + [MODEL])
    for place, (label, value) in zip(places, rows, strict=True):
        colour = "white" if label == "this model" else INK
        inside = value - 0.02 * max(values)
        panel.text(inside, place, f"{value:.2f}", ha="right", va="center", fontsize=10.5, color=colour, fontweight="bold")
    if "xz -9" in baselines:
        panel.axvline(baselines["xz -9"], color=REACH, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    panel.set_yticks(places, [label for label, _ in rows], color=INK)
    panel.set_xlim(0, 1.02 * max(values))
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)


def _draw_shares(panel: Any, shares: Shares) -> None:
    _heading(panel, "Samples that parse")
    for place, (label, accepted, colour) in enumerate(zip(STAGES, shares.accepted, (PLAIN, "#5fa8a1", MODEL), strict=False)):
        share = 100 * accepted / max(1, shares.samples)
        low, high = (100 * bound for bound in wilson(accepted, shares.samples))
        panel.bar([place], [share], width=0.6, color=colour)
        panel.plot([place, place], [low, high], color=INK, linewidth=1.3)
        panel.text(place, min(high + 2, 104), f"{share:.0f}%", ha="center", va="bottom", fontsize=10, color=INK, fontweight="bold")
        panel.text(place, -4, label, ha="center", va="top", fontsize=9.5, color=INK)
    panel.set_xlim(-0.6, len(shares.accepted) - 0.4)
    panel.set_ylim(0, 112)
    panel.set_xticks([])
    panel.set_yticks([0, 25, 50, 75, 100], [f"{value}%" for value in (0, 25, 50, 75, 100)])
    panel.grid(axis="y", color=LINE)
