#!/usr/bin/env python3
"""Build TensorRT engines from exported graphs, and check each. `python3 build_engines.py --help` lists the options.

Each graph is built in a process of its own, so that building needs the memory of one, and none of torch's. A plan is
put in place once its outputs were compared with ONNX Runtime's in FP32 on the inputs of a recorded run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Optional

if TYPE_CHECKING:  # the packages may be in another environment, which main() looks for first
    from deploy.engine_build import BuiltPlan, PlanJob
    from deploy.engine_options import EngineOptions
    from deploy.toolchain import Toolchain
    from runtime.engine_check import Reference

ROOT = Path(__file__).resolve().parent
GRAPHS = ["text", "hint", "time", "step", "decode"]
# The graph of the time biases has a free axis and is FP32 inside: there is nothing to look for in it.
GRAPHS_TO_BISECT = ["text", "hint", "step", "decode"]


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="auto", help="sd15, tiny, a config's path, or auto: sd15 if its checkpoint is there")
    add("--precision", default="auto", choices=["auto", "fp32", "fp16"], help="auto: fp16")
    add("--height", type=int, default=256)
    add("--width", type=int, default=384)
    add("--samples", type=int, default=1, help="images a run")
    add("--build-dir", type=Path, default=ROOT / "build", help="folder of the builds (default: build/)")
    add("--checkpoint", help="weights other than those under models/")
    add("--random-weights", type=int, metavar="SEED", help="seeded random weights, for benchmarks")
    add("--graphs", nargs="+", choices=GRAPHS, default=GRAPHS, help="only these")
    add(
        "--groupnorm",
        default="auto",
        choices=["auto", "plugin", "native"],
        help="what normalises: this project's plugin, TensorRT's own layers (10 and 11), or auto: the plugin where it"
        " is there or can be built",
    )
    add("--opt-level", type=int, default=5, help="0 to 5: how long the builder looks for fast kernels (default: 5)")
    add("--aux-streams", type=int, default=0, help="streams that an engine may use beside its own (default: 0)")
    add("--workspace", type=int, metavar="MIB", help="scratch memory (default: 80 %% of what the GPU has free)")
    add(
        "--hardware-compatibility",
        default="none",
        choices=["none", "ampere-plus", "same-compute-capability"],
        help="the GPUs that an engine runs on: this one, or more and slower",
    )
    add(
        "--profiling-verbosity",
        default="names",
        choices=["names", "detailed", "none"],
        help="what an engine can say of its layers afterwards",
    )
    add("--tf32", nargs="+", choices=GRAPHS, default=[], help="graphs whose FP32 matrix work may round to TF32")
    add("--force", action="store_true", help="build again what is there already")
    add("--no-check", action="store_true", help="do not compare the engines with ONNX Runtime")
    add("--bisect", choices=GRAPHS_TO_BISECT, help="find the first layer of a graph's engine that diverges")
    add("--device", type=int, default=0, metavar="N", help="CUDA's index of the GPU to build for (default: 0)")
    add("--in-process", action="store_true", help="build here, not in a process a graph")
    add("--record-only", action="store_true", help="only run the FP32 graphs and record what the check compares with")
    return parser.parse_args(argv)


def say(line: str) -> None:
    print(line, flush=True)


def run(args: argparse.Namespace) -> List[BuiltPlan]:
    """Do what the options ask for; the rows of the table."""
    from cldm.weights import find_weights
    from deploy.engine_build import PlanJob
    from deploy.engine_builds import build_all
    from deploy.spec import Build, graph_specs
    from deploy.toolchain import find_toolchain, select_gpu
    from runtime.choose import choose_model
    from runtime.engine_check import Reference, bisect

    config = choose_model(args.model, args.checkpoint)
    precision = "fp16" if args.precision == "auto" else args.precision
    build = Build(config, args.height, args.width, args.samples, precision)
    weights = find_weights(config, args.checkpoint, args.random_weights, args.build_dir / ".hashes.json")
    reference = Reference(build, weights, args.build_dir, say)
    if args.record_only:
        reference.make()
        return []
    if args.device:  # CUDA's own choice is 0
        select_gpu(args.device)
    tools = find_toolchain(args.build_dir, args.groupnorm, say)
    options = options_of(args, "native" if tools.plugin is None else "plugin")
    if not args.in_process:
        say(f"TensorRT {tools.version.version} on {tools.gpu.name}; GroupNorm by {options.groupnorm}")
    specs = graph_specs(build)
    wanted = [args.bisect] if args.bisect else args.graphs
    jobs = [PlanJob(build, specs[name], weights, options, args.build_dir) for name in wanted]
    if args.bisect:
        say(bisect(jobs[0], tools, reference, f"cuda:{tools.gpu.index}"))
        return []
    if args.in_process:
        return [build_here(job, tools, None if args.no_check else reference) for job in jobs]
    return build_all(jobs, tools, args.force, not args.no_check, say)


def options_of(args: argparse.Namespace, groupnorm: str) -> EngineOptions:
    from deploy.engine_options import EngineOptions

    return EngineOptions(
        groupnorm=groupnorm,
        opt_level=args.opt_level,
        aux_streams=args.aux_streams,
        workspace_mib=args.workspace,
        hardware_compatibility=args.hardware_compatibility,
        profiling_verbosity=args.profiling_verbosity,
        tf32=tuple(args.tf32),
    )


def build_here(job: PlanJob, tools: Toolchain, reference: Optional[Reference]) -> BuiltPlan:
    """Build one plan in this process, and compare it with the reference where there is one."""
    from deploy.engine_build import build_plan
    from runtime.engine_check import check_plan_runs

    if reference is None:
        return build_plan(job, tools, None, say)
    compared_with = reference
    compared_with.make()

    def check(plan: Path) -> Any:
        return check_plan_runs(plan, job, tools, compared_with, f"cuda:{tools.gpu.index}")

    return build_plan(job, tools, check, say)


def needed_packages(args: argparse.Namespace) -> List[str]:
    """What the options need; ONNX Runtime only where something is compared with it."""
    packages = ["torch", "onnx", "onnx_graphsurgeon", "polygraphy", "numpy", "yaml", "cv2"]
    compares = not args.no_check or args.bisect or args.record_only
    return [*packages, "onnxruntime"] if compares else packages


def main(argv: Optional[List[str]] = None) -> int:
    """The exit status: 0, or 1 after an error and 130 after Ctrl-C, each with a line on standard error."""
    args = parse_arguments(argv)
    from environment import ensure_environment

    ensure_environment(needed_packages(args))
    start_time = time.perf_counter()
    try:
        rows = run(args)
    except KeyboardInterrupt:
        print("build_engines.py: interrupted; plans that were finished are kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"build_engines.py: {error}", file=sys.stderr)
        return 1
    if rows and not args.in_process:
        print_table(rows, time.perf_counter() - start_time)
    return 0


def print_table(rows: List[BuiltPlan], seconds: float) -> None:
    print(f"\n{'graph':8}{'MB':>10}{'seconds':>9}{'error':>10}  file")
    for row in rows:
        error = "-" if row.error is None else f"{row.error:.1e}"
        took = f"{row.seconds:.0f}" if row.seconds else "there"
        print(f"{row.graph:8}{row.num_bytes / 1e6:10.1f}{took:>9}{error:>10}  {row.file}")
    print(f"error: of the engine against ONNX Runtime in FP32, relative; {seconds:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
