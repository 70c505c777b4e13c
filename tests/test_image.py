"""From a user's picture to the canny map."""

from __future__ import annotations

from typing import Any, Tuple

import cv2
import numpy as np
import pytest

from cldm.image import MAX_PIXELS, canny_map, resize_image, target_size, to_three_channels


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    """Random blobs over the whole range of uint8: edges of all strengths, but not everywhere."""
    random = np.random.default_rng(seed).standard_normal(shape)
    return cv2.normalize(cv2.GaussianBlur(random, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U).reshape(shape)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1)])
def test_grey_becomes_three_equal_channels(shape: Tuple[int, ...]) -> None:
    grey = picture(*shape)
    color = to_three_channels(grey)
    assert color.shape == (20, 30, 3) and color.dtype == np.uint8
    for channel in range(3):
        assert np.array_equal(color[:, :, channel], grey.reshape(20, 30))


def test_three_channels_stay_as_they_are() -> None:
    image = picture(20, 30, 3)
    assert np.array_equal(to_three_channels(image), image)


def test_alpha_is_laid_over_white() -> None:
    image = picture(20, 30, 4)
    image[:, :, 3] = np.random.default_rng(1).integers(0, 256, size=(20, 30), dtype=np.uint8)
    image[0, 0, 3], image[0, 1, 3] = 0, 255
    before = image.copy()
    color = to_three_channels(image)
    assert color.shape == (20, 30, 3) and color.dtype == np.uint8
    assert color[0, 0].tolist() == [255, 255, 255]
    assert color[0, 1].tolist() == image[0, 1, :3].tolist()
    exact = (image[:, :, :3].astype(float) * image[:, :, 3:] + 255.0 * (255 - image[:, :, 3:].astype(float))) / 255
    # Cut off, not rounded, as the original does; single precision may fall on the other side of a whole number.
    assert np.abs(color - np.floor(exact + 1e-4)).max() <= 1
    assert (color == np.floor(exact + 1e-4)).mean() > 0.99
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (None, "None; cv2.imread"),
        ("bird.jpg", "NumPy array of uint8, got str"),
        ([[1, 2], [3, 4]], "NumPy array of uint8, got list"),
        (b"\x89PNG", "NumPy array of uint8, got bytes"),
        (np.zeros((8, 8, 3), np.float32), "uint8 in 0 .. 255, got float32"),
        (np.zeros((8, 8, 3), np.int64), "uint8 in 0 .. 255, got int64"),
        (np.zeros((8, 8, 3), np.uint16), "uint8 in 0 .. 255, got uint16"),
        (np.zeros((8, 8), bool), "uint8 in 0 .. 255, got bool"),
        (np.array(["bird"], dtype=object), "uint8 in 0 .. 255, got object"),
    ],
)
def test_not_a_uint8_picture(image: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        to_three_channels(image)
    with pytest.raises(TypeError, match=said):
        canny_map(image, 256, 100, 200)


@pytest.mark.parametrize(
    "shape", [(), (8,), (8, 8, 2), (8, 8, 5), (3, 8, 8), (1, 8, 8, 3), (8, 8, 0)], ids=lambda shape: str(shape)
)
def test_wrong_shape(shape: Tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="H x W x 1, 3 or 4, got shape"):
        to_three_channels(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(0, 8, 3), (8, 0, 3), (0, 0), (0, 8, 4)], ids=lambda shape: str(shape))
