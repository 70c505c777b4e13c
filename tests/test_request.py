"""Every argument of a request: what is accepted, and what the error of a bad one says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cldm.request import Request

NAN, INF = float("nan"), float("inf")


def make(**arguments: Any) -> Request:
    return Request(**{"prompt": "a bird", **arguments})


def test_contest_arguments() -> None:
    request = Request(
        "a bird",
        "best quality, extremely detailed",
        "longbody, lowres, bad anatomy, bad hands, missing fingers",
        1,
        256,
        20,
        False,
        1,
        9,
        2946901,
        0.0,
        100,
        200,
    )
    assert request.conditional_text == "a bird, best quality, extremely detailed"
    assert request.negative_prompt == "longbody, lowres, bad anatomy, bad hands, missing fingers"
    assert dataclasses.astuple(request)[3:] == (1, 256, 20, False, 1.0, 9.0, 2946901, 0.0, 100.0, 200.0)
    assert isinstance(request.strength, float) and isinstance(request.guidance_scale, float)


def test_request_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().seed = 3


BAD_TYPES = [
    ("prompt", None, "str"),
    ("prompt", 3, "str"),
    ("prompt", b"a bird", "str"),
    ("added_prompt", ["best quality"], "str"),
    ("negative_prompt", None, "str"),
    ("num_samples", 1.0, "integer"),
    ("num_samples", True, "integer"),
    ("num_samples", None, "integer"),
    ("image_resolution", 256.0, "integer"),
    ("image_resolution", "256", "integer"),
    ("ddim_steps", 2.5, "integer"),
    ("ddim_steps", 20.0, "integer"),
    ("ddim_steps", True, "integer"),
    ("ddim_steps", "20", "integer"),
    ("ddim_steps", None, "integer"),
    ("ddim_steps", np.float32(20), "integer"),
    ("seed", 1.5, "integer"),
    ("seed", None, "integer"),
    ("seed", "7", "integer"),
    ("guess_mode", "False", "bool"),
    ("guess_mode", None, "bool"),
    ("guess_mode", 2, "bool"),
    ("strength", None, "number"),
    ("strength", "1.0", "number"),
    ("strength", 1 + 0j, "number"),
    ("guidance_scale", "nine", "number"),
    ("guidance_scale", [9], "number"),
    ("guidance_scale", b"9", "number"),
    ("eta", None, "number"),
    ("low_threshold", "100", "number"),
    ("high_threshold", None, "number"),
]


@pytest.mark.parametrize(("name", "value", "kind"), BAD_TYPES)
def test_wrong_type(name: str, value: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be an? {kind}"):
        make(**{name: value})


BAD_VALUES = [
    ("num_samples", 0, "between 1 and 64"),
    ("num_samples", -1, "between 1 and 64"),
    ("num_samples", 65, "between 1 and 64"),
    ("image_resolution", 0, "between 64 and 2048"),
    ("image_resolution", 63, "between 64 and 2048"),
    ("image_resolution", -256, "between 64 and 2048"),
    ("image_resolution", 2049, "between 64 and 2048"),
    ("image_resolution", 10**9, "between 64 and 2048"),
    ("ddim_steps", 0, "between 1 and 1000"),
    ("ddim_steps", -20, "between 1 and 1000"),
    ("ddim_steps", 1001, "between 1 and 1000"),
    ("strength", NAN, "finite"),
    ("strength", INF, "finite"),
    ("strength", -0.1, "between 0 and 10"),
    ("strength", 10.5, "between 0 and 10"),
    pytest.param("strength", 10**400, "between 0 and 10", id="strength-beyond-float"),
    ("guidance_scale", NAN, "finite"),
    ("guidance_scale", -INF, "finite"),
    ("guidance_scale", INF, "finite"),
    ("guidance_scale", 101, "between -100 and 100"),
    ("guidance_scale", -101, "between -100 and 100"),
    ("seed", -2, "between -1 and 4294967295"),
    ("seed", 2**32, "between -1 and 4294967295"),
    ("seed", 2**64, "between -1 and 4294967295"),
    ("eta", -0.01, "between 0 and 1"),
    ("eta", 1.01, "between 0 and 1"),
    ("eta", NAN, "finite"),
    ("low_threshold", -1, "between 0 and 255"),
    ("low_threshold", 256, "between 0 and 255"),
    ("high_threshold", 256, "between 0 and 255"),
    ("high_threshold", NAN, "finite"),
]


@pytest.mark.parametrize(("name", "value", "said"), BAD_VALUES)
def test_out_of_range(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {said}"):
        make(**{name: value})


def test_swapped_thresholds() -> None:
    with pytest.raises(ValueError, match="low_threshold 200 is above high_threshold 100; swap"):
        make(low_threshold=200, high_threshold=100)
    assert make(low_threshold=100, high_threshold=100).low_threshold == 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ""),
        ("prompt", "一只鸟 🐦"),
        ("num_samples", 64),
        ("image_resolution", 64),
        ("image_resolution", 250),
        ("image_resolution", 2048),
        ("ddim_steps", 1),
        ("ddim_steps", 1000),
        ("strength", 0),
        ("strength", 10),
        ("guidance_scale", -100),
        ("guidance_scale", 1),
        ("seed", -1),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("eta", 1),
        ("low_threshold", 0),
        ("high_threshold", 255),
    ],
)
def test_ends_of_the_ranges(name: str, value: Any) -> None:
    assert getattr(make(**{name: value}), name) == value


def test_numpy_numbers_become_pythons() -> None:
    request = make(
        num_samples=np.int64(2),
        image_resolution=np.int32(512),
        ddim_steps=np.uint8(20),
        guess_mode=np.bool_(True),
        strength=np.float32(0.5),
        guidance_scale=np.float64(9),
        seed=np.uint32(2**32 - 1),
        eta=np.float16(0.5),
        low_threshold=np.int16(10),
        high_threshold=np.uint8(20),
    )
    for field in dataclasses.fields(request):
        assert type(getattr(request, field.name)) in (str, int, bool, float), field.name
    assert (request.ddim_steps, request.seed, request.strength, request.guess_mode) == (20, 2**32 - 1, 0.5, True)


def test_checkbox_values_of_guess_mode() -> None:
    assert make(guess_mode=1).guess_mode is True
    assert make(guess_mode=0).guess_mode is False
