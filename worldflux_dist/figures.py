"""The pictures a run leaves: its learning curve, and the truth beside the dream.

An open-loop animation shows a world model looking at the first `context` steps and then going on
with its eyes closed, given only the actions. What must stay true: the colours and words for eyes
open and eyes closed are the same in every picture, and a picture never changes the numbers it
shows: image panels are whole-number enlargements of the pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPEN, CLOSED = "#2a9d8f", "#e76f51"  # eyes open, eyes closed
TRUTH, DREAM, ERROR = "#264653", "#e76f51", "#b23a48"
INK, FAINT, PAPER = "#222222", "#8a8f98", "#ffffff"

PANEL_HEIGHT = 216  # pixels; image panels come as near to it as a whole-number scale allows
MARGIN, BORDER, CAPTION, FOOTER = 12, 4, 30, 36  # pixels around image panels
MAX_DIMS = 6


def learning_curve(
    scores: Sequence[dict[str, Any]],
    path: Path,
    threshold: float | None = None,
    random: float | None = None,
    title: str = "",
) -> None:
    """Draw evaluation return (mean and one standard deviation) against env steps as a PNG.

    `scores` are lines of scores.jsonl of one run (at least one). `threshold` and `random` (a
    random policy's return) become dashed lines.
    """
    if not scores:
        raise ValueError("a learning curve needs at least one score: evaluate the agent first")
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    lines = sorted(scores, key=lambda line: line["env_steps"])
    x, mean, std = (
        np.array([line[name] for line in lines], np.float64)
        for name in ("env_steps", "return_mean", "return_std")
    )
    figure = Figure(figsize=(8, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.fill_between(x, mean - std, mean + std, color=OPEN, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=OPEN, linewidth=2.2, marker="o", markersize=4.5)
    for value, name, color in ((threshold, "threshold", CLOSED), (random, "random policy", FAINT)):
        if value is not None:
            axes.axhline(value, color=color, linestyle=(0, (5, 4)), linewidth=1.5, zorder=1)
            across: Any = axes.get_yaxis_transform()
            text = axes.text(0.99, value, f"{name} {value:,.4g}", color=color, transform=across)
            text.set(ha="right", va="bottom")
    axes.set_xlabel("env steps", color=INK)
    axes.set_ylabel("evaluation return", color=INK)
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.margins(y=0.12)
    _plain(axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def report_card(card: Any, path: Path) -> None:
    """Draw a `ReportCard` as a PNG of six panels: its curves, calibration, values and numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.4), dpi=110, layout="constrained")
    (loop, reward, ends), (values, spectrum, text) = figure.subplots(2, 3)
    ahead = np.arange(1, len(card.curves["features"]) + 1)
    for name, color in (("obs", TRUTH), ("features", OPEN)):
        if name in card.curves:
            loop.plot(ahead, card.curves[name], color=color, linewidth=2.2, label=name)
    reward.plot(ahead, card.curves["reward"], color=ERROR, linewidth=2.2)
    for axes, title, line in (
        (loop, "open-loop error / persistence", "a copy"),
        (reward, "reward error / that of the mean", "the mean"),
    ):
        axes.axhline(1, color=FAINT, linestyle=(0, (5, 4)), linewidth=1.5, label=line)
        axes.set(title=title, xlabel="steps ahead", ylim=(0, None), xlim=(1, max(2, len(ahead))))
        axes.legend(frameon=False)
    predicted, observed, num = card.calibration.T
    ends.plot([0, 1], [0, 1], color=FAINT, linestyle=(0, (5, 4)), linewidth=1.5)
    ends.scatter(predicted, observed, s=20 + 180 * num / num.max(), color=OPEN)
    ends.set(title="going on", xlabel="predicted", ylabel="observed")
    ends_of = [card.values[:, 1].min(), card.values[:, 1].max()]
    values.plot(ends_of, ends_of, color=FAINT, linestyle=(0, (5, 4)), linewidth=1.5)
    values.scatter(card.values[:, 1], card.values[:, 0], s=6, color=TRUTH, alpha=0.3, linewidth=0)
    values.set(title="values", xlabel="return obtained", ylabel="predicted")
    spectrum.bar(np.arange(1, len(card.spectrum) + 1), card.spectrum, width=1, color=OPEN)
    spectrum.set(title="features: share of variance by axis", xlabel="axis")
    text.axis("off")
    numbers = "\n".join(f"{name:<18}{value:9.3g}" for name, value in card.numbers.items())
    text.text(0, 1, numbers, family="monospace", fontsize=9, va="top", color=INK)
    weak = "\n".join(f"weak: {sentence}" for sentence in card.weak) or "nothing here is weak"
    text.text(0, -0.04, weak, fontsize=9, va="bottom", color=ERROR if card.weak else OPEN)
    for axes in (loop, reward, ends, values, spectrum):
        _plain(axes)
    figure.suptitle(f"{card.model} on held-out episodes", color=INK, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def open_loop_gif(
    truth: np.ndarray, dream: np.ndarray, path: Path, context: int, frames: np.ndarray | None = None
) -> None:
    """Animate truth against dream; the first `context` steps were seen, the rest dreamt.

    Images: truth and dream (T, H, W, C) uint8 with C 1 or 3, as panels truth, dream and absolute
    error. Vectors: truth and dream (T, n), the first 6 dims as lines, beside the env's rendered
    `frames` (T, h, w, 3) uint8 if given. Raises ValueError for other shapes.
    """
    if truth.shape != dream.shape or truth.ndim not in (2, 4) or not len(truth):
        raise ValueError(
            f"truth {truth.shape} and dream {dream.shape} must have one shape, (T, H, W, C) for "
            "images or (T, n) for vectors"
        )
    if frames is not None and len(frames) != len(truth):
        raise ValueError(f"{len(frames)} rendered frames for {len(truth)} steps: give one for each")
    if truth.ndim == 4:
        pictures = _image_pictures(truth, dream, context)
    else:
        pictures = _vector_pictures(truth, dream, context, frames)
    video(pictures, path)


def video(frames: Iterable[np.ndarray], path: Path, fps: int = 15) -> None:
    """Write frames (H, W, 3) uint8 as .gif, or as .mp4 where imageio-ffmpeg is installed."""
    pictures = [np.asarray(frame) for frame in frames]
    if not pictures:
        raise ValueError("a video needs at least one frame")
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"cannot write a video to {path}: name a file ending in .gif or .mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    (_write_gif if path.suffix == ".gif" else _write_mp4)(pictures, path, fps)


# ------------------------------------------------------------------------------------- images


def _image_pictures(truth: np.ndarray, dream: np.ndarray, context: int) -> list[np.ndarray]:
    if truth.dtype != np.uint8 or dream.dtype != np.uint8:
        raise ValueError(f"images must be uint8, got {truth.dtype} and {dream.dtype}")
    error = np.abs(truth.astype(np.int16) - dream).astype(np.uint8)
    scale = max(1, round(PANEL_HEIGHT / truth.shape[1]))
    large = [
        np.broadcast_to(images, (*images.shape[:3], 3)).repeat(scale, 1).repeat(scale, 2)
        for images in (truth, dream, error)
    ]
    return [
        _image_picture(panels, t, len(truth), context)
        for t, panels in enumerate(zip(*large, strict=True))
    ]


def _image_picture(panels: Sequence[np.ndarray], t: int, total: int, context: int) -> np.ndarray:
    """One frame: bordered panels (h, w, 3) in a row, captions above, progress below."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = panels[0].shape[:2]
    full_width = 3 * (width + 2 * BORDER) + 4 * MARGIN
    full_height = CAPTION + height + 2 * BORDER + FOOTER
    color = OPEN if t < context else CLOSED
    picture = Image.new("RGB", (full_width, full_height), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for column, (name, panel) in enumerate(zip(("truth", "dream", "error"), panels, strict=True)):
        left = MARGIN + column * (width + 2 * BORDER + MARGIN)
        right, bottom = left + width + 2 * BORDER - 1, CAPTION + height + 2 * BORDER - 1
        draw.text(((left + right) / 2, CAPTION / 2), name, INK, font, anchor="mm")
        edge = FAINT if name == "truth" else color
        draw.rectangle((left, CAPTION, right, bottom), outline=edge, width=BORDER)
        picture.paste(Image.fromarray(panel), (left + BORDER, CAPTION + BORDER))
    middle = full_height - FOOTER / 2
    draw.text((MARGIN, middle), _phase(t, context), color, font, anchor="lm")
    bar_left, bar_right = full_width // 2, full_width - MARGIN
    draw.rectangle((bar_left, middle - 2, bar_right, middle + 2), fill="#e3e6ea")
    for first, last, part in ((0, min(t + 1, context), OPEN), (context, t + 1, CLOSED)):
        if last > first:
            x0, x1 = (bar_left + (bar_right - bar_left) * s / total for s in (first, last))
            draw.rectangle((x0, middle - 2, x1, middle + 2), fill=part)
    return np.asarray(picture)


def _phase(t: int, context: int) -> str:
    return "eyes open" if t < context else f"eyes closed: dream step {t - context + 1}"


# ------------------------------------------------------------------------------------ vectors


def _vector_pictures(
    truth: np.ndarray, dream: np.ndarray, context: int, frames: np.ndarray | None
) -> list[np.ndarray]:
    """Lines that grow with time; only what moves is drawn anew for each frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    wide = frames is not None
    figure = Figure(figsize=(9.6 if wide else 7, 4.6), dpi=100)
    canvas = FigureCanvasAgg(figure)
    left = 0.025 if wide else 0.13
    around = {"left": left, "right": 0.985, "top": 0.86, "bottom": 0.1, "wspace": 0.28}
    sides = figure.add_gridspec(1, 1 + wide, width_ratios=(1, 1.35)[: 1 + wide], **around)
    tracks = _tracks(figure, sides[0, -1], truth, dream, context)
    caption = figure.text(left, 0.93, "", fontsize=13, fontweight="bold", va="center")
    moving = [*(line for line, _ in tracks), caption]
    if frames is not None:
        axes = figure.add_subplot(sides[0, 0])
        axes.axis("off")
        image = axes.imshow(frames[0])
        border = Rectangle((0, 0), 1, 1, fill=False, lw=5, clip_on=False, transform=axes.transAxes)
        moving += [axes.add_patch(border), image]
    for artist in moving:
        artist.set_animated(True)
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    pictures = []
    for t in range(len(truth)):
        color = OPEN if t < context else CLOSED
        canvas.restore_region(background)
        for line, values in tracks:
            line.set_data(np.arange(t + 1), values[: t + 1])
        caption.set(text=_phase(t, context), color=color)
        if frames is not None:
            image.set_data(frames[t])
            border.set_edgecolor(color)
        for artist in moving:
            figure.draw_artist(artist)
        pictures.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return pictures


def _tracks(
    figure: Any, place: Any, truth: np.ndarray, dream: np.ndarray, context: int
) -> list[tuple[Any, np.ndarray]]:
    """Dims in stacked small axes, truth over dream; below, the mean absolute error of all dims.
    Each line, still empty, with the values that it is to show."""
    tracks: list[tuple[Any, np.ndarray]] = []
    num = min(truth.shape[1], MAX_DIMS)
    rows = place.subgridspec(num + 1, 1, hspace=0.25)
    for row in range(num + 1):
        axes, error = figure.add_subplot(rows[row, 0]), row == num
        curves = (
            [(np.abs(truth - dream).mean(1), ERROR, "error")]
            if error
            else [(dream[:, row], DREAM, "dream"), (truth[:, row], TRUTH, "truth")]
        )
        _plain(axes)
        axes.axvspan(0, context - 0.5, color=OPEN, alpha=0.12, linewidth=0)
        axes.set_xlim(0, max(len(truth) - 1, 1))
        axes.set_ylim(*_limits([values for values, _, _ in curves], from_zero=error))
        label = "error" if error else f"obs[{row}]"
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, color=INK)
        axes.set_yticks([])
        axes.grid(visible=False)
        if not error:
            axes.tick_params(labelbottom=False, length=0)
        for values, color, name in curves:
            width = 3.2 if name == "dream" else 1.5
            (line,) = axes.plot([], [], color=color, linewidth=width, label=name)
            tracks.append((line, values))
        if row == 0:
            lines, above = [line for line, _ in tracks[::-1]], (1, 1.05)
            style = {"ncols": 2, "frameon": False, "borderaxespad": 0}
            axes.legend(handles=lines, loc="lower right", bbox_to_anchor=above, **style)
    axes.set_xlabel("step", fontsize=9, color=INK, labelpad=1)
    return tracks


