#!/usr/bin/env python3
"""The time of an image: whole, by stage, on the host, by kernel, against a floor and against peers, in one run.

Every contender works in a process of its own, and one that fails costs its own rows only. Results go to a JSON file
after each section, and at the end to plots beside it.

Sections: floor (what the card can do, and the graphs' work), images (whole calls of `process`, first and later, and
memory), stages (each graph alone), host (what the processor does), kernels (device time of one guided step by kernel),
peers (in turn with ours), throughput (several images a call), start-up (initialise without and with what an earlier one
left), plots.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.report import SPREAD, Spread, as_json, bars, curve, number, table  # noqa: E402
from benchmarks.workers import Worker, WorkerError  # noqa: E402

SECTIONS = ("floor", "images", "stages", "host", "kernels", "peers", "throughput", "start-up", "plots")
OURS = "benchmarks.contenders:Ours"
# Contender, and what its job has beside ours.
PEERS: Dict[str, Any] = {
    "diffusers-eager": ("benchmarks.peers:Diffusers", {}),
    "diffusers-compiled": ("benchmarks.peers:Diffusers", {"compiled": True}),
    "ours-eager": ("benchmarks.contenders:EagerGraphs", {}),
    "ours-onnxruntime": (OURS, {"backend": "onnxruntime", "device": "cpu", "precision": "fp32"}),
}
ON_CPU = "not measured on a CPU"
PEER_SECONDS = 15.0  # for the timed images of one peer, which at least MIN_PEER images may exceed
MIN_PEER, ROUNDS = 5, 3
PART_REPEATS = 5  # of a peer's stages, each of which waits for the device
TOP_KERNELS = 25
COPY_ROUNDS = 11
# Where compilers keep what they make: in the start-up section below a folder that is empty at first.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


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
    parser.add_argument("--peers", help=f"of {names}, or none; default on a GPU the first three, on a CPU ours-eager")
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
    from runtime.choose import choose_model, cuda_problem

    on_cuda = cuda_problem() is None if args.device is None else args.device.startswith("cuda")
    args.device = _see_one_card(args.device) if on_cuda else "cpu"
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
        args.peers = "diffusers-eager,diffusers-compiled,ours-eager" if on_cuda else "ours-eager"
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
    return args


def _see_one_card(device: Optional[str]) -> str:
    """Let this process and its workers see the card of "cuda:1" and the like alone, as "cuda"."""
    index = int((device or "").partition(":")[2] or 0)
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)
    return "cuda"


class Benchmark:
    """One run: its settings, its workers, and what was found so far.

    Attributes
    ----------
    results : dict
        "about", and for each section what it measured or {"error": ...}; and the "seconds" that each took.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.results: Dict[str, Any] = {"about": {}, "sections": {}, "seconds": {}}
        self._end = time.monotonic() + args.budget_seconds
        self._ours: Optional[Worker] = None
        self._started = 0

    @property
    def on_cuda(self) -> bool:
        return bool(self.args.device.startswith("cuda"))

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self._end - time.monotonic()

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
            "build_dir": str(args.build_dir),
        }
        return {**job, **instead}

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
        # Every step counts here, whatever speed the user has set for other purposes.
        return Worker(contender, options, log, {"HACKATHON_SPEED": "exact", **(environment or {})})

    def ask(self, worker: Worker, what: str, **arguments: Any) -> Any:
        """`Worker.ask` within what is left of the budget."""
        return worker.ask(what, self.left, **arguments)

    def ours(self) -> Worker:
        """Our pipeline's worker, prepared; several sections share it, and after it died a new one is made."""
        if self._ours is None or not self._ours.alive:
            if self._ours is not None:
                self._ours.close()
            self._ours = self._start(OURS, self.job())
            self.results["about"]["ours"] = self.ask(self._ours, "prepare")
        return self._ours

    def section(self, name: str, run: Callable[[Benchmark], Dict[str, Any]]) -> None:
        """Run a section and save its result, or why there is none."""
        start = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        if self.left <= 0:
            found: Dict[str, Any] = {"error": f"not begun: the {self.args.budget_seconds:.0f} s were over"}
        else:
            found = attempt(lambda: run(self))
        self.results["sections"][name] = found
        self.results["seconds"][name] = time.monotonic() - start
        self.save()
        print(f"\n== {name} ({self.results['seconds'][name]:.1f} s)")
        print(f"failed: {found['error']}" if "error" in found else show(name, found), flush=True)

    def save(self) -> None:
        from cldm.files import write_json

        write_json(self.args.output, as_json(self.results))

    def close(self) -> None:
        if self._ours is not None:
            self._ours.close()


