"""The score's loop: every picture painted, timed, and compared with what the original algorithm makes of it."""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Protocol, Sequence, Tuple

import numpy as np

from cldm.request import Request
from cldm.result import Result
from scoring.measures import LATENCY, Comparer
from scoring.pictures import Picture
from scoring.reference_cache import Reference, ReferenceCache, reference_key
from scoring.sheet import SheetRow

# The arguments that the contest's scorer calls `process` with.
CONTEST_REQUEST = Request(
    prompt="a bird",
    added_prompt="best quality, extremely detailed",
    negative_prompt="longbody, lowres, bad anatomy, bad hands, missing fingers",
    num_samples=1,
    image_resolution=256,
    ddim_steps=20,
    guess_mode=False,
    strength=1,
    guidance_scale=9,
    seed=2946901,
    eta=0.0,
    low_threshold=100,
    high_threshold=200,
)


class Pipeline(Protocol):
    """What is scored; `canny2image_TRT.hackathon` is one."""

    weights_digest: str

    def token_digest(self, request: Request) -> str: ...

    def process(self, *arguments: Any) -> List[np.ndarray]: ...

    def run(self, image: np.ndarray, request: Request) -> Result: ...

    def reference(self, image: np.ndarray, request: Request) -> Result: ...


@dataclass(frozen=True)
class ScoreOptions:
    """How to score.

    Attributes
    ----------
    request : Request
        One image a picture, from a seed that is given: an image of another seed has nothing to compare with.
    warmup : int
        Untimed calls of `process` before the first timed one. Each picture also has one of `run`.
    repeats : int
        Timed calls a picture; its latency is their median.
    reference : bool
        Make or read reference images and compare with them; without, only latency is measured.
    noise_floor : bool
        Make every reference twice, and compare the two.

    Raises
    ------
    ValueError
        A number out of range, or a noise floor without references.
    """

    request: Request = CONTEST_REQUEST
    warmup: int = 1
    repeats: int = 1
    reference: bool = True
    noise_floor: bool = False

    def __post_init__(self) -> None:
        if self.request.num_samples != 1:
            raise ValueError(f"the score compares one image a picture, not num_samples {self.request.num_samples}")
        if self.request.seed < 0:
            raise ValueError("the score needs a fixed seed of 0 .. 2**32 - 1: its reference is made from the same one")
        if self.warmup < 0:
            raise ValueError(f"warmup must be 0 or more, got {self.warmup}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be 1 or more, got {self.repeats}")
        if self.noise_floor and not self.reference:
            raise ValueError("the noise floor compares reference with reference, so it cannot go without them")


@dataclass(frozen=True)
class PictureScore:
    """What was measured on one picture.

    Attributes
    ----------
    name, digest : str
        File name, and SHA-256 of its bytes.
    latencies_ms : list of float
        Each timed call of `process`.
    values : dict of str to float
        Measures by key; those that could not be taken are not in it.
    floor : dict of str to float or None
        The same measures of reference against reference.
    receipt, reference_receipt : dict
        What ran; the latter None without a reference.
    reference_cached : bool
    warnings : tuple of str
    """

    name: str
    digest: str
    latencies_ms: List[float]
    values: Dict[str, float]
    floor: Optional[Dict[str, float]]
    receipt: Dict[str, Any]
    reference_receipt: Optional[Dict[str, Any]] = None
    reference_cached: bool = False
    warnings: Tuple[str, ...] = ()


@dataclass
class Score:
    """All pictures' scores, and what the report needs beside them.

    Attributes
    ----------
    sheet : list of SheetRow
        Images of the first pictures only.
    seconds : float
        Wall time of the whole loop, warm-up and references included.
    """

    options: ScoreOptions
    not_measured: Dict[str, str]
    pictures: List[PictureScore] = field(default_factory=list)
    sheet: List[SheetRow] = field(default_factory=list)
    seconds: float = 0.0


def process_arguments(request: Request) -> Tuple[Any, ...]:
    """A request as the arguments of `process` after the picture, in their order."""
    return (
        request.prompt,
        request.added_prompt,
        request.negative_prompt,
        request.num_samples,
        request.image_resolution,
        request.ddim_steps,
        request.guess_mode,
        request.strength,
        request.guidance_scale,
        request.seed,
        request.eta,
        request.low_threshold,
        request.high_threshold,
    )


