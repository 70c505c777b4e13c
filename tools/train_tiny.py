#!/usr/bin/env python3
"""Train models/tiny.safetensors from nothing: scenes drawn here, no pretrained weight, one GPU.

    python3 tools/build_vocabulary.py     # once, from the scenes' captions
    python3 tools/train_tiny.py           # scenes, autoencoder, UNet with text encoder, ControlNet; then the file

Stages that are done are skipped, and a stage that was stopped (--stop-after, Ctrl-C, a kill) goes on from its last
saved state; with other arguments it is refused. Everything lies under build/tiny_training: the scenes take 18 GB there,
and as much memory of the machine and of the GPU. `tools/measure_tiny.py --weights` measures what came out; to use it,
put it at models/tiny.safetensors.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

log = logging.getLogger("train_tiny")

STAGES = ("autoencoder", "unet", "control")
HELD_OUT = 250


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="default: all, in this order: %(default)s")
    parser.add_argument("--scenes", type=int, default=60_000, help="training scenes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "tiny_training", help="scenes and states")
    parser.add_argument("--output", type=Path, help="default: tiny.safetensors in the folder")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="save and end then")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile: slower steps, no waiting")
    parser.add_argument("--lock-unet", action="store_true", help="train the ControlNet alone, as its paper does")
    for stage, (steps, batch, rate) in {
        "autoencoder": (4_200, 48, 1e-3),
        "unet": (6_500, 512, 1e-3),
        "control": (3_300, 256, 8e-4),
    }.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=steps, help="default %(default)s")
        parser.add_argument(f"--{stage}-batch", type=int, default=batch, help="default %(default)s")
        parser.add_argument(f"--{stage}-rate", type=float, default=rate, help="learning rate, default %(default)s")
    args = parser.parse_args(argv)
    args.output = args.output or args.folder / "tiny.safetensors"
    args.stages = args.stages.split(",")
    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"--stages: {', '.join(unknown)} unknown; there are {', '.join(STAGES)}")
    return args


class Run:
    """The model under training and what its stages share."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from cldm.config import load_config
        from cldm.model import ControlLDM
        from cldm.tokenizer import Tokenizer
        from tools.tiny.store import check_scenes, load_scenes

        self.args = args
        self.stop_at = time.monotonic() + args.stop_after
        self.config = load_config("tiny")
        self.amp = args.device.startswith("cuda")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(args.seed)
        self.model = ControlLDM(self.config).requires_grad_(False)
        self.model.to(args.device, memory_format=torch.channels_last)
        empty, _ = Tokenizer(self.config)([""])
        self.empty = torch.from_numpy(empty[0]).to(args.device).short()
        self.scenes = load_scenes(args.folder / "scenes", args.scenes)
        self.held_out = load_scenes(args.folder / "scenes", HELD_OUT, split="test")
        self.images = torch.from_numpy(self.scenes.images).to(args.device)
        check_scenes(self.scenes, self.images)
        self._latents: Any = None

    def identity(self, stage: str) -> str:
        """What a stage's result depends on beside the code, as one line of JSON."""
        from cldm.files import sha256

        place = STAGES.index(stage)
        what = {name: getattr(self.args, f"{stage}_{name}") for name in ("steps", "batch", "rate")}
        what.update(seed=self.args.seed, scenes=self.args.scenes, model=self.config.digest())
        if stage == "control":
            what["locked"] = self.args.lock_unet
        if place > 0:
            what["after"] = sha256(self.result(STAGES[place - 1]))
        return json.dumps(what, sort_keys=True)

    def result(self, stage: str) -> Path:
        return self.args.folder / f"{stage}.safetensors"

    def settings(self, stage: str) -> Any:
        from tools.tiny.training import StageSettings

        steps, batch, rate = (getattr(self.args, f"{stage}_{what}") for what in ("steps", "batch", "rate"))
        return StageSettings(steps, batch, rate, warmup=min(300, max(1, steps // 10)))

    def candidates(self, make: Callable[[bool, bool], Any]) -> Dict[str, Any]:
        """Ways to run a stage's step, the fastest first."""
        ways = {} if self.args.no_compile else {"compiled": make(True, self.amp)}
        return {**ways, "eager": make(False, self.amp)}

    def latents(self) -> Any:
        """Posteriors of the training scenes under the finished autoencoder."""
        from tools.tiny.train_diffusion import check_latents, encode_scenes

        if self._latents is None:
            self._latents = encode_scenes(self.model.first_stage_model, self.images, self.scenes, self.amp)
            check_latents(self._latents, self.model.first_stage_model, self.scenes)
            self.images = self.images.new_empty(0)  # lets go of the pictures: a slice would hold on to them all
        return self._latents

    def finish(self, stage: str, modules: Dict[str, Any]) -> None:
        """Round the stage's modules to FP16 and write all that is trained so far."""
        from safetensors.torch import save_file

        from cldm.files import atomic_path
        from tools.tiny.training import round_to_half

        round_to_half(list(modules.values()))
        weights = {name: p.detach().half().cpu().contiguous() for name, p in self.model.named_parameters()}
        notes = {"stage": stage, "seed": str(self.args.seed), "model": self.config.digest()}
        notes["training"] = self.identity(stage)
        with atomic_path(self.result(stage)) as temporary:
            save_file(weights, str(temporary), metadata=notes)
        log.info("%s: wrote %s", stage, self.result(stage))

    def restore(self, stage: str) -> None:
        """Take the weights of a finished stage.

        Raises
        ------
        ValueError
            It was trained with another configuration of the model, other settings, or on top of another result.
        """
        import torch
        from safetensors import safe_open

        path = self.result(stage)
        with safe_open(str(path), framework="pt") as file, torch.no_grad():
            if (file.metadata() or {}).get("model") != self.config.digest():
                raise ValueError(f"{path} was trained with another models/tiny.yaml; remove it or use another --folder")
            if file.metadata().get("training") != self.identity(stage):
                other = file.metadata().get("training")
                raise ValueError(
                    f"{path} is of {other}, and this run of {self.identity(stage)}; give the same arguments, remove it"
                    " and the stages after it, or use another --folder"
                )
            for name, parameter in self.model.named_parameters():
                parameter.copy_(file.get_tensor(name))
        log.info("%s: done before, %s", stage, path)


def train_autoencoder(run: Run) -> None:
    import torch

    from tools.tiny import train_autoencoder as stage
    from tools.tiny.training import Trainer, choose_step

    autoencoder = run.model.first_stage_model.requires_grad_(True)
    edges = torch.from_numpy(run.scenes.edges).to(run.args.device)
    settings = run.settings("autoencoder")

    critic, optimizer = stage.make_critic(run.images.device)

    def make(compiled: bool, amp: bool) -> Any:
        return stage.make_step(
            autoencoder, critic, optimizer, run.images, edges, settings.batch, settings.steps, compiled, amp
        )

    modules = {"first_stage_model": autoencoder}
    extra = {"critic": critic, "critic_optimizer": optimizer}
    identity = run.identity("autoencoder")
    trainer = Trainer(
        "autoencoder", modules, settings, run.args.folder, run.args.seed, run.args.device, extra, identity
    )
    trainer.run(choose_step(make(False, False), run.candidates(make), trainer), run.stop_at)
    trainer.use_average()
    shift, ratio = stage.standardise_latents(autoencoder, run.images[:2000])
    run.finish("autoencoder", modules)
    held_out = torch.from_numpy(run.held_out.images).to(run.args.device)
    log.info(
        "autoencoder: held-out PSNR %.2f dB, %.0f s; latents: shift %.2f and ratio of scales %.2f taken out",
        stage.psnr(autoencoder, held_out),
        trainer.seconds,
        shift,
        ratio,
    )


def train_diffusion(run: Run, control: bool) -> None:
    import torch

    from tools.tiny import train_diffusion as stage
    from tools.tiny.training import Trainer, choose_step

    name = "control" if control else "unet"
    if control:
        stage.copy_encoder(run.model)
    else:
        stage.initialise_text(run.model)
        stage.initialise_unet(run.model.unet)
    modules = stage.trained_modules(run.model, control, run.args.lock_unet)
    stage.freeze(run.model, modules)
    settings = run.settings(name)
    latents = run.latents()

    def make(compiled: bool, amp: bool) -> Any:
        return stage.make_step(run.model, latents, run.empty, settings.batch, control, compiled, amp)

    identity = run.identity(name)
    trainer = Trainer(name, modules, settings, run.args.folder, run.args.seed, run.args.device, identity=identity)
    trainer.run(choose_step(make(False, False), run.candidates(make), trainer), run.stop_at)
    trainer.use_average()
    run.finish(name, modules)
    images = torch.from_numpy(run.held_out.images).to(run.args.device)
    held_out = stage.encode_scenes(run.model.first_stage_model, images, run.held_out, run.amp)
    for with_control in (True, False) if control else (False,):
        errors = stage.validate(make(False, False), held_out, with_control)
        how = "with" if with_control else "without"
        log.info("%s: held-out error of the noise %s control, by timestep: %s", name, how, json.dumps(errors))
    log.info("%s: %.0f s", name, trainer.seconds)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    from environment import ensure_environment

    ensure_environment(["torch", "numpy", "cv2", "yaml", "safetensors", "transformers"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    import shutil

    import torch

    from cldm.files import atomic_path
    from tools.tiny.training import Stopped

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu works, but takes days", file=sys.stderr)
        return 1
    try:
        run = Run(args)
        for stage in STAGES:
            if run.result(stage).is_file():
                run.restore(stage)
            elif stage not in args.stages:
                log.info("%s: not asked for, ends here", stage)
                return 0
            elif stage == "autoencoder":
                train_autoencoder(run)
            else:
                train_diffusion(run, control=stage == "control")
    except Stopped as stopped:
        log.info("%s; the same command goes on from there", stopped)
        return 3
    except (OSError, ValueError) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1
    with atomic_path(args.output) as temporary:
        shutil.copyfile(str(run.result(STAGES[-1])), str(temporary))
    log.info("wrote %s, %.1f MiB", args.output, args.output.stat().st_size / 2**20)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