def attempt(measure: Callable[[], Dict[str, Any]]) -> Dict[str, Any]:
    """What was measured, or {"error": ...}: no failure of one measurement may cost the others."""
    try:
        return measure()
    except WorkerError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever it is, the other sections are worth having
        return {"error": f"{type(error).__name__}: {error}"}


# The sections. Times are milliseconds where their name does not say otherwise.


def measure_about(bench: Benchmark) -> None:
    """What runs on what. The first line of a report needs it, so it comes before all sections."""
    args = bench.args
    about = bench.results["about"]
    about.update(
        {name: getattr(args, name) for name in ("model", "random_weights", "precision", "steps", "warm_up", "repeats")}
    )
    options = {"device": args.device, "precision": args.precision}
    with bench.worker("benchmarks.device:Device", options) as worker:
        about.update(attempt(lambda: bench.ask(worker, "about")))


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
    if bench.on_cuda:
        options = {"device": args.device, "precision": args.precision}
        with bench.worker("benchmarks.device:Device", options) as worker:
            found["rates"] = rates = bench.ask(worker, "rates", rounds=COPY_ROUNDS)
        floors = {name: w.floor(rates["flops_a_second"], rates["bytes_a_second"]) for name, w in work.items()}
        floors["image"] = floors["text"] + floors["hint"] + args.steps * floors["step"] + floors["decode"]
        found["milliseconds"] = floors
    return found


def measure_images(bench: Benchmark) -> Dict[str, Any]:
    args, ours = bench.args, bench.ours()
    memory = bench.ask(ours, "memory")
    first = bench.ask(ours, "images", count=1)[0]
    if args.warm_up:
        bench.ask(ours, "images", count=args.warm_up)
    spread = Spread.of(bench.ask(ours, "images", count=args.repeats))
    receipts = bench.ask(ours, "receipts", count=PART_REPEATS)
    return {
        "image": spread,
        "first_image": first,
        "p95_over_median": spread.p95 / spread.median,
        "memory": memory,
        "receipt": {name: Spread.of(samples) for name, samples in receipts["milliseconds"].items()},
        "sampling": receipts["sampling"],
        "warnings": receipts["warnings"],
    }


