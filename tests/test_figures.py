"""The pictures hold the right pixels, frames and colours, and are small enough for a README."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from worldflux_dist.figures import (
    BORDER,
    CAPTION,
    CLOSED,
    MARGIN,
    OPEN,
    learning_curve,
    open_loop_gif,
    video,
)

SCORES = [
    {"env_steps": step, "return_mean": step / 100, "return_std": 5.0}
    for step in range(0, 12_000, 1000)
]


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as gif:
        found = []
        for index in range(gif.n_frames):  # type: ignore[attr-defined]
            gif.seek(index)
            found.append(np.asarray(gif.convert("RGB")).astype(int))
        return found


def near(picture: np.ndarray, color: str, tolerance: int = 6) -> np.ndarray:
    """Where a picture (H, W, 3) has a colour."""
    return np.abs(picture - np.array(ImageColor.getrgb(color))).max(-1) <= tolerance


def blobs(num: int, channels: int = 3) -> np.ndarray:
    """A white square that walks over a green field: (num, 64, 64, channels) uint8."""
    images = np.zeros((num, 64, 64, channels), np.uint8)
    images[..., 0 if channels == 1 else 1] = 90
    for t in range(num):
        images[t, 20:30, t % 50 : t % 50 + 10] = 255
    return images


def test_learning_curve(tmp_path: Path) -> None:
    learning_curve(SCORES, tmp_path / "plain.png", title="toy")
    learning_curve(SCORES, tmp_path / "lines.png", threshold=90, random=10, title="toy")
    plain, lines = (
        np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")).astype(int)
        for n in ("plain", "lines")
    )
    assert plain.shape == lines.shape
    assert near(plain, OPEN).sum() > 1000
    assert not near(plain, CLOSED).any()
    dashes = near(lines, CLOSED).sum(1).max()  # the threshold's row of pixels
    assert plain.shape[1] * 0.3 < dashes < plain.shape[1] * 0.8


def test_learning_curve_of_one_or_no_score(tmp_path: Path) -> None:
    learning_curve(SCORES[:1], tmp_path / "one.png")
    assert near(np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int), OPEN).any()
    with pytest.raises(ValueError, match="at least one score"):
        learning_curve([], tmp_path / "none.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_image_panels(channels: int, tmp_path: Path) -> None:
    truth, context = blobs(20, channels), 8
    dream = truth.copy()
    dream[context:] = np.roll(dream[context:], 3, 1)  # it drifts once the eyes are closed
    path = tmp_path / "video" / "open_loop.gif"
    open_loop_gif(truth, dream, path, context)
    pictures = frames_of(path)
    assert len(pictures) == 20
    assert path.stat().st_size < 300_000
    side, pitch = 192, 192 + 2 * BORDER + MARGIN  # 64 pixels, three times as large
    for t in (0, context - 1, context, 19):
        error = np.abs(truth[t].astype(int) - dream[t])
        for column, expected in enumerate((truth[t], dream[t], error)):
            left, top = MARGIN + BORDER + column * pitch, CAPTION + BORDER
            panel = pictures[t][top : top + side, left : left + side]
            large = np.broadcast_to(expected, (64, 64, 3)).astype(int).repeat(3, 0).repeat(3, 1)
            assert np.abs(panel - large).max() <= 8, (t, column)
        edge = pictures[t][CAPTION : CAPTION + BORDER, MARGIN + pitch : MARGIN + pitch + side]
        assert near(edge, OPEN if t < context else CLOSED).all()


def test_busy_images_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (64, 16, 16, 3)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    open_loop_gif(coarse, coarse // 2, tmp_path / "a.gif", 16)
    assert (tmp_path / "a.gif").stat().st_size < 2_000_000


def test_vectors_with_frames(tmp_path: Path) -> None:
    time = np.arange(24)
    truth = np.stack([np.sin(time / (3 + i)) for i in range(9)], -1).astype(np.float32)
    dream = truth + 0.02 * time[:, None]
    frames = np.full((24, 40, 60, 3), (200, 40, 200), np.uint8)
    path = tmp_path / "a.gif"
    open_loop_gif(truth, dream, path, context=8, frames=frames)
    pictures = frames_of(path)
    assert len(pictures) == 24
    assert path.stat().st_size < 1_000_000
    half = pictures[0].shape[1] * 2 // 5
    ours = np.abs(pictures[3] - (200, 40, 200)).max(-1) <= 8
    assert ours[:, :half].sum() > 40_000  # the environment, on the left and nowhere else
    assert not ours[:, half:].any()
    dreamt = [near(picture[:, half:], CLOSED).sum() for picture in (pictures[2], pictures[23])]
    assert dreamt[1] > dreamt[0] + 1000  # the dream's lines grow
    top = slice(0, 60)  # the caption
    assert near(pictures[7][top, :half], OPEN).sum() > 100
    assert not near(pictures[7][top, :half], CLOSED).any()
    assert near(pictures[8][top, :half], CLOSED).sum() > 100


def test_vectors_without_frames_and_with_a_bad_dream(tmp_path: Path) -> None:
    truth = np.zeros((5, 1), np.float32)
    dream = np.array([[0], [1], [np.nan], [np.inf], [2]], np.float32)
    open_loop_gif(truth, dream, tmp_path / "a.gif", context=2)
    assert len(frames_of(tmp_path / "a.gif")) == 5


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    images, path = blobs(4), tmp_path / "a.gif"
    with pytest.raises(ValueError, match="must have one shape"):
        open_loop_gif(images, images[:3], path, 2)
    with pytest.raises(ValueError, match="must be uint8"):
        open_loop_gif(images / 255.0, images / 255.0, path, 2)
    with pytest.raises(ValueError, match="give one for each"):
        open_loop_gif(np.zeros((4, 2)), np.zeros((4, 2)), path, 2, frames=images[:3])
    with pytest.raises(ValueError, match="at least one frame"):
        video([], path)
    with pytest.raises(ValueError, match=r"\.gif or \.mp4"):
        video(images, tmp_path / "a.avi")


def test_gif_video(tmp_path: Path) -> None:
    video(blobs(10), tmp_path / "a.gif", fps=25)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["duration"] == 40
        assert gif.info["loop"] == 0
    pictures = frames_of(tmp_path / "a.gif")
    assert len(pictures) == 10
    assert np.abs(np.stack(pictures) - blobs(10)).max() <= 8


def test_mp4_video(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    video(blobs(10)[:, :63, :61], tmp_path / "a.mp4", fps=10)
    with imageio.get_reader(tmp_path / "a.mp4") as reader:
        pictures = np.stack(list(reader.iter_data())).astype(int)
    assert pictures.shape == (10, 64, 62, 3)
    assert np.abs(pictures[:, :63, :61] - blobs(10)[:, :63, :61]).mean() < 10


def test_mp4_without_ffmpeg_names_the_remedy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['imageio_ffmpeg'] = None\n"
        "import numpy as np, pathlib; from worldflux_dist.figures import video\n"
        f"video(np.zeros((2, 16, 16, 3), np.uint8), pathlib.Path({str(tmp_path / 'a.mp4')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "RuntimeError: writing" in done.stderr
    assert "pip install imageio-ffmpeg" in done.stderr
