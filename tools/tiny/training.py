"""What the stages of training have in common: the optimiser's loop, its averages, and saved states."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from torch import nn

from cldm.files import atomic_path

log = logging.getLogger(__name__)

LOG_EVERY = 100
SAVE_SECONDS = 90.0


@dataclass(frozen=True)
class StageSettings:
    """How one stage is trained.

    Attributes
    ----------
    steps, batch : int
    learning_rate : float
        Peak of a linear warm-up followed by a cosine to a twentieth.
    warmup : int
        Steps.
    ema : float
        Decay of the weights' moving average, reached as (1 + step) / (10 + step) grows.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 300
    ema: float = 0.999


class Stopped(Exception):
    """The time given was used up; the state is saved and the same command goes on from it."""


def learning_rate(settings: StageSettings, step: int) -> float:
    """Learning rate of a step, 0 .. steps - 1."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * done))))
    return settings.learning_rate * (0.05 + 0.95 * cosine)


def seed_for(*parts: Any) -> int:
    """A 63-bit seed from anything that can be printed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Trainer:
    """AdamW with a moving average of the weights, restartable at any step.

    Random numbers of a step come from a generator seeded with the stage, the seed and the step, so a run that was
    stopped and went on draws what an unbroken one draws.

    Parameters
    ----------
    name : str
        Stage; names the saved state.
    modules : mapping of str to Module
        What is trained, by the prefix that its weights have in the checkpoint.
    folder : Path
        Where the state is saved.
    extra : mapping of str to anything with state_dict and load_state_dict, optional
        Saved along.
    identity : str
        What the run is of, seed and settings; a state saved by another run is refused.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        settings: StageSettings,
        folder: Path,
        seed: int,
        device: str,
        extra: Optional[Mapping[str, Any]] = None,
        identity: str = "",
    ) -> None:
        self.identity = identity
        self.name, self.settings, self.seed = name, settings, seed
        self.path = folder / f"{name}.state.pt"
        self.extra = dict(extra or {})
        self.parameters = {
            f"{prefix}.{key}": p.requires_grad_(True)
            for prefix, m in modules.items()
            for key, p in m.named_parameters()
        }
        decayed = [p for p in self.parameters.values() if p.dim() > 1]
        others = [p for p in self.parameters.values() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            fused=device.startswith("cuda"),
        )
        self.average = [p.detach().clone() for p in self.parameters.values()]
        self.generator = torch.Generator(device=device)
        self.step = 0
        self.seconds = 0.0
        if self.path.is_file():
            self._load(device)

    def _load(self, device: str) -> None:
        state = torch.load(str(self.path), map_location=device, weights_only=True)
        if list(state["parameters"]) != list(self.parameters):
            raise ValueError(f"{self.path} was saved by another model; remove it to begin the stage anew")
        if state["identity"] != self.identity:
            raise ValueError(
                f"{self.path} was saved by a run of {state['identity']}, and this one is of {self.identity}; give the"
                " same arguments, or remove it to begin the stage anew"
            )
        with torch.no_grad():
            for name, value in state["parameters"].items():
                self.parameters[name].copy_(value)
        self.average = [value.to(device) for value in state["average"]]
        self.optimizer.load_state_dict(state["optimizer"])
        for name, part in self.extra.items():
            part.load_state_dict(state["extra"][name])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        log.info("%s: goes on at step %d of %d", self.name, self.step, self.settings.steps)

    def save(self) -> None:
        """Write the whole state, so that a new process goes on from here."""
        state = {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "extra": {name: part.state_dict() for name, part in self.extra.items()},
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, str(temporary))

    def run(self, backward: Callable[[torch.Generator, int], Dict[str, torch.Tensor]], stop_at: float) -> None:
        """Take the remaining steps.

        Parameters
        ----------
        backward : callable
            Called with the step's generator and its number; leaves gradients and returns figures to log.
        stop_at : float
            `time.monotonic()` at which to save and raise `Stopped`.

        Raises
        ------
        Stopped
        FloatingPointError
            A figure is not finite.
        """
        sums: Dict[str, torch.Tensor] = {}
        begin = last_save = time.monotonic()
        before = self.seconds
        parameters = list(self.parameters.values())
        while self.step < self.settings.steps:
            self.generator.manual_seed(seed_for(self.name, self.seed, self.step))
            rate = learning_rate(self.settings, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            figures = backward(self.generator, self.step)
            figures["gradient"] = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in parameters], 1.0 - decay)
            self.step += 1
            for key, value in figures.items():
                sums[key] = sums[key] + value.detach() if key in sums else value.detach().clone()
            if self.step % LOG_EVERY == 0 or self.step == self.settings.steps:
                self._report(sums, (self.step - 1) % LOG_EVERY + 1)
                sums = {}
                now = time.monotonic()
                self.seconds = before + now - begin
                if now > stop_at and self.step < self.settings.steps:
                    self.save()
                    raise Stopped(f"{self.name}: stopped at step {self.step} of {self.settings.steps}, state saved")
                if now - last_save > SAVE_SECONDS:
                    self.save()
                    last_save = now

    def _report(self, sums: Mapping[str, torch.Tensor], count: int) -> None:
        means = {key: float(value) / count for key, value in sums.items()}
        bad = [key for key, value in means.items() if value != value or abs(value) == float("inf")]
        if bad:
            raise FloatingPointError(f"{self.name}: {', '.join(bad)} not finite near step {self.step}")
        figures = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
        log.info("%s %d/%d  %s  (%.0f s)", self.name, self.step, self.settings.steps, figures, self.seconds)

    def use_average(self) -> None:
        """Put the moving average into the modules, for good."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters.values(), self.average):
                parameter.copy_(value)
                parameter.requires_grad_(False)