def measure_stages(bench: Benchmark) -> Dict[str, Any]:
    repeats = max(5, bench.args.repeats // 4) if bench.on_cuda else bench.args.repeats
    parts = bench.ask(bench.ours(), "parts", repeats=repeats)
    found: Dict[str, Any] = {"parts": {name: Spread.of(samples) for name, samples in parts.items()}}
    floors = bench.results["sections"].get("floor", {}).get("milliseconds", {})
    found["floor"] = {name: floors.get("image" if name == "chain" else name) for name in parts}
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
    found["kinds"] = dict(sorted(kinds.items(), key=lambda item: -item[1]["microseconds"]))
    return found


def measure_peers(bench: Benchmark) -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for name in bench.args.peers:
        start = time.monotonic()
        print(f"  {name} ...", file=sys.stderr, flush=True)
        found[name] = attempt(lambda name=name: measure_peer(bench, name))
        found[name]["seconds"] = time.monotonic() - start
        bench.results["sections"]["peers"] = found
        bench.save()
    return found


def measure_peer(bench: Benchmark, name: str) -> Dict[str, Any]:
    """A peer and ours in turn, so that whatever else the machine does meets both."""
    contender, more = PEERS[name]
    options = {**bench.job(), **more}
    with bench.worker(contender, options) as peer:
        prepared = bench.ask(peer, "prepare")
        first = bench.ask(peer, "images", count=2)  # the second tells how many there is time for
        count = int(min(bench.args.repeats, max(MIN_PEER, 1e3 * PEER_SECONDS / first[1])))
        times: Dict[str, List[float]] = {"peer": [], "ours": []}
        for turn in range(ROUNDS):
            share = count * (turn + 1) // ROUNDS - count * turn // ROUNDS
            if share:
                times["ours"] += bench.ask(bench.ours(), "images", count=share)
                times["peer"] += bench.ask(peer, "images", count=share)
        spreads = {who: Spread.of(samples) for who, samples in times.items()}
        found = {**spreads, "summary": prepared["summary"], "initialise_seconds": prepared.get("initialise_seconds")}
        found["ratio"] = spreads["peer"].median / spreads["ours"].median
        found["memory"] = bench.ask(peer, "memory")
        parts = bench.ask(peer, "parts", repeats=PART_REPEATS)
        found["parts"] = {part: Spread.of(samples) for part, samples in parts.items()}
        if name.startswith("ours"):  # diffusers has other weights
            found["latent_error"] = relative_error(bench.ask(peer, "latent"), bench.ask(bench.ours(), "latent"))
    return found


def relative_error(values: Sequence[float], reference: Sequence[float]) -> float:
    import numpy as np

    a, b = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure_throughput(bench: Benchmark) -> Dict[str, Any]:
    return {"rows": [{"samples": n, **attempt(lambda n=n: measure_samples(bench, n))} for n in bench.args.samples]}


def measure_samples(bench: Benchmark, samples: int) -> Dict[str, Any]:
    """Whole calls that make several images at a time, in a process of their own."""
    print(f"  {samples} ...", file=sys.stderr, flush=True)
    with bench.worker(OURS, bench.job(samples=samples)) as worker:
        bench.ask(worker, "prepare")
        bench.ask(worker, "images", count=max(1, bench.args.warm_up // 2))
        repeats = max(3, bench.args.repeats // (4 * samples))
        spread = Spread.of(bench.ask(worker, "images", count=repeats))
        memory = bench.ask(worker, "memory")
    return {"call": spread, "images_a_second": 1e3 * samples / spread.median, "memory": memory}


def measure_start_up(bench: Benchmark) -> Dict[str, Any]:
    """Two processes one after the other on a build folder and compilers' caches that are empty at first."""
    folder = bench.args.output.parent / "start-up"
    shutil.rmtree(folder, ignore_errors=True)
    environment = {name: str((folder / name.lower()).resolve()) for name in CACHES}
    found: Dict[str, Any] = {}
    try:
        for turn in ("first", "second"):
            print(f"  {turn} ...", file=sys.stderr, flush=True)
            with bench.worker(OURS, bench.job(build_dir=str(folder / "build")), environment) as worker:
                prepared = bench.ask(worker, "prepare")
                images = bench.ask(worker, "images", count=6)
            times = {name: prepared[name] for name in ("import_seconds", "initialise_seconds")}
            found[turn] = {**times, "first_image": images[0], "later_image": Spread.of(images[1:]).median}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found["second_over_first"] = found["second"]["initialise_seconds"] / found["first"]["initialise_seconds"]
    return found


# The plots.


def image_parts(bench: Benchmark) -> Dict[str, Dict[str, float]]:
    """For ours and each peer the milliseconds of an image by stage; "host, rest" is what the stages leave of it."""
    sections = bench.results["sections"]
    rows: Dict[str, Dict[str, float]] = {}
    stages, image = sections.get("stages", {}).get("parts"), sections.get("images", {}).get("image")
    if stages and image:
        parts = {name: stages[name].median for name in ("text", "hint", "step", "decode")}
        parts["step"] *= bench.args.steps
        rows["ours"] = _with_rest(parts, image.median)
    for name, peer in sections.get("peers", {}).items():
        if "parts" in peer:
            parts = {
                part: spread.median for part, spread in peer["parts"].items() if part in ("text", "hint", "decode")
            }
            steps = peer["parts"].get("steps") or peer["parts"].get("step")
            parts["step"] = steps.median * (1 if "steps" in peer["parts"] else bench.args.steps)
            rows[name] = _with_rest(parts, peer["peer"].median)
    return rows


def _with_rest(parts: Mapping[str, float], total: float) -> Dict[str, float]:
    names = {"text": "text", "hint": "hint", "step": "all steps", "decode": "decode"}
    ordered = {label: parts.get(name, 0.0) for name, label in names.items()}
    return {**ordered, "host, rest": max(0.0, total - sum(ordered.values()))}


def make_plots(bench: Benchmark) -> Dict[str, Any]:
    """SVG files beside the JSON; a plot whose numbers are lacking is left out."""
    about, sections = bench.results["about"], bench.results["sections"]
    height, width = (about.get("ours", {}).get(name) for name in ("height", "width"))
    subtitle = (
        f"{about.get('device')}, {about['model']} in {about['precision']}, {height} x {width},"
        f" {about['steps']} steps of batch 2; medians"
    )
    drawings: Dict[str, str] = {}
    rows = image_parts(bench)
    if rows:
        drawings["stages"] = bars("One image by stage", subtitle, "milliseconds", rows)
        steps = {name: {"a step": row["all steps"] / about["steps"]} for name, row in rows.items()}
        floor = sections.get("floor", {}).get("milliseconds", {}).get("step")
        mark = None if floor is None else (f"floor {number(floor)}", floor)
        drawings["step"] = bars("One guided step", subtitle, "milliseconds", steps, mark)
    points = [
        (r["samples"], r["images_a_second"]) for r in sections.get("throughput", {}).get("rows", []) if "call" in r
    ]
    if points:
        labels = ("images a call", "images a second")
        drawings["throughput"] = curve("Images a second against images a call", subtitle, labels, points)
    return {"files": [str(write_plot(bench.args.output, name, text)) for name, text in drawings.items()]}


def write_plot(output: Path, name: str, text: str) -> Path:
    from cldm.files import atomic_path

    path = output.with_name(f"{output.stem}-{name}.svg")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


# What is printed.


def show_about(about: Mapping[str, Any]) -> str:
    parts = [f"{key} {about[key]}" for key in about if about[key] is not None and key != "ours"]
    return "\n".join([", ".join(parts), f"ours: {about['ours']['summary']}" if "ours" in about else ""]).rstrip()


def show(name: str, found: Mapping[str, Any]) -> str:
    """A section's result as text."""
    return found["note"] if "note" in found else SHOWN[name](found)


def spread_rows(parts: Mapping[str, Spread]) -> List[List[str]]:
    return [[name, *spread.cells()] for name, spread in parts.items()]


def show_floor(found: Mapping[str, Any]) -> str:
    floors, rates = found.get("milliseconds", {}), found["rates"]
    rows = [
        [name, number(w["flops"] / 1e9), number(w["weight_bytes"] / 1e6), number(floors.get(name))]
        for name, w in found["work"].items()
    ]
    rows.append(["image", "-", "-", number(floors.get("image"))])
    said = (
        f"{rates['flops_a_second'] / 1e12:.0f} TFLOP/s in a large product, {rates['bytes_a_second'] / 1e12:.2f} TB/s"
        " in a large copy (read and written)"
        if rates
        else f"rates {ON_CPU}"
    )
    return said + "\n" + table(["graph", "GFLOP", "weights, MB", "floor, ms"], rows)


def show_memory(memory: Optional[Mapping[str, Any]]) -> str:
    if memory is None:
        return f"memory of the card: {ON_CPU}"
    cells = (f"{key} {number(memory[key])} MiB" for key in ("process", "allocated", "reserved", "card_used"))
    return f"memory of the card: {', '.join(cells)} (process: {memory['process_is'] or 'nothing tells'})"


def show_images(found: Mapping[str, Any]) -> str:
    rows = [["whole image", *found["image"].cells()]]
    rows += [[f"receipt: {name}", *spread.cells()] for name, spread in found["receipt"].items()]
    return "\n".join(
        [
            table(["ms", *SPREAD], rows),
            f"first image {number(found['first_image'])} ms; p95 {found['p95_over_median']:.3f} x the median",
            show_memory(found["memory"]),
            found["sampling"],
            *(f"warning: {warning}" for warning in found["warnings"]),
        ]
    )


def show_stages(found: Mapping[str, Any]) -> str:
    rows = []
    for name, spread in found["parts"].items():
        floor = found["floor"].get(name)
        rows.append([name, *spread.cells(), number(floor), number(spread.median / floor if floor else None)])
    return table(["ms", *SPREAD, "floor", "x floor"], rows)


def show_host(found: Mapping[str, Any]) -> str:
    beyond = found["call_beyond_device"]
    lines = [table(["ms", *SPREAD], spread_rows(found["parts"])), f"sum of the medians {number(found['sum'])} ms"]
    if beyond is not None:
        lines.append(f"a call takes {number(beyond)} ms more than the device's work")
    return "\n".join(lines)


def show_kernels(found: Mapping[str, Any]) -> str:
    total = found["microseconds"]
    top = found["rows"][:TOP_KERNELS]
    rows = [
        [r["name"][:90], str(r["launches"]), number(r["microseconds"]), f"{r['microseconds'] / total:.1%}"] for r in top
    ]
    kinds = [
        [name, str(int(kind["launches"])), number(kind["microseconds"]), f"{kind['microseconds'] / total:.1%}"]
        for name, kind in found["kinds"].items()
    ]
    return "\n".join(
        [
            f"one guided step: {found['launches']} launches, {number(total)} us of kernels, at least one running for"
            f" {number(found['busy_microseconds'])} us of {number(found['span_microseconds'])} us",
            table(["kind", "launches", "us", "share"], kinds),
            "",
            table(["kernel", "launches", "us", "share"], rows),
        ]
    )


def show_peers(found: Mapping[str, Any]) -> str:
    rows, notes = [], []
    for name, peer in found.items():
        if "error" in peer:
            notes.append(f"{name} failed: {peer['error']}")
            continue
        rows.append([name, *peer["peer"].cells(), number(peer["ours"].median), f"{peer['ratio']:.2f}"])
        notes.append(f"{name}: {peer['summary']}; {peer['seconds']:.0f} s in all")
        if "latent_error" in peer:
            notes.append(f"  its final latent differs from ours by {peer['latent_error']:.1e} (relative)")
        parts = ", ".join(f"{part} {number(spread.median)}" for part, spread in peer["parts"].items())
        notes.append(f"  stages, with waits between them, ms: {parts}")
        notes.append(f"  {show_memory(peer['memory'])}")
    return "\n".join([table(["ms an image", *SPREAD, "ours in turn", "ratio"], rows), *notes])


def show_throughput(found: Mapping[str, Any]) -> str:
    good = [row for row in found["rows"] if "error" not in row]
    rows = [[str(r["samples"]), *r["call"].cells(), number(r["images_a_second"])] for r in good]
    failed = [f"{row['samples']}: failed: {row['error']}" for row in found["rows"] if "error" in row]
    return "\n".join([table(["images a call", *SPREAD, "images a second"], rows), *failed])


def show_start_up(found: Mapping[str, Any]) -> str:
    keys = ("import_seconds", "initialise_seconds", "first_image", "later_image")
    rows = [[turn, *(number(found[turn][key]) for key in keys)] for turn in ("first", "second")]
    header = ["start", "import, s", "initialise, s", "first image, ms", "later image, ms"]
    return table(header, rows) + f"\nthe second start takes {found['second_over_first']:.2f} of the first"


RUN: Dict[str, Callable[[Benchmark], Dict[str, Any]]] = {
    "floor": measure_floor,
    "images": measure_images,
    "stages": measure_stages,
    "host": measure_host,
    "kernels": measure_kernels,
    "peers": measure_peers,
    "throughput": measure_throughput,
    "start-up": measure_start_up,
    "plots": make_plots,
}
SHOWN: Dict[str, Callable[[Mapping[str, Any]], str]] = {
    "floor": show_floor,
    "images": show_images,
    "stages": show_stages,
    "host": show_host,
    "kernels": show_kernels,
    "peers": show_peers,
    "throughput": show_throughput,
    "start-up": show_start_up,
    "plots": lambda found: "\n".join(found["files"]),
}


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    start = time.monotonic()
    bench = Benchmark(args)
    bench.save()  # a folder that cannot be written is said now
    try:
        measure_about(bench)
        print(show_about(bench.results["about"]), flush=True)
        for name in SECTIONS:
            if name in args.only:
                bench.section(name, RUN[name])
    finally:
        bench.close()
        bench.save()
    print(f"\n{show_about(bench.results['about'])}\n{time.monotonic() - start:.0f} s in all; {args.output}")
    failed = [name for name, found in bench.results["sections"].items() if "error" in found]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