def _limits(curves: list[np.ndarray], from_zero: bool) -> tuple[float, float]:
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    low = 0.0 if from_zero else low
    pad = 0.12 * (high - low) or 0.5
    return float(low - (0 if from_zero else pad)), float(high + pad)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4c8cf")
    axes.tick_params(colors="#5a6069", labelsize=9, length=3)
    axes.grid(color="#e9ebee", linewidth=0.8)
    axes.set_axisbelow(True)


# ------------------------------------------------------------------------------------- videos


def _write_gif(frames: list[np.ndarray], path: Path, fps: int) -> None:
    """One palette for all frames and no dithering, so that what stands still costs nothing."""
    from PIL import Image, ImageColor

    sample = np.concatenate([frame.reshape(-1, 3) for frame in frames[:: len(frames) // 12 or 1]])
    common = Image.fromarray(sample[None, :: len(sample) // 500_000 + 1]).quantize(248)
    levels = np.reshape(common.getpalette() or [], (-1, 3)).astype(int)
    own = np.array([ImageColor.getrgb(name) for name in (PAPER, INK, FAINT, OPEN, CLOSED, TRUTH)])
    # Pillow looks colours up coarsely: what is near one of ours would take its place.
    near = (np.abs(levels[:, None] - own).max(-1) < 8).any(1)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*own.flat, *levels[~near].flat])
    pictures = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    duration = max(2, round(100 / fps)) * 10  # GIF counts in 10 ms; browsers slow down below 20
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=duration, loop=0, optimize=False
    )


def _write_mp4(frames: list[np.ndarray], path: Path, fps: int) -> None:
    import imageio.v2 as imageio

    even = [(0, frames[0].shape[0] % 2), (0, frames[0].shape[1] % 2), (0, 0)]  # H.264 needs it
    try:
        writer = imageio.get_writer(path, format="FFMPEG", fps=fps, macro_block_size=1)
    except ImportError as error:
        raise RuntimeError(
            f"writing {path} needs imageio-ffmpeg: run `pip install imageio-ffmpeg`, or name a "
            ".gif instead"
        ) from error
    with writer:
        for frame in frames:
            writer.append_data(np.pad(frame, even, mode="edge"))
