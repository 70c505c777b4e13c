"""All plans of a build, each built in a process of its own, so that the memory of one is all that is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from typing import Callable, List, Sequence

from deploy.engine_build import BuildError, BuiltPlan, PlanJob, check_onnx, existing_plan, seconds_before
from deploy.manifest import ROOT, ArtefactError
from deploy.operators import require_operators
from deploy.plan_manifest import Machine, engine_words
from deploy.toolchain import Toolchain

Report = Callable[[str], None]
# From Ctrl-C until a process that has not ended by itself is killed: a builder asks now and then whether to go on.
GRACE_SECONDS = 30


def build_all(jobs: Sequence[PlanJob], tools: Toolchain, force: bool, check: bool, report: Report) -> List[BuiltPlan]:
    """Build what is not there yet; one row a job.

    Raises
    ------
    ArtefactError, OperatorError
        A graph is not there, or cannot be parsed: found of all graphs before the first is built.
    BuildError
        A process failed; those before it have put their plans in place.
    """
    stale = [job for job in jobs if not _is_there(job, tools.machine, force, report)]
    for job in stale:
        check_onnx(job)
        require_operators(job.onnx, tools.version.major, tools.plugin is not None)
    words = [] if check else ["--no-check"]
    if stale and check:
        _run_command(stale[0], tools, ["--record-only"])
    for number, job in enumerate(stale, 1):
        report(f"[{number}/{len(stale)}] {job.spec.name}: building {job.plan}")
        _run_command(job, tools, ["--in-process", "--graphs", job.spec.name, *words])
    built = {job.spec.name for job in stale}
    return [_row(job, tools.machine, job.spec.name in built) for job in jobs]


def _is_there(job: PlanJob, machine: Machine, force: bool, report: Report) -> bool:
    if force:
        return False
    try:
        existing_plan(job, machine)
    except ArtefactError as reason:
        report(f"{job.spec.name}: {reason}")
        return False
    return True


def _row(job: PlanJob, machine: Machine, built: bool) -> BuiltPlan:
    row = existing_plan(job, machine)
    return dataclasses.replace(row, seconds=seconds_before(job) or 0.0) if built else row


def _run_command(job: PlanJob, tools: Toolchain, words: List[str]) -> None:
    """Run build_engines.py in another process, for the same build, and wait for it.

    Raises
    ------
    BuildError
        It failed; its own message stands above.
    """
    command = [sys.executable, str(ROOT / "build_engines.py")]
    command += [*engine_words(job.build, job.weights, job.folder, job.options, tools.gpu.index), *words]
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C, which a terminal sends to that process, too; a second one ends the waiting
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=GRACE_SECONDS)
        process.kill()
        process.wait()
        raise
    if status < 0:
        raise BuildError(
            f"the process of {' '.join(words)} was killed by signal {-status}; if that is 9, probably for want of"
            " memory: end other programs, or build on a machine with more. Plans that were finished are kept, so that"
            " the same command goes on"
        )
    if status:
        raise BuildError(f"the process of {' '.join(words)} failed and says why above; finished plans are kept")
