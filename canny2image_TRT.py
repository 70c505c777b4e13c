"""The contest's entry: `hackathon().initialize()` once, then `process(...)` for each picture."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple, Union

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:  # the repository's packages lie beside this file, wherever it is imported from
    sys.path.insert(0, str(ROOT))

from cldm.image import target_size, to_three_channels  # noqa: E402
from cldm.request import Request  # noqa: E402
from cldm.result import Result  # noqa: E402
from ldm.plans import SamplingPlan  # noqa: E402

# The contest's pictures.
HEIGHT, WIDTH = 256, 384
# Of a model this wide only one picture size is kept ready at a time: SD1.5's graphs hold gigabytes each.
LARGE_MODEL_CHANNELS = 256

Progress = Callable[[int, int], None]


def _say(line: str) -> None:
    print(f"canny2image: {line}", file=sys.stderr, flush=True)


class hackathon:
    """ControlNet (canny) on Stable Diffusion 1.5.

    `initialize` also takes model, backend, precision, device, checkpoint, build_dir, speed and cuda_graph from the
    environment, as HACKATHON_MODEL, HACKATHON_BACKEND, HACKATHON_PRECISION, HACKATHON_DEVICE, HACKATHON_CHECKPOINT,
    HACKATHON_BUILD_DIR, HACKATHON_SPEED and HACKATHON_CUDA_GRAPH (0 or 1); an argument wins. Calls from several threads
    take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._model: Callable[[], Any] = lambda: None  # a weak reference, once there is one
        self._backend: Any = None
        self._pipelines: OrderedDict[Tuple[int, int], Any] = OrderedDict()
        self._reference: Any = None
        self._planner: Any = None
        self._cuda_graph = True

    def initialize(
        self,
        model: Optional[str] = None,
        backend: Optional[str] = None,
        precision: Optional[str] = None,
        device: Optional[str] = None,
        build_dir: Optional[str] = None,
        checkpoint: Optional[str] = None,
        random_weights: Optional[int] = None,
        samples: int = 1,
        export: bool = True,
        height: int = HEIGHT,
        width: int = WIDTH,
        speed: Union[str, int, None] = None,
        cuda_graph: Optional[bool] = None,
    ) -> None:
        """Choose model and backend, say which and why, and make everything for pictures of the given size ready.

        Parameters
        ----------
        model : str, optional
            "sd15", "tiny" or the path of a config; default sd15 where its checkpoint lies under models/, else tiny.
        backend : {"tensorrt", "torch", "onnxruntime"}, optional
            Default: the first that can run here.
        precision : {"fp32", "fp16", "bf16", "fp8"}, optional
            Default: FP16 on a GPU, FP32 on a CPU. FP8 is for the torch backend on a GPU of compute capability 8.9 or
            later; only the large products use it, and it costs accuracy.
        device : str, optional
            "cpu", "cuda", "cuda:1", ... for the tensorrt and torch backends.
        build_dir : str, optional
            Where made files are kept; default build/ beside this file.
        checkpoint : str, optional
            Weights other than those under models/.
        random_weights : int, optional
            Seeded random weights instead of any checkpoint.
        samples : int
            Images that one run of the graphs makes; more are made in several runs.
        export : bool
            Let the onnxruntime backend export what it lacks; False raises instead.
        height, width : int
            Size that is made ready; other sizes are on their first picture.
        speed : str or int, optional
            How many of a request's steps are evaluated: "exact" (all, the default), a number such as "7", or a measure
            and a budget such as "pd:5"; see `runtime.speed`. The receipt says what ran.

        cuda_graph : bool, optional
            Launch a whole image as one CUDA graph where the backend is on a GPU; default True. Calls with a progress
            callback do without.

        Raises
        ------
        FileNotFoundError, ValueError, BackendError, ArtefactError, TensorRTError, OSError
            What is missing or does not fit, and what to do.
        """
        from runtime.speed import parse_speed

        chosen_speed = parse_speed(speed if speed is not None else os.environ.get("HACKATHON_SPEED"))
        with self._lock:
            self.close()
            self._cuda_graph = os.environ.get("HACKATHON_CUDA_GRAPH") != "0" if cuda_graph is None else cuda_graph
            size = (height, width)
            self._choose(
                model, backend, precision, device, build_dir, checkpoint, random_weights, samples, export, size
            )
            _say(self.summary)
            try:
                self._plan_at(chosen_speed)
                self._pipeline(height, width).prepare(self._planner.plan(Request("")))
            except BaseException:
                self.close()  # half ready is not ready
                raise

    def _choose(
        self,
        model: Optional[str],
        backend: Optional[str],
        precision: Optional[str],
        device: Optional[str],
        build_dir: Optional[str],
        checkpoint: Optional[str],
        random_weights: Optional[int],
        samples: int,
        export: bool,
        size: Tuple[int, int],
    ) -> None:
        """Settle what `initialize` was asked or left to find out; loads no weights yet."""
        from cldm.tokenizer import find_tokenizer
        from cldm.weights import find_weights
        from deploy.spec import Build
        from runtime.backends import BackendError, choose_backend
        from runtime.choose import choose_model

        if checkpoint is None and random_weights is None:
            checkpoint = os.environ.get("HACKATHON_CHECKPOINT") or None
        self._folder = Path(build_dir or os.environ.get("HACKATHON_BUILD_DIR") or ROOT / "build")
        self._config = choose_model(model or os.environ.get("HACKATHON_MODEL"), checkpoint)
        self._weights = find_weights(self._config, checkpoint, random_weights, self._folder / ".hashes.json")
        self._samples = samples
        self._tokenizer = find_tokenizer(self._config, self._weights, _say)
        precision = precision or os.environ.get("HACKATHON_PRECISION")
        chosen, self._reason = choose_backend(
            backend or os.environ.get("HACKATHON_BACKEND"),
            device or os.environ.get("HACKATHON_DEVICE"),
            self._weights,
            self._load_model,
            self._folder,
            export,
            _say,
            lambda preferred: Build(self._config, *size, samples, precision or preferred),
        )
        self._precision = precision or chosen.precisions[0]
        if self._precision not in chosen.precisions:
            known = ", ".join(chosen.precisions)
            raise BackendError(f"{chosen.name} on {chosen.device} runs {known}, not {self._precision!r}")
        self._backend = chosen

    def _plan_at(self, speed: Any) -> None:
        """Plan requests at a speed from now on, and say what it comes to for the contest's."""
        from runtime.speed import Planner

        self._planner = Planner(
            speed, self._config, self._weights, self._folder, self._backend.name, self._precision, _say
        )
        self._planner.plan(Request(""))

    @property
    def summary(self) -> str:
        """One line: what runs, where, on which weights, and why."""
        self._need_initialize()
        return (
            f"model {self._config.name} ({self._weights}), backend {self._backend.name} on {self._backend.device}"
            f" in {self._precision} ({self._reason})"
        )

    @property
    def weights_digest(self) -> str:
        """Hash of the networks' shapes and weights."""
        self._need_initialize()
        return self._weights.digest

    def process(
        self,
        input_image: Any,
        prompt: str,
        a_prompt: str,
        n_prompt: str,
        num_samples: int,
        image_resolution: int,
        ddim_steps: int,
        guess_mode: bool,
        strength: float,
        scale: float,
        seed: int,
        eta: float,
        low_threshold: float,
        high_threshold: float,
    ) -> List[Any]:
        """The contest's call.

        Parameters
        ----------
        input_image : H x W x {1, 3, 4} uint8 array
            As cv2.imread gives it; channels are taken as they come.
        others
            As in `cldm.request.Request`, whose errors it raises; `scale` is the guidance scale.

        Returns
        -------
        list of `num_samples` arrays, H' x W' x 3 uint8
        """
        request = Request(
            prompt=prompt,
            added_prompt=a_prompt,
            negative_prompt=n_prompt,
            num_samples=num_samples,
            image_resolution=image_resolution,
            ddim_steps=ddim_steps,
            guess_mode=guess_mode,
            strength=strength,
            guidance_scale=scale,
            seed=seed,
            eta=eta,
            low_threshold=low_threshold,
            high_threshold=high_threshold,
        )
        return self.run(input_image, request).images

    def generate(
        self,
        image: Any,
        prompt: str,
        *,
        added_prompt: str = "",
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        image_resolution: int = 256,
        num_inference_steps: int = 20,
        guess_mode: bool = False,
        controlnet_conditioning_scale: float = 1.0,
        guidance_scale: float = 9.0,
        seed: int = -1,
        eta: float = 0.0,
        low_threshold: float = 100,
        high_threshold: float = 200,
        latents: Optional[Any] = None,
        progress: Optional[Progress] = None,
    ) -> Result:
        """`process` for Python users: keywords, and a result that tells what ran.

        Parameters
        ----------
        image : H x W x {1, 3, 4} uint8 array
        latents : (N, 4, H'/8, W'/8) array, optional
            Initial noise in place of the seed's.
        progress : callable, optional
            Called with (evaluations done, evaluations) after each.
        others
            As in `cldm.request.Request`, whose errors it raises. Named as in diffusers where the meaning is the same:
            num_images_per_prompt is num_samples, num_inference_steps ddim_steps, controlnet_conditioning_scale
            strength.

        Returns
        -------
        Result
            Images, canny map, final latent and receipt.
        """
        request = Request(
            prompt=prompt,
            added_prompt=added_prompt,
            negative_prompt=negative_prompt,
            num_samples=num_images_per_prompt,
            image_resolution=image_resolution,
            ddim_steps=num_inference_steps,
            guess_mode=guess_mode,
            strength=controlnet_conditioning_scale,
            guidance_scale=guidance_scale,
            seed=seed,
            eta=eta,
            low_threshold=low_threshold,
            high_threshold=high_threshold,
        )
        return self.run(image, request, latents, progress)

    def run(
        self,
        image: Any,
        request: Request,
        latents: Optional[Any] = None,
        progress: Optional[Progress] = None,
        plan: Optional[SamplingPlan] = None,
    ) -> Result:
        """`generate` with its arguments in a `Request`; a `plan` is run in place of what the speed comes to."""
        # Sizes first: a picture that cannot be used must not cost the making of graphs.
        image = to_three_channels(image)
        height, width = target_size(*image.shape[:2], request.image_resolution)
        with self._lock:
            self._need_initialize()
            chosen = self._planner.plan(request) if plan is None else plan
            return self._pipeline(height, width).generate(image, request, latents, progress, chosen)

    def plans(self, request: Request) -> List[SamplingPlan]:
        """The plans that speeds can give a request, fewest evaluations first; the last is exact."""
        with self._lock:
            self._need_initialize()
            return self._planner.choices(request)

    def reference(
        self, image: Any, request: Request, latents: Optional[Any] = None, progress: Optional[Progress] = None
    ) -> Result:
        """`run` by the original algorithm: PyTorch in FP32, on the backend's device."""
        from cldm.reference import Reference

        with self._lock:
            self._need_initialize()
            if self._reference is None:
                model = self._load_model()
                self._reference = Reference(model, self._tokenizer, str(self._weights), self._backend.device)
            return self._reference.generate(image, request, latents, progress)

    def token_digest(self, request: Request) -> str:
        """Hash of the token ids of a request's texts: what the vocabulary at hand makes of them."""
        self._need_initialize()
        ids, _ = self._tokenizer([request.conditional_text, request.negative_prompt])
        return hashlib.sha256(ids.tobytes()).hexdigest()[:16]

    def close(self) -> None:
        """Free everything; `initialize` may be called again."""
        with self._lock:
            pipelines, backend = list(self._pipelines.values()), self._backend
            self._pipelines.clear()
            self._backend = self._reference = None
            self._model = lambda: None
            with contextlib.ExitStack() as stack:  # the last goes first, and each also where another fails
                if backend is not None:
                    stack.callback(backend.close)
                for pipeline in pipelines:
                    stack.callback(pipeline.close)

    def _pipeline(self, height: int, width: int) -> Any:
        """The pipeline of a picture size, made on its first use; the least recently used goes."""
        from deploy.spec import Build
        from runtime.pipeline import About, Pipeline

        found = self._pipelines.pop((height, width), None)
        if found is None:
            kept = 1 if self._config.unet.model_channels >= LARGE_MODEL_CHANNELS else 3
            while len(self._pipelines) >= kept:
                self._pipelines.popitem(last=False)[1].close()
            build = Build(self._config, height, width, self._samples, self._precision)
            about = About(str(self._weights), self._backend.name, self._reason)
            graphs = self._backend.graphs() if self._cuda_graph else None
            sessions = self._backend.sessions(build)
            found = Pipeline(build, sessions, self._tokenizer, about, self._backend.device, graphs)
        self._pipelines[height, width] = found
        return found

    def _load_model(self) -> Any:
        """The model in FP32; one that something still holds is not loaded again."""
        from cldm.checkpoint import load_model

        model = self._model()
        if model is None:
            model = load_model(self._config, self._weights)
            self._model = weakref.ref(model)
        return model

    def _need_initialize(self) -> None:
        if self._backend is None:
            raise RuntimeError("call initialize() first")
