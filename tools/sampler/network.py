"""The guided noise of many cases at once, in halves and pieces that can be left out one by one."""

from __future__ import annotations

import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from cldm.request import Request
from ldm.attention import Conditioning
from ldm.exact import exact_fp32
from ldm.plans import SamplingPlan
from ldm.schedule import ScheduleConfig
from sampling.trajectory import Levels, Network, Trajectories, record
from tools.sampler.cases import Case
from tools.tiny.sampling import ADDED_PROMPT, NEGATIVE_PROMPT, Sampler

STEPS = 20
# Cases of a CUDA graph, besides those of a full batch.
GRAPH_SIZES = (8, 32, 64, 128)


class CaseNetwork(Sampler):
    """The networks conditioned on a list of cases; latents are flat, (N, D) with D = 4 h w.

    Parameters
    ----------
    cases : sequence of Case
        All of one size.
    others
        As `Sampler`; `batch` cases run at a time.

    Attributes
    ----------
    cases : list of Case
    evaluations : float
        Guided evaluations of one case so far; one half of the guidance alone counts as a half.
    """

    def __init__(self, cases: Sequence[Case], *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.cases = list(cases)
        self.evaluations = 0.0
        self._requests = [
            Request(c.prompt, ADDED_PROMPT, NEGATIVE_PROMPT, seed=c.seed, guidance_scale=c.guidance) for c in cases
        ]
        self._size = self.cases[0].canny.shape
        self._refused = False
        self._graphs: Dict[int, _Captured] = {}
        with torch.no_grad(), exact_fp32():
            parts = range(0, len(self.cases), self.batch)
            prepared = [self._prepare_part(slice(k, k + self.batch)) for k in parts]
        # Every tensor has the cases on its first axis, and a second one of two: conditional, unconditional.
        self._pairs, self._hints, self._scales, self._guidance = (_join(list(group)) for group in zip(*prepared))

    def _prepare_part(self, part: slice) -> Tuple[List[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
        canny = np.stack([case.canny for case in self.cases[part]])
        batch = self._prepare(canny, self._requests[part])
        count = len(canny)

        def paired(tensor: torch.Tensor) -> torch.Tensor:
            return torch.stack([tensor[:count], tensor[count:]], dim=1)

        pairs = [paired(tensor) for network in batch.keys_values for pair in network for tensor in pair]
        return pairs, paired(batch.hint), paired(batch.scales.transpose(0, 1)), batch.guidance

    @property
    def shape(self) -> Tuple[int, int, int]:
        """(4, h, w) of a latent."""
        return self.config.autoencoder.latent_channels, self._size[0] // 8, self._size[1] // 8

    def initial(self) -> np.ndarray:
        """(N, D) float32: each case's first latent, from its seed."""
        return self._noise(self._requests, self._size).reshape(len(self.cases), -1).cpu().numpy()

    def images(self, latents: np.ndarray) -> np.ndarray:
        """(N, D) final latents to (N, H, W, 3) uint8 images."""
        return self.decode(torch.from_numpy(latents.astype(np.float32)).reshape(-1, *self.shape))

    @torch.no_grad()
    @exact_fp32()
    def predict(self, cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        """(N, D) guided noise of some cases at a timestep: a `sampling.trajectory.Network`.

        On a GPU as CUDA graphs, each of a fixed number of cases, which the last ones are filled up to.
        """
        if self.device.type != "cuda" or self._refused:
            cond, uncond, _ = self.halves(cases, timestep, latents)
            return self.guide(cases, cond, uncond)
        numbers = list(cases)
        found = []
        for start in range(0, len(numbers), self.batch):
            part = numbers[start : start + self.batch]
            try:
                graph = self._captured(len(part))
            except RuntimeError as reason:
                print(f"no CUDA graph, and slower without: {reason}", file=sys.stderr, flush=True)
                self._refused = True
                return self.predict(numbers, timestep, latents)
            found.append(graph.run(part, timestep, latents[start : start + self.batch]))
        self.evaluations += len(numbers)
        return np.concatenate(found)

    def _captured(self, count: int) -> _Captured:
        """The graph of the smallest size that holds so many cases."""
        size = min([size for size in GRAPH_SIZES if count <= size < self.batch], default=self.batch)
        if size not in self._graphs:
            self._graphs[size] = _Captured(self, size)
        return self._graphs[size]

    def guided(self, x: torch.Tensor, cases: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(N, 4, h, w) float32 guided noise on the device; N latents of the networks' type, N cases, one timestep."""
        noise, _ = self._networks(torch.cat([x, x]), cases, t, 2, None)
        cond, uncond = noise.chunk(2)
        return uncond + self._guidance[cases] * (cond - uncond)

    def guide(self, cases: Sequence[int], cond: np.ndarray, uncond: np.ndarray) -> np.ndarray:
        """Classifier-free guidance at each case's scale (arXiv:2207.12598, eq. 6)."""
        scales = np.asarray([[self.cases[case].guidance] for case in cases], np.float32)
        return uncond + scales * (cond - uncond)

    @torch.no_grad()
    @exact_fp32()
    def halves(
        self,
        cases: Sequence[int],
        timestep: int,
        latents: np.ndarray,
        conditional_only: bool = False,
        controls: Optional[Sequence[List[torch.Tensor]]] = None,
    ) -> Tuple[np.ndarray, np.ndarray, List[List[torch.Tensor]]]:
        """Both halves of the guidance, and the ControlNet's residuals.

        Parameters
        ----------
        latents : (N, D) float32 array
        conditional_only : bool
            Do not run the unconditional half; an empty array comes in its place.
        controls : what an earlier call with the same cases gave, optional
            Used in place of running the ControlNet.

        Returns
        -------
        cond, uncond : (N, D) float32 arrays
        controls : for each batch a list of residuals
        """
        found: List[np.ndarray] = []
        kept: List[List[torch.Tensor]] = []
        for place, start in enumerate(range(0, len(cases), self.batch)):
            part = list(cases[start : start + self.batch])
            given = None if controls is None else controls[place]
            noise, residuals = self._part(part, timestep, latents[start : start + self.batch], conditional_only, given)
            found.append(noise)
            kept.append(residuals)
        self.evaluations += len(cases) * (0.5 if conditional_only else 1.0)
        both = np.concatenate(found, axis=1)
        return both[0], both[1] if not conditional_only else both[:0], kept

    def _part(
        self,
        cases: List[int],
        timestep: int,
        latents: np.ndarray,
        conditional_only: bool,
        controls: Optional[List[torch.Tensor]],
    ) -> Tuple[np.ndarray, List[torch.Tensor]]:
        """(halves, N, D) noise of one batch, and its residuals."""
        count, halves = len(cases), 1 if conditional_only else 2
        x = torch.from_numpy(np.ascontiguousarray(latents)).to(self.device).reshape(count, *self.shape).to(self.dtype)
        numbers, t = torch.tensor(cases, device=self.device), torch.tensor([timestep], device=self.device)
        noise, controls = self._networks(torch.cat([x] * halves), numbers, t, halves, controls)
        return noise.reshape(halves, count, -1).cpu().numpy(), controls

    def _networks(
        self,
        x: torch.Tensor,
        cases: torch.Tensor,
        t: torch.Tensor,
        halves: int,
        controls: Optional[List[torch.Tensor]],
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """(halves N, 4, h, w) float32 noise and the residuals, with nothing that waits for the device."""

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            chosen = tensor[cases]
            return torch.cat([chosen[:, half] for half in range(halves)])

        for_unet, for_control = self._conditionings([rows(tensor) for tensor in self._pairs], t)
        if controls is None:
            controls = self._cast.control_model.residuals(x, for_control, rows(self._hints))
            scales = rows(self._scales)
            controls = [control * scales[:, i] for i, control in enumerate(controls)]
        used = [control[: len(x)] for control in controls]
        return self._cast.unet.denoise(x, for_unet, used).float(), controls

    def _conditionings(self, tensors: List[torch.Tensor], t: torch.Tensor) -> Tuple[Conditioning, Conditioning]:
        pairs = list(zip(tensors[0::2], tensors[1::2]))
        split = len(self.model.unet.transformer_blocks())
        biases = [
            [bias.to(self.dtype) for bias in network.time_biases(t)]
            for network in (self.model.unet, self.model.control_model)
        ]
        return Conditioning(biases[0], pairs[:split]), Conditioning(biases[1], pairs[split:])


class _Captured:
    """`CaseNetwork.guided` of a fixed number of cases as a CUDA graph."""

    def __init__(self, network: CaseNetwork, size: int) -> None:
        device = network.device
        self._x = torch.zeros((size, *network.shape), device=device)
        self._cases = torch.zeros(size, dtype=torch.long, device=device)
        self._t = torch.zeros(1, dtype=torch.long, device=device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # what libraries set up on a first run must not be captured
                network.guided(self._x.to(network.dtype), self._cases, self._t)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._noise = network.guided(self._x.to(network.dtype), self._cases, self._t)

    def run(self, cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        """(N, D) float32 guided noise, N at most the graph's size."""
        count = len(cases)
        self._x[:count].copy_(
            torch.from_numpy(np.ascontiguousarray(latents, np.float32)).view(count, *self._x.shape[1:])
        )
        self._cases[:count].copy_(torch.tensor(list(cases)))
        self._t.fill_(timestep)
        self._graph.replay()
        return self._noise[:count].reshape(count, -1).cpu().numpy()


def _join(parts: List[Any]) -> Any:
    if isinstance(parts[0], list):
        return [torch.cat(list(group)) for group in zip(*parts)]
    return torch.cat(parts)


def record_all(network: CaseNetwork, levels: Levels) -> Trajectories:
    """The reference of all cases."""
    return record(network.predict, levels, network.initial())


def run_plan(predict: Network, plan: SamplingPlan, initial: np.ndarray) -> np.ndarray:
    """(N, D) final latents of all cases by a plan's rows, in FP32 as in the step graph."""
    numbers = range(len(initial))
    x, last = initial.astype(np.float32), np.zeros_like(initial, np.float32)
    for timestep, (a, b, c) in zip(plan.timesteps, plan.rows.astype(np.float32)):
        noise = predict(numbers, int(timestep), x)
        x, last = a * x + b * noise + c * last, noise
    return x


def run_scheduler(predict: Network, scheduler: Any, evaluations: int, initial: np.ndarray) -> np.ndarray:
    """(N, D) final latents of all cases by a scheduler of diffusers, as it is."""
    scheduler.set_timesteps(evaluations)
    if len(scheduler.timesteps) != evaluations:
        raise ValueError(f"{type(scheduler).__name__} takes {len(scheduler.timesteps)} steps, not {evaluations}")
    numbers = range(len(initial))
    x = torch.from_numpy(initial.astype(np.float32)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        noise = torch.from_numpy(predict(numbers, int(timestep), scaled.numpy()))
        x = scheduler.step(noise, timestep, x).prev_sample
    return x.numpy()


def relative_errors(latents: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(N,) relative errors of (N, D) latents."""
    difference = latents.astype(np.float64) - target
    return np.linalg.norm(difference, axis=1) / np.linalg.norm(target.astype(np.float64), axis=1)


def reference_levels(config: ScheduleConfig) -> Levels:
    """The schedule that all of the study follows."""
    return Levels(config, STEPS)
