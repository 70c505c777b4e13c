"""A canvas on which smooth shapes are painted with light, shade and texture.

Everything is painted in place inside the shape's own box, with antialiased edges, which keeps a scene of some fifty
shapes at a few milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np

from tools.tiny.palette import Paint
from tools.tiny.textures import Texture

_LINE_GAP, _LINE_OPACITY, _FAINT = 6.0, 0.85, 0.5
_SHIFT = 4  # cv2 takes points with this many bits of fraction
Box = Tuple[int, int, int, int]
Colour = Union[Paint, np.ndarray]


@dataclass(frozen=True)
class Clip:
    """A region that a patch stays inside: the union of shapes, its corners rounded by `blend` pixels."""

    shapes: Sequence[np.ndarray]
    blend: float = 0.0


@dataclass(frozen=True)
class Spot:
    """Where an object stands: the pixel its local origin falls on, pixels per unit, and which way it looks."""

    x: float
    y: float
    size: float
    facing: int = 1
    angle: float = 0.0

    def place(self, points: Sequence[Sequence[float]]) -> np.ndarray:
        """(n, 2) float64 pixels of local points (x to where the object looks, y down)."""
        local = np.asarray(points, np.float64).reshape(-1, 2)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x = (local[:, 0] * cos - local[:, 1] * sin) * self.facing
        y = local[:, 0] * sin + local[:, 1] * cos
        return np.stack([self.x + self.size * x, self.y + self.size * y], axis=1)

    def at(self, x: float, y: float, scale: float = 1.0, angle: float = 0.0, facing: int = 1) -> Spot:
        """A spot inside this one: local origin, relative size and turn."""
        where = self.place([(x, y)])[0]
        return Spot(where[0], where[1], self.size * scale, self.facing * facing, self.angle * facing + angle)


def smooth(points: Sequence[Sequence[float]], per_side: int = 6, closed: bool = True) -> np.ndarray:
    """(n, 2) points of the Catmull-Rom curve through the given ones."""
    p = np.asarray(points, np.float64).reshape(-1, 2)
    if closed:
        before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
        start = p
    else:
        padded = np.concatenate([p[:1] * 2 - p[1:2], p, p[-1:] * 2 - p[-2:-1]])
        before, start, after, beyond = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = (np.arange(per_side) / per_side)[None, :, None]
    before, start, after, beyond = (v[:, None, :] for v in (before, start, after, beyond))
    curve = 0.5 * (
        2 * start
        + (after - before) * t
        + (2 * before - 5 * start + 4 * after - beyond) * t**2
        + (3 * start - before - 3 * after + beyond) * t**3
    )
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0, count: int = 28) -> np.ndarray:
    """(count, 2) points of an ellipse turned by `angle` radians."""
    t = np.linspace(0.0, 2 * math.pi, count, endpoint=False)
    u, v = rx * np.cos(t), ry * np.sin(t)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.stack([x + u * cos - v * sin, y + u * sin + v * cos], axis=1)


def ribbon(line: Sequence[Sequence[float]], widths: Union[float, Sequence[float]]) -> np.ndarray:
    """(2 n, 2) outline of a line of n points with a width at each of them."""
    p = np.asarray(line, np.float64).reshape(-1, 2)
    along = np.gradient(p, axis=0)
    length = np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)
    normal = np.stack([-along[:, 1] / length, along[:, 0] / length], axis=1)
    half = np.broadcast_to(np.asarray(widths, np.float64) / 2, (len(p),))[:, None]
    return np.concatenate([p + normal * half, (p - normal * half)[::-1]])


def rgb_of(colour: Colour) -> np.ndarray:
    """(3,) float32 RGB in 0..255."""
    return colour.rgb if isinstance(colour, Paint) else np.asarray(colour, np.float32)


def lit(colour: Colour, value: np.ndarray) -> np.ndarray:
    """(h, w, 3) float32: a colour under light.

    Where `value` is below 1 the colour is darkened by it, and above 1 it is mixed with white by what exceeds 1. Both
    keep the hue.
    """
    rgb = rgb_of(colour)
    dark = np.clip(value, 0.0, 1.0)[..., None]
    white = np.clip(value - 1.0, 0.0, 1.0)[..., None]
    return dark * rgb + white * (255.0 - rgb)


class Canvas:
    """An RGB picture in progress, with the mask of the main object's named colour.

    Parameters
    ----------
    height, width : pixels
    light : angle in radians of the direction to the light; pi / 2 is straight above
    """

    def __init__(self, height: int, width: int, light: float = 2.0) -> None:
        self.height = height
        self.width = width
        self.light = (math.cos(light), -math.sin(light))
        self.image = np.zeros((height, width, 3), np.float32)
        self.mask = np.zeros((height, width), np.float32)
        self.main = False  # whether what is painted now belongs to the main object
        self.dark = False  # whether the background is dark, so that thin lines on it must be light

    def box(self, points: np.ndarray, margin: float = 2.0) -> Optional[Box]:
        """The part of the picture that the points touch; None where they are outside."""
        x0, y0 = np.floor(points.min(0) - margin).astype(int)
        x1, y1 = np.ceil(points.max(0) + margin).astype(int)
        x0, y0, x1, y1 = max(int(x0), 0), max(int(y0), 0), min(int(x1), self.width), min(int(y1), self.height)
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def alpha(self, shapes: Sequence[np.ndarray], box: Box, blend: float = 0.0) -> np.ndarray:
        """(h, w) float32 in 0..1: how much of each pixel of the box the union of the shapes covers.

        `blend` is the radius in pixels by which corners between the shapes are rounded.
        """
        x0, y0, x1, y1 = box
        cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
        for shape in shapes:
            cv2.fillPoly(cover, [_fixed(shape, x0, y0)], 255, cv2.LINE_AA, _SHIFT)
        alpha = cover.astype(np.float32) * (1.0 / 255.0)
        if blend > 0.4:
            alpha = cv2.GaussianBlur(alpha, (0, 0), blend, borderType=cv2.BORDER_REPLICATE)
            alpha = np.clip((alpha - 0.5) * (2.2 * blend) + 0.5, 0.0, 1.0)
        return alpha

    def cover(self, box: Box, alpha: np.ndarray, colour: np.ndarray, named: bool = False) -> None:
        """Lay a colour, (3,) or (h, w, 3), over the box where alpha says."""
        x0, y0, x1, y1 = box
        region = self.image[y0:y1, x0:x1]
        region += alpha[..., None] * (colour - region)
        mask = self.mask[y0:y1, x0:x1]
        if named and self.main:
            mask += alpha * (1.0 - mask)
        else:
            mask *= 1.0 - alpha

    def solid(
        self,
        shapes: Union[np.ndarray, Sequence[np.ndarray]],
        colour: Colour,
        relief: float = 0.3,
        named: bool = False,
        blend: float = 0.0,
        texture: Optional[Texture] = None,
        clip: Optional[Clip] = None,
        base: float = 0.98,
        rim: float = 0.25,
    ) -> None:
        """Paint the union of shapes as one rounded body.

        Parameters
        ----------
        shapes : (n, 2) points in pixels, or several of them
        colour : a paint or (3,) RGB
        relief : how strongly light and shade round it
        named : whether it bears the main object's named colour
        blend : radius in pixels that rounds the corners between the shapes
        texture : added to the light
        clip : paint only inside this
        base : light of a flat part, 1 for the colour itself
        rim : how much the border is darkened
        """
        parts: List[np.ndarray] = [shapes] if isinstance(shapes, np.ndarray) else list(shapes)
        box = self.box(np.concatenate(parts), 2.0 + 2 * blend)
        if box is None:
            return
        alpha = self.alpha(parts, box, blend)
        value = self._relief(alpha, relief, rim)
        value += base
        if texture is not None:
            value += texture.patch(box, float(rgb_of(colour).max()))
        if clip is not None:
            alpha = alpha * self.alpha(clip.shapes, box, clip.blend)
        self.cover(box, alpha, lit(colour, value), named)

    def _relief(self, alpha: np.ndarray, depth: float, rim: float) -> np.ndarray:
        """(h, w) light of a rounded body, about -depth..depth; computed small, since it is smooth."""
        height, width = alpha.shape
        scale = max(max(height, width) / 28.0, 1.0)
        small = (max(int(width / scale), 2), max(int(height / scale), 2))
        form = cv2.resize(alpha, small, interpolation=cv2.INTER_AREA)
        form = cv2.copyMakeBorder(form, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=0)
        form = cv2.GaussianBlur(form, (0, 0), max(min(small) / 5.0, 0.8))
        dx = cv2.Sobel(form, cv2.CV_32F, 1, 0)
        dy = cv2.Sobel(form, cv2.CV_32F, 0, 1)
        shade = -(dx * self.light[0] + dy * self.light[1])[4:-4, 4:-4]
        peak = float(np.abs(shade).max())
        light = shade * (depth / peak) if peak > 1e-6 else shade
        if rim > 0:
            inner = form[4:-4, 4:-4]
            light = light - rim * np.clip(1.0 - inner / max(float(inner.max()), 1e-6), 0.0, 1.0)
        return cv2.resize(light, (width, height), interpolation=cv2.INTER_LINEAR)

    def flat(
        self, shapes: Union[np.ndarray, Sequence[np.ndarray]], colour: Colour, opacity: float = 1.0, named: bool = False
    ) -> None:
        """Paint the union of shapes in one even colour."""
        parts: List[np.ndarray] = [shapes] if isinstance(shapes, np.ndarray) else list(shapes)
        box = self.box(np.concatenate(parts))
        if box is not None:
            self.cover(box, self.alpha(parts, box) * opacity, rgb_of(colour), named)

    def flat_clipped(self, shape: np.ndarray, colour: Colour, clip: Clip) -> None:
        """Paint a shape in one even colour, inside another only."""
        box = self.box(shape)
        if box is not None:
            self.cover(box, self.alpha([shape], box) * self.alpha(clip.shapes, box, clip.blend), rgb_of(colour))

    def ring(self, shape: np.ndarray, hole: np.ndarray, colour: Colour, relief: float) -> None:
        """Paint a shape with a hole in it, in the main object's named colour."""
        box = self.box(shape)
        if box is None:
            return
        alpha = self.alpha([shape], box) * (1.0 - self.alpha([hole], box))
        value = self._relief(alpha, relief, 0.15)
        value += 0.98
        self.cover(box, alpha, lit(colour, value), True)

    def lines(
        self,
        lines: Sequence[np.ndarray],
        colour: Colour,
        width: float = 1.0,
        opacity: float = 1.0,
        closed: bool = False,
        named: bool = False,
        clip: Optional[Clip] = None,
    ) -> None:
        """Draw clear lines of one colour.

        They are `width` pixels wide but at least 2, and lines of a group that are shorter than 7 pixels or run closer
        than that to another are left out: finer ones would be edges that no small autoencoder keeps. A faint outline
        (closed, of less than half the opacity) stays a fine one, which only deepens the shape's border.
        """
        if not closed:
            lines = _apart(lines, _LINE_GAP + width)
        if not lines:
            return
        if not closed or opacity >= _FAINT:
            width, opacity = max(width * 1.5, 2.0), max(opacity, _LINE_OPACITY)
        box = self.box(np.concatenate(list(lines)), 2.0 + width)
        if box is None:
            return
        x0, y0, x1, y1 = box
        cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
        fixed = [_fixed(line, x0, y0) for line in lines]
        cv2.polylines(cover, fixed, closed, 255, max(int(round(width)), 1), cv2.LINE_AA, _SHIFT)
        alpha = cover.astype(np.float32) * (opacity / 255.0)
        if clip is not None:
            alpha *= self.alpha(clip.shapes, box, clip.blend)
        self.cover(box, alpha, rgb_of(colour), named)

    def glow(self, x: float, y: float, rx: float, ry: float, colour: Colour, strength: float) -> None:
        """A soft spot of colour that fades out at the radii; a dark one is a shadow. The mask stays as it is."""
        box = self.box(np.array([[x - rx, y - ry], [x + rx, y + ry]]), 0.0)
        if box is None:
            return
        x0, y0, x1, y1 = box
        u = (np.arange(x0, x1, dtype=np.float32) - x) / max(rx, 1.0)
        v = (np.arange(y0, y1, dtype=np.float32) - y) / max(ry, 1.0)
        fade = np.clip(1.0 - (u * u)[None, :] - (v * v)[:, None], 0.0, 1.0)
        region = self.image[y0:y1, x0:x1]
        region += (fade * fade * strength)[..., None] * (rgb_of(colour) - region)

    def soften(self, sigma: float) -> None:
        """Put what is painted so far out of focus."""
        self.image = cv2.GaussianBlur(self.image, (0, 0), sigma)

    def finish(self) -> np.ndarray:
        """(height, width, 3) uint8 RGB."""
        return np.clip(self.image + 0.5, 0, 255).astype(np.uint8)


def _apart(lines: Sequence[np.ndarray], gap: float) -> List[np.ndarray]:
    """The lines that are `gap` pixels long at least and whose middles lie so far from those kept before them."""
    kept: List[np.ndarray] = []
    middles: List[np.ndarray] = []
    for line in lines:
        middle = line.mean(0)
        if np.ptp(line, axis=0).max() < gap:
            continue
        if all(np.hypot(*(middle - other)) >= gap for other in middles):
            kept.append(line)
            middles.append(middle)
    return kept


def _fixed(points: np.ndarray, x0: int, y0: int) -> np.ndarray:
    """Points in cv2's fixed-point form relative to a corner; far ones are held near, which cv2's integers need."""
    local = np.clip(points - np.array([x0, y0], np.float64), -4000, 4000)
    return np.round(local * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2)
