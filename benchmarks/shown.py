"""The image benchmark's results as text and as plots. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

from benchmarks.report import SPREAD, Spread, bars, curve, number, table

ON_CPU = "not measured on a CPU"
TOP_KERNELS = 25
# Ours in turn with a peer: where its rounds differ by more the machine was not the same all along.
STEADY = 0.05

Found = Mapping[str, Any]


def show_report(results: Found, sections: List[str]) -> str:
    """All that `results` hold, in the order of `sections`."""
    parts = [show_about(results["about"])]
    for name in sections:
        if name in results["sections"]:
            parts.append(show_section(name, results))
    return "\n\n".join(parts) + "\n"


def show_section(name: str, results: Found) -> str:
    """A section's title and result."""
    found = results["sections"][name]
    if "error" in found or "note" in found:
        text = found.get("note") or f"failed: {found['error']}"
    else:
        text = SHOWN[name](found)
    took = results["seconds"].get(name)
    return f"== {name}{'' if took is None else f' ({took:.1f} s)'}\n{text}"


def show_about(about: Found) -> str:
    parts = [f"{key} {about[key]}" for key in about if about[key] is not None and key != "ours"]
    return "\n".join([", ".join(parts), f"ours: {about['ours']['summary']}" if "ours" in about else ""]).rstrip()


def show_floor(found: Found) -> str:
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


def show_memory(memory: Optional[Found]) -> str:
    if memory is None:
        return f"memory of the card: {ON_CPU}"
    cells = (f"{key} {number(memory[key])} MiB" for key in ("process", "allocated", "reserved", "card_used"))
    return f"memory of the card: {', '.join(cells)} (process: {memory['process_is'] or 'nothing tells'})"


def show_images(found: Found) -> str:
    rows = [["whole image", *found["image"].cells()]]
    rows += [[f"receipt: {name}", *spread.cells()] for name, spread in found["receipt"].items()]
    ratio = found["first_image"] / found["image"].median
    return "\n".join(
        [
            table(["ms", *SPREAD], rows),
            f"first image after initialise {number(found['first_image'])} ms, {ratio:.3f} x the median;"
            f" p95 {found['p95_over_median']:.3f} x the median",
            f"at rest after initialise: {show_memory(found['memory'])}",
            found["sampling"],
            *(f"warning: {warning}" for warning in found["warnings"]),
        ]
    )


def show_stages(found: Found) -> str:
    rows = []
    for name, spread in found["parts"].items():
        floor = found["floor"].get(name)
        rows.append([name, *spread.cells(), number(floor), number(spread.median / floor if floor else None)])
    failed = [f"{name}: failed: {error}" for name, error in found["failed"].items()]
    return "\n".join([table(["ms", *SPREAD, "floor", "x floor"], rows), *failed])


def show_host(found: Found) -> str:
    beyond = found["call_beyond_device"]
    rows = [[name, *spread.cells()] for name, spread in found["parts"].items()]
    lines = [
        table(["ms", *SPREAD], rows),
        f"sum of the medians {number(found['sum'])} ms; texts that were seen before are not tokenised again",
    ]
    if beyond is not None:
        lines.append(f"a call takes {number(beyond)} ms more than the device's work")
    return "\n".join(lines)


def show_kernels(found: Found) -> str:
    total = found["microseconds"]
    top = found["rows"][:TOP_KERNELS]
    rows = [
        [r["name"][:90], str(r["launches"]), number(r["microseconds"]), f"{r['microseconds'] / total:.1%}"] for r in top
    ]
    kinds = [
        [name, str(int(kind["launches"])), number(kind["microseconds"]), f"{kind['microseconds'] / total:.1%}"]
        for name, kind in sorted(found["kinds"].items(), key=lambda item: -item[1]["microseconds"])
    ]
    return "\n".join(
        [
            f"one guided step, replayed as a CUDA graph under PyTorch's profiler: {found['launches']} launches, at"
            f" least one running for {number(found['busy_microseconds'])} us of"
            f" {number(found['span_microseconds'])} us",
            f"their times add up to {number(total)} us: a kernel that is launched before the one ahead has ended"
            " (programmatic launch) counts its waiting too, so shares are rough",
            table(["kind", "launches", "us", "share"], kinds),
            "",
            table(["kernel", "launches", "us", "share"], rows),
        ]
    )


def show_peers(found: Found) -> str:
    rows, notes = [], []
    for name, peer in found.items():
        if "error" in peer:
            notes.append(f"{name} failed: {peer['error']}")
            continue
        ours = peer["ours"]
        ratio = "-" if ours is None else f"{peer['ratio']:.2f}"
        rows.append([name, *peer["peer"].cells(), number(ours and ours.median), ratio])
        notes.append(f"{name}: {peer['summary']}; {peer['seconds']:.0f} s in all")
        notes += [f"  {line}" for line in _peer_notes(peer)]
    return "\n".join([table(["ms an image", *SPREAD, "ours in turn", "ratio"], rows), *notes])