Step = Callable[[torch.Generator, int], Dict[str, torch.Tensor]]

# How far a BF16 gradient may be from the FP32 one, as a share of its norm: of all parameters together, and of each
# that carries at least a hundredth of the norm. BF16 itself costs 1 to 8 %.
WHOLE_TOLERANCE = 0.1
SINGLE_TOLERANCE = 0.5


def gradients(step: Step, trainer: Trainer) -> Dict[str, torch.Tensor]:
    """The gradients that a step leaves at the present weights; none are left behind."""
    trainer.generator.manual_seed(seed_for("gradients", trainer.name))
    step(trainer.generator, 0)
    found = {name: p.grad.float() for name, p in trainer.parameters.items() if p.grad is not None}
    for parameter in trainer.parameters.values():
        parameter.grad = None
    return found


def gradient_error(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> Tuple[float, float, str]:
    """Relative error of all gradients, the largest of a single parameter that matters, and that parameter's name."""
    total = float(torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt())
    worst, name = 0.0, ""
    square = 0.0
    for key, value in wanted.items():
        difference, norm = float((found[key] - value).norm()), max(float(value.norm()), 0.01 * total)
        if not math.isfinite(difference):
            return math.inf, math.inf, key
        square += difference**2
        if difference > worst * norm:
            worst, name = difference / norm, key
    return square**0.5 / total, worst, name


def choose_step(reference: Step, candidates: Mapping[str, Step], trainer: Trainer) -> Step:
    """The first candidate whose gradients are those of the FP32 reference.

    A compiler's mistake in one backward kernel does not stop a training: it spoils it, unseen, under a loss that
    falls. The comparison is made at weights moved away from their start, where zeroed layers would hide what is
    behind them; the weights are put back.

    Raises
    ------
    RuntimeError
        No candidate is within the tolerances.
    """
    # From torch 2.3 on; the rest of this module needs no more than 2.0.
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = list(trainer.parameters.values())
    before = [p.detach().clone() for p in parameters]
    generator = torch.Generator(device=parameters[0].device).manual_seed(seed_for("moved"))
    with torch.no_grad():
        for p in parameters:
            p.add_(0.03 * torch.randn(p.shape, generator=generator, device=p.device))
    try:
        with sdpa_kernel(SDPBackend.MATH):
            wanted = gradients(reference, trainer)
        for name, step in candidates.items():
            whole, single, where = gradient_error(gradients(step, trainer), wanted)
            log.info(
                "%s: %s gradients off by %.1f %%, by %.1f %% in %s",
                trainer.name,
                name,
                100 * whole,
                100 * single,
                where,
            )
            if whole <= WHOLE_TOLERANCE and single <= SINGLE_TOLERANCE:
                return step
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before):
                p.copy_(value)
    raise RuntimeError(f"{trainer.name}: no way to run a step gives the gradients of FP32; see the lines above")


def round_to_half(modules: List[nn.Module]) -> None:
    """Round weights to what FP16 can hold, so that what follows is trained and measured on what is shipped."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.half().float())