@contextlib.contextmanager
def naming(picture: Picture) -> Iterator[None]:
    """Say of which picture an error is; the original one stays its cause."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise RuntimeError(f"{picture.path}: {error}") from error


class Runner:
    """Scores a pipeline over pictures.

    Parameters
    ----------
    pipeline : Pipeline
        Initialised.
    comparer : Comparer
    options : ScoreOptions
    cache : ReferenceCache
    """

    def __init__(self, pipeline: Pipeline, comparer: Comparer, options: ScoreOptions, cache: ReferenceCache) -> None:
        self.pipeline = pipeline
        self.comparer = comparer
        self.options = options
        self.cache = cache
        self._arguments = process_arguments(options.request)

    def warm_up(self, picture: Picture) -> Result:
        """Run everything that will be timed, untimed, and return a result whose receipt says what runs."""
        with naming(picture):
            image = picture.read()
            for _ in range(self.options.warmup):
                self.pipeline.process(image, *self._arguments)
            return self.pipeline.run(image, self.options.request)

    def run(self, pictures: Sequence[Picture], num_sheet_rows: int, progress: Callable[[str, str], None]) -> Score:
        """Score the pictures in their order.

        Parameters
        ----------
        num_sheet_rows : int
            Keep the images of the first so many.
        progress : callable
            Called with a picture's name and what is being done with it; with "done" at its end.

        Raises
        ------
        RuntimeError
            A picture could not be painted; the message names it.
        """
        start = time.perf_counter()
        not_measured = self.comparer.not_measured if self.options.reference else {}
        score = Score(self.options, dict(not_measured))
        for picture in pictures:
            with naming(picture):
                entry, row = self._score_picture(picture, progress)
            score.pictures.append(entry)
            if len(score.sheet) < num_sheet_rows:
                score.sheet.append(row)
            progress(picture.name, "done")
        score.seconds = time.perf_counter() - start
        return score

    def _score_picture(self, picture: Picture, progress: Callable[[str, str], None]) -> Tuple[PictureScore, SheetRow]:
        image = picture.read()
        progress(picture.name, "painting")
        # Untimed: it gives what process does not return, and warms up for this picture's size.
        result = self.pipeline.run(image, self.options.request)
        painted, latencies, warnings = self._time(image)
        if not np.array_equal(painted, result.images[0]):
            warnings.append("process and run made different images; the latent error is run's")
        warnings.extend(result.receipt.warnings)
        values = {LATENCY.key: statistics.median(latencies)}
        floor: Optional[Dict[str, float]] = None
        reference: Optional[Reference] = None
        if self.options.reference:
            progress(picture.name, "reference")
            reference = self.reference(picture, image, result.receipt.device, warnings)
            values.update(self.comparer.compare(painted, reference.image, result.latent, reference.latent))
            if self.options.noise_floor:
                progress(picture.name, "reference again")
                again = self._make_reference(image)
                floor = self.comparer.compare(again.image, reference.image, again.latent, reference.latent)
        entry = PictureScore(
            name=picture.name,
            digest=picture.digest,
            latencies_ms=latencies,
            values=values,
            floor=floor,
            receipt=result.receipt.to_dict(),
            reference_receipt=reference.receipt if reference is not None else None,
            reference_cached=reference is not None and reference.cached,
            warnings=tuple(warnings),
        )
        reference_image = reference.image if reference is not None else None
        return entry, SheetRow(picture.name, image, result.canny, reference_image, painted, values.get("pd"))

    def _time(self, image: np.ndarray) -> Tuple[np.ndarray, List[float], List[str]]:
        """The image of the first timed call, all latencies, and a warning where a later call gave another image."""
        latencies: List[float] = []
        images: List[np.ndarray] = []
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            output = self.pipeline.process(image, *self._arguments)
            latencies.append(1e3 * (time.perf_counter() - start))
            images.append(output[0])
        same = all(np.array_equal(images[0], other) for other in images[1:])
        return images[0], latencies, [] if same else ["repeated calls of process made different images"]

    def _make_reference(self, image: np.ndarray) -> Reference:
        return Reference.from_result(self.pipeline.reference(image, self.options.request))

    def reference(self, picture: Picture, image: np.ndarray, device: str, warnings: List[str]) -> Reference:
        """The cached reference, or one made now and cached; for the noise floor it is always made.

        Parameters
        ----------
        device : str
            Of the run that it will be compared with.
        warnings : list of str
            A line is added where the reference could not be cached.
        """
        request = self.options.request
        tokens = self.pipeline.token_digest(request)
        key = reference_key(picture.digest, request, self.pipeline.weights_digest, tokens, device)
        cached = None if self.options.noise_floor else self.cache.load(key)
        if cached is not None:
            return cached
        reference = self._make_reference(image)
        try:
            self.cache.store(key, reference)
        except OSError as error:  # the disk filled up meanwhile: what was measured still counts
            warnings.append(f"the reference was not cached: {error}")
        return reference