def test_empty_picture(shape: Tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="empty: shape"):
        to_three_channels(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_enormous_picture(channels: int) -> None:
    image = np.broadcast_to(np.zeros((1, 1, channels), np.uint8), (20_000, 6_000, channels))
    with pytest.raises(ValueError, match="6000 x 20000 has over 100,000,000 pixels"):
        to_three_channels(image)


def original_size(height: int, width: int, resolution: int) -> Tuple[int, int]:
    """Python's round and NumPy's both round halves to the even number."""
    k = resolution / min(height, width)
    return round(k * height / 64) * 64, round(k * width / 64) * 64


@pytest.mark.parametrize("resolution", [64, 100, 250, 256, 300, 384, 512, 768])
@pytest.mark.parametrize(
    "shape", [(256, 384), (384, 256), (512, 512), (480, 640), (333, 501), (100, 130), (1080, 1920), (31, 47)]
)
def test_target_size_is_the_originals(shape: Tuple[int, int], resolution: int) -> None:
    size = target_size(*shape, resolution)
    assert size == original_size(*shape, resolution)
    assert size[0] % 64 == size[1] % 64 == 0
    image = resize_image(picture(*shape, 3), resolution)
    assert image.shape == (*size, 3) and image.dtype == np.uint8


def test_known_sizes() -> None:
    assert target_size(256, 384, 256) == (256, 384)
    assert target_size(256, 384, 250) == (256, 384)
    assert target_size(500, 375, 512) == (704, 512)
    assert target_size(256, 384, 288) == (256, 448)  # 4.5 rounds to the even 4


@pytest.mark.parametrize(
    ("height", "width", "resolution"), [(100, 100, 20), (10, 100_000, 256), (2000, 4000, 2048), (1, 5000, 64)]
)
def test_absurd_target_size(height: int, width: int, resolution: int) -> None:
    with pytest.raises(ValueError, match=f"a {width} x {height} picture at resolution {resolution} would become"):
        target_size(height, width, resolution)


def test_largest_target_size() -> None:
    assert target_size(2048, 2048, 2048) == (2048, 2048)
    assert MAX_PIXELS == 2048 * 2048


def test_resize_methods() -> None:
    image = picture(100, 160, 3)
    up, down = resize_image(image, 256), resize_image(image, 64)
    assert np.array_equal(up, cv2.resize(image, (384, 256), interpolation=cv2.INTER_LANCZOS4))
    assert np.array_equal(down, cv2.resize(image, (128, 64), interpolation=cv2.INTER_AREA))
    assert not np.array_equal(up, cv2.resize(image, (384, 256), interpolation=cv2.INTER_AREA))
    same = picture(128, 192, 3)
    assert np.array_equal(resize_image(same, 128), same)


@pytest.mark.parametrize("thresholds", [(100, 200), (30, 90), (0, 255)])
def test_canny_map_by_hand(thresholds: Tuple[int, int]) -> None:
    image = picture(120, 180, 3, seed=2)
    expected = cv2.Canny(cv2.resize(image, (192, 128), interpolation=cv2.INTER_LANCZOS4), *thresholds)
    edges = canny_map(image, 128, *thresholds)
    assert edges.shape == (128, 192) and edges.dtype == np.uint8
    assert np.array_equal(edges, expected)
    assert set(np.unique(edges)) == {0, 255}


def test_thresholds_change_the_canny_map() -> None:
    image = picture(128, 192, 3, seed=3)
    few, many = canny_map(image, 128, 200, 250), canny_map(image, 128, 10, 30)
    assert 0 < (few > 0).sum() < (many > 0).sum()


def test_flat_picture_has_no_edges() -> None:
    assert not canny_map(np.full((64, 64, 3), 90, np.uint8), 64, 100, 200).any()


def test_grey_and_views_are_accepted() -> None:
    image = picture(64, 128, 3, seed=4)
    whole = picture(64, 256, 3, seed=5)
    for view in (image[:, :, ::-1], image[::-1], image[:, ::-1], whole[:, ::2], np.asfortranarray(image)):
        assert np.array_equal(canny_map(view, 64, 50, 100), canny_map(np.ascontiguousarray(view), 64, 50, 100))
    grey = image[:, :, 0]
    assert np.array_equal(canny_map(grey, 64, 50, 100), cv2.Canny(np.dstack([grey] * 3), 50, 100))
    frozen = image.copy()
    frozen.setflags(write=False)
    assert np.array_equal(canny_map(frozen, 64, 50, 100), canny_map(image, 64, 50, 100))
