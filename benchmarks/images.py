#!/usr/bin/env python3
"""The time of an image: whole, by stage, on the host, by kernel, against a floor and against peers, in one run.

Every contender works in a process of its own, and one that fails costs its own rows only. Results go to a JSON file,
and as text to one beside it, after each section; plots follow at the end. With --only, sections that such a file has
already stay in it.

Sections, the most wanted first: floor (what the card can do, and the graphs' work), images (whole calls of `process`,
first and later, and memory), stages (each graph alone), host (what the processor does), peers (others' pipelines, in
turn with ours), start-up (initialise without and with what an earlier one left), throughput (several images a call),
kernels (device time of one guided step by kernel), variants (our graphs run in other ways, in turn with ours), plots.
On a GPU none begins that would hardly end within the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.report import Spread, as_json, from_json  # noqa: E402
from benchmarks.shown import ON_CPU, draw, show_about, show_report, show_section, write_plots  # noqa: E402
from benchmarks.workers import Worker, WorkerError  # noqa: E402

SECTIONS = (
    "floor",
    "images",
    "stages",
    "host",
    "peers",
    "start-up",
    "throughput",
    "kernels",
    "variants",
    "plots",
)
OURS = "benchmarks.contenders:Ours"
DEVICE = "benchmarks.device:Device"
DIFFUSERS = "benchmarks.peers:Diffusers"


class Peer(NamedTuple):
    """A contender beside ours.

    Attributes
    ----------
    options : mapping
        What its job has beside ours.
    package : str
        That it needs.
    seconds : float
        About what all of it takes on an H200 with SD1.5.
    """

    contender: str
    options: Mapping[str, Any]
    package: str
    seconds: float


PEERS: Dict[str, Peer] = {
    "diffusers-compiled": Peer(DIFFUSERS, {"compiled": "reduce-overhead"}, "diffusers", 170.0),
    "diffusers-eager": Peer(DIFFUSERS, {}, "diffusers", 50.0),
    "diffusers-max-autotune": Peer(DIFFUSERS, {"compiled": "max-autotune"}, "diffusers", 500.0),
    "ours-eager": Peer("benchmarks.contenders:EagerGraphs", {}, "torch", 45.0),
    "ours-onnxruntime": Peer(
        OURS, {"backend": "onnxruntime", "device": "cpu", "precision": "fp32"}, "onnxruntime", 250.0
    ),
}
GPU_PEERS, CPU_PEERS = "diffusers-compiled,diffusers-eager,ours-eager", "ours-eager"
# About what the other sections take there; for throughput each number of images, tuned or not.
SECONDS = {"floor": 5.0, "images": 110.0, "stages": 10.0, "host": 10.0, "start-up": 30.0, "kernels": 15.0}
SAMPLES_SECONDS, TUNED_SECONDS = 35.0, 240.0
# A section that takes this much longer than expected is stuck.
PATIENCE, GRACE = 1.5, 30.0
IMAGES_SECONDS = 60.0  # for the timed images of ours, where a GPU is slow
PEER_SECONDS = 12.0  # for those of one peer
MIN_IMAGES, ROUNDS = 5, 3
PART_REPEATS = 5  # of a peer's stages, each of which waits for the device
COPY_ROUNDS = 11
MOST_FAILURES = 2  # starts of ours
# Where compilers keep what they make: for the start-up section in a folder that is empty at first.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
# What must agree before sections of two runs may stand in one file.
SAME = ("model", "random_weights", "precision", "steps", "resolution", "picture", "backend", "device", "torch")


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ", ".join(PEERS)
    parser.add_argument("--model", help="sd15, tiny or a config file; default sd15 with a CUDA device, else tiny")
    parser.add_argument(
        "--random-weights", type=int, metavar="SEED", help="seeded random weights; 1 for sd15 without a checkpoint"
    )
    parser.add_argument("--backend", help="ours: torch or onnxruntime; default: what initialise picks")
    parser.add_argument("--precision", help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a CUDA device where there is one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resolution", type=int, default=256, help="shorter side of the images (%(default)s)")
    parser.add_argument("--repeats", type=int, help="timed images; default 200 on a GPU, 7 on a CPU")
    parser.add_argument("--warm-up", type=int, help="images before those; default 10 on a GPU, 1 on a CPU")
    parser.add_argument("--samples", default="1,2,4,8", help="images a call of the throughput section (%(default)s)")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure tile sizes for each number of samples, minutes each, instead of scaling those for one image",
    )
    parser.add_argument(
        "--peers",
        help=f"of {names}, or none; default on a GPU {GPU_PEERS}, on a CPU {CPU_PEERS}",
    )
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="SECTION,...", help="sections to run")
    parser.add_argument("--budget-seconds", type=float, default=600.0, help="none starts or goes on after it")
    parser.add_argument("--picture", type=Path, help="default: the first of pictures/")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build", help="where made files are (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file; default BUILD_DIR/benchmarks/images-MODEL-DEVICE.json")
    return settle(parser, parser.parse_args(argv))


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the machine, and end with a message where an argument cannot be."""
    from environment import ensure_environment

    ensure_environment(["torch", "cv2", "transformers", "numpy"])
    from cldm.config import load_config
    from runtime.choose import choose_model

    on_cuda = _settle_device(parser, args)
    args.precision = args.precision or ("fp16" if on_cuda else "fp32")
    args.model = args.model or ("sd15" if on_cuda else "tiny")
    try:
        config = load_config(args.model)
        args.samples = [int(word) for word in args.samples.split(",")]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.random_weights is None and args.model == "sd15" and choose_model().name != "sd15":
        args.random_weights = 1
    if args.repeats is None:
        args.repeats = 200 if on_cuda else 7
    if args.warm_up is None:
        args.warm_up = 10 if on_cuda else 1
    if args.peers is None:
        args.peers = GPU_PEERS if on_cuda else CPU_PEERS
    args.peers = [] if args.peers == "none" else args.peers.split(",")
    args.only = args.only.split(",")
    for what, given, known in (("peer", args.peers, PEERS), ("section", args.only, SECTIONS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    if min(args.samples) < 1 or args.repeats < 1 or args.steps < 1 or args.warm_up < 0:
        parser.error("samples, repeats and steps must be at least 1, warm-up at least 0")
    args.picture = args.picture or sorted((ROOT / "pictures").glob("*.jpg"))[0]
    if not args.picture.is_file():
        parser.error(f"there is no picture {args.picture}")
    kind = "cuda" if on_cuda else "cpu"
    args.output = args.output or args.build_dir / "benchmarks" / f"images-{config.name}-{kind}.json"
    if args.output.suffix != ".json":
        parser.error(f"--output is to be a JSON file, not {args.output}")
    return args


def _settle_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Whether a CUDA device is to be used; of several, this process and its workers then see that one, as "cuda"."""
    from runtime.choose import cuda_problem

    problem = cuda_problem()
    kind, _, index = (args.device or ("cpu" if problem else "cuda")).partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdigit():
        parser.error(f"--device is cpu, cuda or cuda:1 and the like, not {args.device}")
    args.device = kind
    if kind == "cpu":
        return False
    if problem:
        parser.error(f"--device cuda: {problem}")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = seen.split(",") if seen else None
    if cards and int(index or 0) >= len(cards):
        parser.error(f"--device cuda:{index}: CUDA_VISIBLE_DEVICES is {seen}")
    os.environ["CUDA_VISIBLE_DEVICES"] = cards[int(index or 0)] if cards else index or "0"
    return True


class Benchmark:
    """One run: its settings, its workers, and what was found so far.

    Parameters
    ----------
    args : argparse.Namespace
    start : float, optional
        When the budget began, by `time.monotonic`; default now.

    Attributes
    ----------
    results : dict
        "about", and for each of "sections" what it measured or {"error": ...}; and by section the "seconds" that it
        took and when it ended, "at".
    failed : list of str
        Sections of this run.
    rates : dict or None
        What the card can do, or {"error": ...}.
    begun : dict
        Of the first start of ours: "prepared", "memory" at rest after it, and "first_image".
    """

    def __init__(self, args: argparse.Namespace, start: Optional[float] = None) -> None:
        self.args = args
        self.results: Dict[str, Any] = {"about": {}, "sections": {}, "seconds": {}, "at": {}}
        self._end = (time.monotonic() if start is None else start) + args.budget_seconds
        self._until = self._end
        self._ours: Optional[Worker] = None
        self._failures: List[str] = []
        self._started = 0
        self.failed: List[str] = []
        self.rates: Optional[Dict[str, Any]] = None
        self.begun: Dict[str, Any] = {}
        # For what is made anew and thrown away; beside the build, as it may be large.
        self.folder = args.build_dir / "benchmarks" / "work"
        shutil.rmtree(self.folder, ignore_errors=True)
        plans = any(args.build_dir.glob("*/*.plan"))  # of TensorRT: they are not made here, so ours must find them
        self.had_operator = any((ROOT / "build" / "plugins").glob("torch_operator-*.so"))
        self.from_nothing = "start-up" in args.only and args.backend != "tensorrt" and not plans

    @property
    def on_cuda(self) -> bool:
        return bool(self.args.device.startswith("cuda"))

    @property
    def left(self) -> float:
        """Seconds of the budget, or of what the section may take of it."""
        return self._until - time.monotonic()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """What takes about so long on an H200, and on it may not take much more; on a CPU the budget alone counts.

        Raises
        ------
        WorkerError
            So much is not left.
        """
        expected = seconds if self.on_cuda else 0.0
        if self.left <= expected:
            raise WorkerError(
                f"not begun: it takes some {expected:.0f} s, and of the {self.args.budget_seconds:.0f} s"
                f" {max(0.0, self.left):.0f} are left"
            )
        before = self._until
        if expected:
            self._until = min(before, time.monotonic() + PATIENCE * expected + GRACE)
        try:
            yield
        finally:
            self._until = before

    def job(self, **instead: Any) -> Dict[str, Any]:
        """The options of a contender."""
        args = self.args
        job = {
            "model": args.model,
            "picture": str(args.picture),
            "random_weights": args.random_weights,
            "steps": args.steps,
            "resolution": args.resolution,
            "backend": args.backend,
            "precision": args.precision,
            "device": args.device,
            "build_dir": str(self.build_dir),
        }
        return {**job, **instead}

    @property
    def build_dir(self) -> Path:
        """Of ours: where the start-up is measured one that is empty at first."""
        return Path(self.folder / "build" if self.from_nothing else self.args.build_dir)

    def caches(self) -> Dict[str, str]:
        """Variables that keep what ours compiles in one place, whatever its build folder."""
        if self.from_nothing:
            return {name: str((self.folder / name.lower()).resolve()) for name in CACHES}
        kept = os.environ.get("TRITON_CACHE_DIR") or str((self.build_dir / "triton").resolve())
        return {"TRITON_CACHE_DIR": kept}

    @contextlib.contextmanager
    def worker(
        self, contender: str, options: Mapping[str, Any], environment: Optional[Mapping[str, str]] = None
    ) -> Iterator[Worker]:
        """A worker that is gone after the block."""
        started = self._start(contender, options, environment)
        try:
            yield started
        finally:
            started.close()

    def _start(
        self, contender: str, options: Mapping[str, Any], environment: Optional[Mapping[str, str]] = None
    ) -> Worker:
        self._started += 1
        log = self.args.output.parent / "logs" / f"{self._started:02}-{contender.split(':')[1].lower()}.log"
        # Every step counts here, whatever speed the user has set for other purposes; and no network is waited for.
        fixed = {"HACKATHON_SPEED": "exact", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        return Worker(contender, options, log, {**fixed, **(environment or {})})

    def ask(self, worker: Worker, what: str, **arguments: Any) -> Any:
        """`Worker.ask` within what is left. After an error of CUDA a process is of no more use, and is ended."""
        try:
            return worker.ask(what, self.left, **arguments)
        except WorkerError as error:
            if "CUDA error" in str(error):
                worker.close()
            raise

    def ours(self) -> Worker:
        """Our pipeline's worker, prepared; several sections share it, and after it died a new one is made.

        The time of a start is not the section's that happens to be the first to need it.
        """
        if self._ours is not None and self._ours.alive:
            return self._ours
        if len(self._failures) >= MOST_FAILURES:
            raise WorkerError(f"ours is not started again: {self._failures[-1]}")
        before, start = self._until, time.monotonic()
        self._until = self._end
        try:
            with self.within(0.0 if self.begun else SECONDS["images"]):
                return self._start_ours()
        except WorkerError as error:
            self._failures.append(str(error))
            self.close_ours()
            raise
        finally:
            self._until = min(self._end, before + time.monotonic() - start)

    def _start_ours(self) -> Worker:
        self.close_ours()
        worker = self._ours = self._start(OURS, self.job(), self.caches())
        prepared = self.ask(worker, "prepare")
        memory = self.ask(worker, "memory")
        first = self.ask(worker, "images", count=1)[0]
        self.begun = self.begun or {"prepared": prepared, "memory": memory, "first_image": first}
        self.results["about"]["ours"] = prepared
        return worker

    def close_ours(self) -> None:
        if self._ours is not None:
            self._ours.close()
        self._ours = None

    def section(self, name: str, run: Callable[[Benchmark], Dict[str, Any]]) -> None:
        """Run a section and save its result, or why there is none."""
        start = time.monotonic()
        print(f"{name} ... ({max(0.0, self.left):.0f} s left)", file=sys.stderr, flush=True)
        found = attempt(lambda: self._run(name, run))
        sections = self.results["sections"]
        if "error" in found:
            self.failed.append(name)
        if "error" in found and "error" not in sections.get(name, found):
            print(f"\n{name} failed, so an earlier result stays: {found['error']}", flush=True)
            return
        sections[name] = found
        self.results["seconds"][name] = time.monotonic() - start
        self.results["at"][name] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.save()
        print(f"\n{show_section(name, self.results)}", flush=True)

    def _run(self, name: str, run: Callable[[Benchmark], Dict[str, Any]]) -> Dict[str, Any]:
        if name == "plots":  # they take no time, and are of what there is
            return run(self)
        with self.within(SECONDS.get(name, 0.0)):
            return run(self)

    def save(self) -> None:
        """Write the JSON file and its text."""
        from cldm.files import atomic_path, write_json

        write_json(self.args.output, as_json(self.results))
        with atomic_path(self.args.output.with_suffix(".txt")) as temporary:
            temporary.write_text(show_report(self.results, list(SECTIONS)), encoding="utf-8")

    def keep_others(self) -> None:
        """Where only some sections are to be run, take over those that the output file has.

        Raises
        ------
        SystemExit
            They were measured on something else, or it is no such file.
        """
        path = self.args.output
        if set(self.args.only) == set(SECTIONS) or not path.is_file():
            return
        try:
            stored = from_json(json.loads(path.read_text(encoding="utf-8")))
            others = {name: stored[name] for name in ("about", "sections", "seconds", "at")}
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is no result of this program ({error}); name another --output") from error
        about = self.results["about"]
        differing = [name for name in SAME if name in about and others["about"].get(name) != about[name]]
        if others["sections"] and differing:
            told = ", ".join(f"{name} {others['about'].get(name)} there, {about[name]} here" for name in differing)
            raise SystemExit(f"{path} holds sections of another kind of run ({told}); name another --output")
        self.results = {**others, "about": {**others["about"], **about}}

    def close(self) -> None:
        self.close_ours()
        shutil.rmtree(self.folder, ignore_errors=True)


def attempt(measure: Callable[[], Dict[str, Any]]) -> Dict[str, Any]:
    """What was measured, or {"error": ...}: no failure of one measurement may cost the others."""
    try:
        return measure()
    except WorkerError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever it is, the other sections are worth having
        return {"error": f"{type(error).__name__}: {error}"}


def affordable(count: int, milliseconds: float, seconds: float) -> int:
    """As many of `count` calls as there is time for, but a few at least."""
    return min(count, max(MIN_IMAGES, int(1e3 * seconds / milliseconds)))


# The sections. Times are milliseconds where their name does not say otherwise.


def measure_about(bench: Benchmark) -> None:
    """What runs on what, and the card's rates, by one process that is gone before others measure their memory."""
    args = bench.args
    about = bench.results["about"]
    names = ("model", "random_weights", "precision", "steps", "resolution", "backend", "warm_up", "repeats")
    about.update({name: getattr(args, name) for name in names}, picture=args.picture.name)
    options = {"device": args.device, "precision": args.precision}
    with bench.worker(DEVICE, options) as worker:
        about.update(attempt(lambda: bench.ask(worker, "about")))
        if bench.on_cuda and "floor" in args.only:
            bench.rates = attempt(lambda: bench.ask(worker, "rates", rounds=COPY_ROUNDS))


def measure_floor(bench: Benchmark) -> Dict[str, Any]:
    """The graphs' work, what the device can do, and so the least time of each graph and of an image."""
    from benchmarks.contenders import Job
    from benchmarks.device import count_work
    from cldm.config import load_config
    from deploy.spec import Build

    args = bench.args
    _, height, width = Job(**bench.job()).load_picture()
    work = count_work(Build(load_config(args.model), height, width, 1, args.precision), args.steps)
    found: Dict[str, Any] = {"work": {name: w._asdict() for name, w in work.items()}, "rates": None}
    rates = bench.rates
    if rates is not None:
        if "error" in rates:
            raise WorkerError(rates["error"])
        found["rates"] = rates
        floors = {name: w.floor(rates["flops_a_second"], rates["bytes_a_second"]) for name, w in work.items()}
        floors["image"] = floors["text"] + floors["hint"] + args.steps * floors["step"] + floors["decode"]
        found["milliseconds"] = floors
    return found


def measure_images(bench: Benchmark) -> Dict[str, Any]:
    args, ours = bench.args, bench.ours()
    first = last = bench.begun["first_image"]
    if args.warm_up:
        last = bench.ask(ours, "images", count=affordable(args.warm_up, first, IMAGES_SECONDS))[-1]
    samples = bench.ask(ours, "images", count=affordable(args.repeats, last, IMAGES_SECONDS))
    spread = Spread.of(samples)
    receipts = bench.ask(ours, "receipts", count=PART_REPEATS)
    return {
        "image": spread,
        "samples": samples,
        "first_image": first,
        "p95_over_median": spread.p95 / spread.median,
        "memory": bench.begun["memory"],
        "receipt": {name: Spread.of(spent) for name, spent in receipts["milliseconds"].items()},
        "sampling": receipts["sampling"],
        "warnings": receipts["warnings"],
    }


def measure_stages(bench: Benchmark) -> Dict[str, Any]:
    repeats = max(MIN_IMAGES, bench.args.repeats // 4) if bench.on_cuda else bench.args.repeats
    floors = bench.results["sections"].get("floor", {}).get("milliseconds", {})
    found: Dict[str, Any] = {"parts": {}, "floor": {}, "failed": {}}
    for name in bench.ask(bench.ours(), "stages"):
        try:
            found["parts"][name] = Spread.of(bench.ask(bench.ours(), "stage", name=name, repeats=repeats))
            found["floor"][name] = floors.get("image" if name == "chain" else name)
        except WorkerError as error:
            found["failed"][name] = str(error)
    return found


def measure_host(bench: Benchmark) -> Dict[str, Any]:
    parts = bench.ask(bench.ours(), "host", repeats=max(20, bench.args.repeats // 4))
    spreads = {name: Spread.of(samples) for name, samples in parts.items()}
    found: Dict[str, Any] = {"parts": spreads, "sum": sum(spread.median for spread in spreads.values())}
    image = bench.results["sections"].get("images", {}).get("image")
    chain = bench.results["sections"].get("stages", {}).get("parts", {}).get("chain")
    # What the whole call takes beyond the device's work is what the host costs, overlapped or not.
    found["call_beyond_device"] = image.median - chain.median if image and chain else None
    return found


def measure_kernels(bench: Benchmark) -> Dict[str, Any]:
    if not bench.on_cuda:
        return {"note": ON_CPU}
    found: Dict[str, Any] = bench.ask(bench.ours(), "kernels")
    kinds: Dict[str, Dict[str, float]] = {}
    for row in found["rows"]:
        kind = kinds.setdefault(row["kind"], {"launches": 0, "microseconds": 0.0})
        kind["launches"] += row["launches"]
        kind["microseconds"] += row["microseconds"]
    return {**found, "kinds": kinds}


def measure_peers(bench: Benchmark, section: str) -> Dict[str, Any]:
    """Those peers that belong to a section: ours run in other ways, or others' pipelines."""
    names = [name for name in bench.args.peers if name.startswith("ours") == (section == "variants")]
    found = {name: peer for name, peer in bench.results["sections"].get(section, {}).items() if isinstance(peer, dict)}
    for name in names:
        start = time.monotonic()
        print(f"  {name} ...", file=sys.stderr, flush=True)
        found[name] = attempt(lambda name=name: measure_peer(bench, name))
        found[name]["seconds"] = time.monotonic() - start
        bench.results["sections"][section] = found
        bench.save()
    return found or {"note": "no such peer was asked for"}


def measure_peer(bench: Benchmark, name: str) -> Dict[str, Any]:
    """A peer and ours in turn, so that whatever else the machine does meets both."""
    contender, more, package, seconds = PEERS[name]
    if importlib.util.find_spec(package) is None:
        raise WorkerError(f"the package {package} is not installed")
    with bench.within(seconds), bench.worker(contender, {**bench.job(), **more}) as peer:
        prepared = bench.ask(peer, "prepare")
        first = bench.ask(peer, "images", count=2)  # the second tells how many there is time for
        found = time_in_turn(bench, peer, affordable(bench.args.repeats, first[1], PEER_SECONDS))
        found.update(prepared, memory=bench.ask(peer, "memory"), parts=measure_parts(bench, peer))
        if name.startswith("ours") and found["ours"] is not None:  # diffusers has other weights
            found["latent_error"] = relative_error(bench.ask(peer, "latent"), bench.ask(bench.ours(), "latent"))
    return found


def measure_parts(bench: Benchmark, peer: Worker) -> Dict[str, Spread]:
    """A peer's stages; where it is another `Ours`, each alone."""
    if peer.contender == OURS:
        names = bench.ask(peer, "stages")
        parts = {name: bench.ask(peer, "stage", name=name, repeats=PART_REPEATS) for name in names}
    else:
        parts = bench.ask(peer, "parts", repeats=PART_REPEATS)
    return {name: Spread.of(samples) for name, samples in parts.items()}


def time_in_turn(bench: Benchmark, peer: Worker, count: int) -> Dict[str, Any]:
    """`count` images of a peer and of ours in a few rounds; where ours fails the peer's count all the same.

    Returns
    -------
    dict
        peer, ours: Spreads, the latter None without ours; ratio of the medians; samples; drift: how far apart the
        medians of the rounds are, relative to the lowest; ours_problem: why ours failed, or None.
    """
    rounds: Dict[str, List[List[float]]] = {"peer": [], "ours": []}
    problem = None
    for turn in range(ROUNDS):
        share = count * (turn + 1) // ROUNDS - count * turn // ROUNDS
        if not share:
            continue
        try:
            rounds["ours"].append(bench.ask(bench.ours(), "images", count=share))
        except WorkerError as error:
            problem = str(error)
        rounds["peer"].append(bench.ask(peer, "images", count=share))
    samples = {who: [value for values in parts for value in values] for who, parts in rounds.items() if parts}
    spreads = {who: Spread.of(values) for who, values in samples.items()}
    drift = {}
    for who in samples:
        medians = [Spread.of(values).median for values in rounds[who]]
        drift[who] = max(medians) / min(medians) - 1
    ours = spreads.get("ours")
    ratio = None if ours is None else spreads["peer"].median / ours.median
    told = {"ours_problem": problem, "ratio": ratio, "drift": drift, "samples": samples}
    return {"peer": spreads["peer"], "ours": ours, **told}


def relative_error(values: Sequence[float], reference: Sequence[float]) -> float:
    import numpy as np

    a, b = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure_throughput(bench: Benchmark) -> Dict[str, Any]:
    before = bench.results["sections"].get("throughput", {}).get("rows", [])
    rows = {row["samples"]: row for row in before if row["samples"] not in bench.args.samples}
    for samples in bench.args.samples:
        print(f"  {samples} ...", file=sys.stderr, flush=True)
        rows[samples] = {"samples": samples, **attempt(lambda samples=samples: measure_samples(bench, samples))}
        bench.results["sections"]["throughput"] = found = {"rows": [rows[key] for key in sorted(rows)]}
        bench.save()
    return found


def measure_samples(bench: Benchmark, samples: int) -> Dict[str, Any]:
    """Whole calls that make several images at a time, in a process of their own."""
    if samples == 1:
        return measure_calls(bench, bench.ours(), 1)
    more: Dict[str, Any] = {}
    if bench.on_cuda and not bench.args.tune:
        more = {"build_dir": str(bench.folder / f"samples-{samples}"), "scaled_from": str(bench.build_dir)}
    job, seconds = bench.job(samples=samples, **more), TUNED_SECONDS if bench.args.tune else SAMPLES_SECONDS
    with bench.within(seconds), bench.worker(OURS, job, bench.caches()) as worker:
        prepared = bench.ask(worker, "prepare")
        return {**measure_calls(bench, worker, samples), "tile_sizes": prepared["tile_sizes"]}


def measure_calls(bench: Benchmark, worker: Worker, samples: int) -> Dict[str, Any]:
    bench.ask(worker, "images", count=max(1, bench.args.warm_up // 2))
    spread = Spread.of(bench.ask(worker, "images", count=max(3, bench.args.repeats // (4 * samples))))
    memory = bench.ask(worker, "memory")
    rate = 1e3 * samples / spread.median
    return {"call": spread, "images_a_second": rate, "memory": memory, "tile_sizes": None}


def measure_start_up(bench: Benchmark) -> Dict[str, Any]:
    """A second process on the build folder and the compilers' caches that the first one of ours found empty."""
    bench.ours()
    with bench.worker(OURS, bench.job(), bench.caches()) as worker:
        prepared = bench.ask(worker, "prepare")
        images = bench.ask(worker, "images", count=6)
    later = Spread.of(images[1:]).median
    found: Dict[str, Any] = {"second": start_row(prepared, images[0], later), "first": None, "second_over_first": None}
    if not bench.from_nothing:
        return {**found, "about_first": "no first start: there are plans, which are not made here"}
    first = found["first"] = start_row(bench.begun["prepared"], bench.begun["first_image"], later)
    found["second_over_first"] = found["second"]["initialise_seconds"] / first["initialise_seconds"]
    operator = "there" if bench.had_operator else "not there yet"
    return {**found, "about_first": f"before the first the torch operator's library (build/plugins) was {operator}"}


def start_row(prepared: Mapping[str, Any], first: float, later: float) -> Dict[str, float]:
    times = {name: prepared[name] for name in ("import_seconds", "initialise_seconds")}
    return {**times, "first_image": first, "later_image": later}


def make_plots(bench: Benchmark) -> Dict[str, Any]:
    return {"files": write_plots(bench.args.output, draw(bench.results))}


RUN: Dict[str, Callable[[Benchmark], Dict[str, Any]]] = {
    "floor": measure_floor,
    "images": measure_images,
    "stages": measure_stages,
    "host": measure_host,
    "peers": lambda bench: measure_peers(bench, "peers"),
    "start-up": measure_start_up,
    "throughput": measure_throughput,
    "kernels": measure_kernels,
    "variants": lambda bench: measure_peers(bench, "variants"),
    "plots": make_plots,
}


def main(argv: Optional[List[str]] = None) -> int:
    start = time.monotonic()
    args = parse_arguments(argv)
    from cldm.files import require_room

    require_room(args.output.parent, 0)  # a folder that cannot be written is said now
    bench = Benchmark(args, start)
    try:
        measure_about(bench)
        bench.keep_others()
        print(show_about(bench.results["about"]), flush=True)
        for name in SECTIONS:
            if name in args.only:
                bench.section(name, RUN[name])
    finally:
        bench.close()
    print(f"\n{show_about(bench.results['about'])}\n{time.monotonic() - start:.0f} s in all; {args.output}")
    return 1 if bench.failed else 0


def end_orderly(number: int, frame: Any) -> None:
    """For a signal that would end the program at once: its workers end with it then, and made files are removed."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_orderly)
    sys.exit(main())