def _peer_notes(peer: Found) -> List[str]:
    lines = []
    if "latent_error" in peer:
        lines.append(f"its final latent differs from ours by {peer['latent_error']:.1e} (relative)")
    if peer["ours_problem"]:
        lines.append(f"ours failed beside it: {peer['ours_problem']}")
    drifts = ", ".join(f"{who} {drift:.1%}" for who, drift in peer["drift"].items())
    unsteady = "; not steady, so compare with care" if max(peer["drift"].values()) > STEADY else ""
    lines.append(f"medians of its rounds apart: {drifts}{unsteady}")
    parts = ", ".join(f"{part} {number(spread.median)}" for part, spread in peer["parts"].items())
    return [*lines, f"stages, with waits between them, ms: {parts}", show_memory(peer["memory"])]


def show_throughput(found: Found) -> str:
    good = [row for row in found["rows"] if "error" not in row]
    rows = [[str(r["samples"]), *r["call"].cells(), number(r["images_a_second"]), r["tile_sizes"] or "-"] for r in good]
    failed = [f"{row['samples']}: failed: {row['error']}" for row in found["rows"] if "error" in row]
    return "\n".join([table(["images a call", *SPREAD, "images a second", "tile sizes"], rows), *failed])


def show_start_up(found: Found) -> str:
    keys = ("import_seconds", "initialise_seconds", "first_image", "later_image")
    turns = [turn for turn in ("first", "second") if found.get(turn)]
    rows = [[turn, *(number(found[turn][key]) for key in keys)] for turn in turns]
    header = ["start", "import, s", "initialise, s", "first image, ms", "later image, ms"]
    ratio = found["second_over_first"]
    told = "" if ratio is None else f"the second start takes {ratio:.2f} of the first; "
    return f"{table(header, rows)}\n{told}{found['about_first']}"


SHOWN: Dict[str, Callable[[Found], str]] = {
    "floor": show_floor,
    "images": show_images,
    "stages": show_stages,
    "host": show_host,
    "kernels": show_kernels,
    "peers": show_peers,
    "variants": show_peers,
    "throughput": show_throughput,
    "start-up": show_start_up,
    "plots": lambda found: "\n".join(found["files"]),
}


# The plots.


def draw(results: Found) -> Dict[str, str]:
    """SVGs by name; one whose numbers are lacking is left out."""
    about, sections = results["about"], results["sections"]
    height, width = (about.get("ours", {}).get(name) for name in ("height", "width"))
    subtitle = (
        f"{about.get('device')}, {about['model']} in {about['precision']}, {height} x {width},"
        f" {about['steps']} steps of batch 2; medians"
    )
    apart = f"{subtitle}; peers' stages have waits between them"
    drawings: Dict[str, str] = {}
    rows = image_parts(results)
    if rows:
        drawings["stages"] = bars("One image by stage", apart, "milliseconds", rows)
        steps = {name: {"a step": row["all steps"] / about["steps"]} for name, row in rows.items()}
        floor = sections.get("floor", {}).get("milliseconds", {}).get("step")
        mark = None if floor is None else (f"floor {number(floor)}", floor)
        drawings["step"] = bars("One guided step", apart, "milliseconds", steps, mark)
    points = [
        (r["samples"], r["images_a_second"]) for r in sections.get("throughput", {}).get("rows", []) if "call" in r
    ]
    if points:
        labels = ("images a call", "images a second")
        drawings["throughput"] = curve("Images a second against images a call", subtitle, labels, points)
    return drawings


def image_parts(results: Found) -> Dict[str, Dict[str, float]]:
    """For ours and each peer the milliseconds of an image by stage; "host, rest" is what the stages leave of it."""
    sections, steps = results["sections"], results["about"]["steps"]
    rows: Dict[str, Dict[str, float]] = {}
    stages, image = sections.get("stages", {}).get("parts", {}), sections.get("images", {}).get("image")
    if image and {"text", "hint", "step", "decode"} <= set(stages):
        rows["ours"] = _with_rest(_medians(stages, steps), image.median)
    for name, peer in [*sections.get("peers", {}).items(), *sections.get("variants", {}).items()]:
        if "parts" in peer:
            rows[name] = _with_rest(_medians(peer["parts"], steps), peer["peer"].median)
    return rows


def _medians(parts: Mapping[str, Spread], steps: int) -> Dict[str, float]:
    """Of each stage; a stage "step" is one of them, "steps" are all."""
    found = {name: parts[name].median for name in ("text", "hint", "decode") if name in parts}
    found["all steps"] = parts["steps"].median if "steps" in parts else steps * parts["step"].median
    return found


def _with_rest(parts: Mapping[str, float], total: float) -> Dict[str, float]:
    ordered = {name: parts.get(name, 0.0) for name in ("text", "hint", "all steps", "decode")}
    return {**ordered, "host, rest": max(0.0, total - sum(ordered.values()))}


def write_plots(output: Path, drawings: Mapping[str, str]) -> List[str]:
    """The files, beside the JSON."""
    from cldm.files import atomic_path

    files = []
    for name, text in drawings.items():
        files.append(output.with_name(f"{output.stem}-{name}.svg"))
        with atomic_path(files[-1]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [str(file) for file in files]
