"""Pictures for a page: small ones exact, large ones small to send; a clip of truth and dream."""

from __future__ import annotations

import io
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from worldflux_dist import figures

EXACT_SIDE = 96  # pixels up to which a picture is sent without loss
GAP = 2  # pixels between the pictures of a mosaic


@dataclass(frozen=True)
class Picture:
    """An encoded picture and its media type."""

    kind: str
    data: bytes

    @classmethod
    def of(cls, frame: np.ndarray) -> Picture:
        """Of a frame (H, W, 1 or 3) uint8: PNG of up to EXACT_SIDE pixels, JPEG of larger ones."""
        image = Image.fromarray(np.broadcast_to(frame, (*frame.shape[:2], 3)))
        name = "png" if max(frame.shape[:2]) <= EXACT_SIDE else "jpeg"
        into = io.BytesIO()
        image.save(into, name, **({"compress_level": 1} if name == "png" else {"quality": 88}))
        return cls(f"image/{name}", into.getvalue())

    def frame(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.data)).convert("RGB"))


def mosaic(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) uint8 in the squarest grid, row after row; one alone as it is."""
    num, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(num))
    rows = -(-num // columns)
    high, wide = height + GAP, width + GAP
    whole = np.full((rows * high - GAP, columns * wide - GAP, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * high, i % columns * wide
        whole[top : top + height, left : left + width] = image
    return whole


def shaded(amount: np.ndarray) -> np.ndarray:
    """Amounts (H, W) in 0..1 from white to the colour of errors; from 0.5 on it is full."""
    color = np.array(ImageColor.getrgb(figures.ERROR), np.float32)
    share = np.clip(2 * amount, 0, 1)[..., None]
    return np.rint(255 * (1 - share) + color * share).astype(np.uint8)


def clip(
    truth: np.ndarray | None, dream: np.ndarray | None, frames: np.ndarray | None, context: int
) -> bytes:
    """A GIF of truth beside dream, of which the first `context` steps were seen; without a dream
    that can be drawn, of the environment's frames."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.gif"
        if truth is not None and dream is not None:
            figures.open_loop_gif(truth, dream, path, context, frames)
        elif frames is not None:
            figures.video(frames, path)
        else:
            raise ValueError("neither the dream nor the environment draws pictures for a clip")
        return path.read_bytes()
