"""The image benchmark: its statistics, plots and counts of work, its contenders, and that one failure costs one row."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import images
from benchmarks.contenders import EagerGraphs, Job, summarise_kernels
from benchmarks.device import Work, busy_microseconds, count_work, kind_of
from benchmarks.report import Spread, as_json, bars, curve, from_json, number, round_up, table
from benchmarks.tile_sizes import ScaledTables, scale_key, scale_table
from benchmarks.workers import Worker, WorkerError
from canny2image_TRT import hackathon
from cldm.config import load_config
from deploy.spec import Build
from runtime.fused.build import SHIPPED
from runtime.fused.tuning import AttentionConfig, Config, Tuning, card_slug, read_table, write_table
from tests.diffusers_ddim import original_scheduler
from tests.interpreted import needs_triton
from tests.micro_model import write_micro
from tests.test_fused_tuning import H200, asked

ROOT = Path(__file__).resolve().parent.parent
PICTURE = str(ROOT / "pictures" / "eagle.jpg")
FAKE = "tests.benchmark_fakes:Fake"
SVG = "{http://www.w3.org/2000/svg}"


# --- Statistics and tables ---


def test_spread_of_known_samples() -> None:
    spread = Spread.of([float(i) for i in range(101)][::-1])
    assert (spread.count, spread.median, spread.p5, spread.p95) == (101, 50.0, 5.0, 95.0)
    assert (spread.lowest, spread.highest) == (0.0, 100.0)
    assert spread.relative == pytest.approx(1.8)
    assert spread.cells() == ["50.0", "5.00", "95.0", "180.0%", "101"]
    assert Spread.of([1.0, 2.0]).p95 == pytest.approx(1.95)  # linear between the samples


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_spread_refuses_what_is_no_measurement(samples: List[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Spread.of(samples)


@pytest.mark.parametrize(
    "value, text",
    [(None, "-"), (0, "0.000"), (0.01234, "0.0123"), (0.000123, "0.0001"), (3.14159, "3.14"), (12345.6, "12,346")],
)
def test_number(value: Any, text: str) -> None:
    assert number(value) == text


def test_table_aligns_and_checks() -> None:
    lines = table(["name", "ms"], [["a", "1.25"], ["longer", "10"]]).splitlines()
    assert lines == ["name      ms", "a       1.25", "longer    10"]
    with pytest.raises(ValueError, match="2 cells"):
        table(["name", "ms"], [["a"]])


def test_json_holds_spreads_as_mappings() -> None:
    found = json.loads(json.dumps(as_json({"a": [Spread.of([1.0, 3.0])], 2: None})))
    assert found["a"][0]["median"] == 2.0 and found["a"][0]["relative"] == pytest.approx(0.9)
    assert found["2"] is None


def test_json_comes_back_as_spreads() -> None:
    results = {"a": [Spread.of([1.0, 3.0]), None], "b": {"median": 2.0}, "c": "text"}
    assert from_json(json.loads(json.dumps(as_json(results)))) == results


# --- Plots ---


@pytest.mark.parametrize("value, end", [(0, 1), (1, 1), (1.01, 1.5), (76, 80), (81, 100), (1165, 1500), (0.26, 0.3)])
def test_axis_end(value: float, end: float) -> None:
    assert round_up(value) == pytest.approx(end)


def test_bars_are_as_long_as_their_values() -> None:
    rows = {"ours & co": {"text": 10.0, "steps": 30.0}, "peer": {"steps": 80.0}}
    root = ElementTree.fromstring(bars("A <title>", "below", "ms", rows, ("floor", 20.0)))
    boxes = [box for box in root.iter(SVG + "rect") if box.find(SVG + "title") is not None]
    widths = {box.find(SVG + "title").text: float(box.get("width")) for box in boxes}
    assert widths["steps: 80.0"] / widths["text: 10.0"] == pytest.approx(8, rel=1e-3)
    colours = {box.find(SVG + "title").text: box.get("fill") for box in boxes}
    assert colours["steps: 80.0"] == colours["steps: 30.0"] != colours["text: 10.0"]
    starts = {box.find(SVG + "title").text: float(box.get("x")) for box in boxes}
    assert starts["steps: 30.0"] == pytest.approx(starts["text: 10.0"] + widths["text: 10.0"], abs=0.1)
    texts = {text.text for text in root.iter(SVG + "text")}
    assert {"A <title>", "ours & co", "floor", "40.0", "80.0"} <= texts
    right = max(starts[name] + widths[name] for name in widths)
    assert right <= float(root.get("width"))


def test_curve_goes_up_with_its_values() -> None:
    root = ElementTree.fromstring(curve("title", "below", ("x", "y"), [(1, 10.0), (2, 15.0), (8, 20.0)]))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(SVG + "circle")]
    assert (dots[0][1] - dots[1][1]) == pytest.approx(dots[1][1] - dots[2][1], abs=0.2) and dots[2][1] < dots[0][1]
    assert (dots[2][0] - dots[1][0]) == pytest.approx(6 * (dots[1][0] - dots[0][0]), abs=0.5)


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_plots_refuse_what_cannot_be_drawn(value: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        bars("t", "s", "ms", {"a": {"b": value}})
    with pytest.raises(ValueError, match="at least 0"):
        curve("t", "s", ("x", "y"), [(1, value)])
    with pytest.raises(ValueError, match="at least 0"):
        curve("t", "s", ("x", "y"), [])


# --- Work, floors and kernels ---


def test_work_of_sd15() -> None:
    """Against the known 740 GFLOP and 2.44 GB of ControlNet and UNet, of which the hoisted part leaves the step."""
    work = count_work(Build(load_config("sd15"), 256, 384, 1, "fp16"), 20)
    hoisted = work["hint"].flops  # once a step in the plain networks, like the text's keys and values
    assert 0.96 < (work["step"].flops + hoisted) / 740e9 <= 1.0
    assert 0.93 < work["step"].weight_bytes / 2.44e9 < 0.96
    assert work["decode"].flops / 935e9 == pytest.approx(1, abs=0.002)
    assert work["step"].floor(720e12, 4.3e12) == pytest.approx(1.0, abs=0.01)


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    assert Work(10**12, 10**9).floor(1e15, 1e12) == pytest.approx(1.0)
    assert Work(10**12, 4 * 10**9).floor(1e15, 1e12) == pytest.approx(4.0)


def test_busy_time_counts_overlaps_once() -> None:
    assert busy_microseconds([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.7)]) == pytest.approx(4.0)


def test_kernels_are_summed_by_name() -> None:
    found = summarise_kernels([("gemm_a", 0.0, 4.0), ("flash_fwd", 2.0, 8.0), ("gemm_a", 9.0, 11.0)])
    first = {"name": "gemm_a", "kind": "matrix product", "launches": 2, "microseconds": 6.0}
    assert found["rows"] == [first, {"name": "flash_fwd", "kind": "attention", "launches": 1, "microseconds": 6.0}]
    assert (found["launches"], found["microseconds"]) == (3, 12.0)
    assert (found["busy_microseconds"], found["span_microseconds"]) == (10.0, 11.0)
    with pytest.raises(RuntimeError, match="no kernel"):
        summarise_kernels([])


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("triton_red_fused_native_group_norm_3", "norm"),
        ("triton_poi_fused_add_convolution_7", "elementwise, fused"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16", "convolution"),
        ("nvjet_hsh_128x128_64x5", "matrix product"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("something_else", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


# --- Tile sizes for several images ---


@pytest.mark.parametrize(
    "key, scaled",
    [
        ("conv nets=2 2x16x24 n=640 cin=320 tail=0", "conv nets=2 8x16x24 n=640 cin=320 tail=0"),
        ("up-conv nets=4 1x32x48 n=512 cin=512 tail=0", "up-conv nets=4 4x32x48 n=512 cin=512 tail=0"),
        ("linear-gated nets=1 m=1536 n=1280 cin=320 tail=0", "linear-gated nets=1 m=6144 n=1280 cin=320 tail=0"),
        ("causal attention 77x77 dim=64 heads=24", "causal attention 77x77 dim=64 heads=96"),
    ],
)
def test_keys_of_four_images(key: str, scaled: str) -> None:
    assert scale_key(key, 4) == scaled
    with pytest.raises(ValueError, match="no key of a problem"):
        scale_key("a title", 4)


def test_scaled_tiles_share_fewer_sums_and_measured_ones_stay() -> None:
    linear, twice = "linear nets=1 m=24 n=8 cin=8 tail=0", "linear nets=1 m=48 n=8 cin=8 tail=0"
    attention = "attention 24x24 dim=40 heads=16"
    table = {linear: [64, 32, 64, 4, 4, 6], twice: [128, 32, 64, 4, 4, 1], attention: [64, 32, 4, 2]}
    scaled = scale_table(table, 4)
    assert scaled["linear nets=1 m=96 n=8 cin=8 tail=0"] == [64, 32, 64, 4, 4, 1]
    assert scaled["attention 24x24 dim=40 heads=64"] == [64, 32, 4, 2]
    assert scale_table(table, 2)[twice] == table[twice] and scale_table(table, 2)[linear] == table[linear]


@needs_triton
@pytest.mark.parametrize("samples", [2, 8])
def test_scaled_table_has_all_that_more_images_ask_for(samples: int) -> None:
    """What it lacked would be tuned, for minutes; what did not fit would be passed over for an estimate."""
    table = scale_table(read_table(SHIPPED / f"{card_slug(H200)}.json"), samples)
    problems, attentions = asked(256, 384, samples)
    tuning = Tuning(H200, table)
    for problem in problems:
        assert tuning.config(problem) == Config(*table[problem.key()]), problem
    for attention in attentions:
        assert tuning.attention(attention) == AttentionConfig(*table[attention.key()]), attention


@needs_triton
def test_scaled_tables_lie_where_the_networks_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.fused.tune.card_of", lambda device: H200)
    name, key = f"{card_slug(H200)}.json", "linear nets=1 m=7 n=640 cin=640 tail=0"
    write_table(tmp_path / "build" / "tuning" / name, H200, {}, {key: [64, 32, 64, 4, 4, 4]})
    tables = ScaledTables(tmp_path / "build", tmp_path / "scaled", "cuda", 2)
    path = tmp_path / "scaled" / "tuning" / name
    table = read_table(path)
    assert table[key.replace("m=7", "m=14")] == [64, 32, 64, 4, 4, 2] and set(read_table(SHIPPED / name)) < set(table)
    assert tables.describe() == "scaled from those for one image"
    write_table(path, H200, {}, {**table, key.replace("m=7", "m=8"): [64, 32, 64, 4, 4]})
    assert tables.describe() == "scaled from those for one image, 1 measured"


# --- Contenders ---


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_micro(tmp_path_factory.mktemp("benchmark") / "model"))


def micro_job(micro: str, **more: Any) -> Dict[str, Any]:
    job = {"model": micro, "picture": PICTURE, "random_weights": 3, "steps": 3, "resolution": 64}
    return {**job, "device": "cpu", "precision": "fp32", **more}


def test_eager_graphs_paint_what_the_pipeline_paints(micro: str) -> None:
    job = micro_job(micro)
    contender = EagerGraphs(job)
    assert "eager" in contender.prepare()["summary"]
    engine = hackathon()
    _, height, width = Job(**job).load_picture()
    engine.initialize(micro, "torch", "fp32", device="cpu", random_weights=3, height=height, width=width, speed="exact")
    try:
        import cv2

        result = engine.run(cv2.imread(PICTURE), Job(**job).request)
    finally:
        engine.close()
    latent = np.asarray(contender.latent(), np.float32).reshape(result.latent.shape)
    assert np.array_equal(latent, result.latent)
    assert np.array_equal(contender._chain.images()[0], result.images[0])
    parts = contender.parts(2)
    assert list(parts) == ["host", "text", "hint", "steps", "decode"]
    assert all(len(samples) == 2 and min(samples) > 0 for samples in parts.values())


def test_timed_step_keeps_the_latent(micro: str) -> None:
    contender = EagerGraphs(micro_job(micro))
    contender.prepare()
    chain = contender._chain
    step = chain.stages()["step"]
    for i in range(4):
        step(i)
    assert torch.equal(chain._tensors["latent_0"], chain._tensors["initial"])
    assert chain._tensors["noise_0"].isfinite().all() and chain._tensors["noise_0"].std() > 0


@pytest.mark.parametrize("option", ["device", "precision"])
def test_contender_without_a_place_says_so(micro: str, option: str) -> None:
    with pytest.raises(ValueError, match="needs a device and a precision"):
        EagerGraphs(micro_job(micro, **{option: None})).prepare()


def test_picture_that_cannot_be_read(micro: str) -> None:
    with pytest.raises(ValueError, match="cannot read the picture nowhere.jpg"):
        EagerGraphs(micro_job(micro, picture="nowhere.jpg"))


def test_diffusers_networks_have_sd15s_size() -> None:
    from benchmarks.peers import build_networks

    with torch.device("meta"):
        networks = build_networks(load_config("sd15"))
    networks["decoder"] = networks["vae"].decoder
    counts = {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in networks.items()}
    wanted = {"unet": 859.5, "controlnet": 361.3, "decoder": 49.5, "text_encoder": 123.1}
    assert {name: round(counts[name], 1) for name in wanted} == wanted


def test_diffusers_pipeline_runs(micro: str) -> None:
    from benchmarks.peers import Diffusers

    peer = Diffusers(micro_job(micro))
    prepared = peer.prepare()
    assert "eager" in prepared["summary"] and "not finite" not in prepared["summary"]
    _, height, width = Job(**micro_job(micro)).load_picture()
    picture = peer._run()
    assert picture.shape == (1, height, width, 3) and picture.dtype == np.uint8 and picture.std() > 0
    start = time.perf_counter()
    parts = peer.parts(1)
    assert set(parts) == {"host", "text", "steps", "decode"}
    assert sum(sum(samples) for samples in parts.values()) <= 1e3 * (time.perf_counter() - start)
    theirs, original = peer._pipeline.scheduler, original_scheduler(20)
    theirs.set_timesteps(20)
    assert torch.equal(theirs.timesteps, original.timesteps)
    assert torch.equal(theirs.alphas_cumprod, original.alphas_cumprod)
    assert theirs.final_alpha_cumprod == original.final_alpha_cumprod


# --- Workers ---


def test_worker_survives_errors_and_tells_of_its_end(tmp_path: Path) -> None:
    worker = Worker(FAKE, {}, tmp_path / "log", {"FAKE_VARIABLE": "set"})
    try:
        assert worker.ask("prepare", 60) == {"summary": "fake", "variable": "set"}
        with pytest.raises(WorkerError, match="TypeError.*count"):
            worker.ask("images", 60)
        assert worker.ask("images", 60, count=2) == [2.0, 2.0]
        with pytest.raises(WorkerError, match="(?s)status 7 during die.*last words"):
            worker.ask("die", 60)
        assert not worker.alive
        with pytest.raises(WorkerError, match="status 7"):
            worker.ask("images", 60, count=1)
    finally:
        worker.close()
    assert "a library's noise" in (tmp_path / "log").read_text(encoding="utf-8")


def test_worker_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    worker = Worker(FAKE, {}, tmp_path / "log")
    worker.ask("prepare", 60)
    with pytest.raises(WorkerError, match="hang was not done in 0 s"):
        worker.ask("hang", 0.2)
    assert not worker.alive


def is_running(process: int) -> bool:
    """Whether it is there, and not only because nobody has asked how it ended."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ended_worker_leaves_no_process(tmp_path: Path) -> None:
    note = tmp_path / "note"
    worker = Worker(FAKE, {}, tmp_path / "log")
    with pytest.raises(WorkerError, match="not done in"):
        worker.ask("hang_with_child", 3, note=str(note))
    processes = [int(word) for word in note.read_text(encoding="utf-8").split()]
    wait_until(lambda: not any(is_running(process) for process in processes))


def test_killed_benchmark_leaves_no_worker(tmp_path: Path) -> None:
    """Whatever the worker is at: nothing tells it but the end of its orders."""
    note = tmp_path / "note"
    code = (
        "from pathlib import Path; from benchmarks.workers import Worker; import sys;"
        "Worker(sys.argv[1], {}, Path(sys.argv[2])).ask('hang_with_child', 600, note=sys.argv[3])"
    )
    program = subprocess.Popen([sys.executable, "-c", code, FAKE, str(tmp_path / "log"), str(note)], cwd=str(ROOT))
    wait_until(lambda: note.is_file() and note.read_text(encoding="utf-8") != "")
    worker, child = (int(word) for word in note.read_text(encoding="utf-8").split())
    assert is_running(worker)
    program.kill()
    program.wait()
    wait_until(lambda: not is_running(worker))
    os.kill(child, signal.SIGKILL)


# --- The command ---


def test_command_reports_and_survives_failures(
    micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other are slow on a busy machine
    monkeypatch.setitem(images.PEERS, "diffusers-eager", fake_peer(refuse="no memory is left"))
    monkeypatch.setitem(images.PEERS, "ours-eager", fake_peer())
    monkeypatch.setitem(images.RUN, "host", lambda bench: 1 / 0)
    output = tmp_path / "out.json"
    arguments = ["--model", micro, "--backend", "torch", "--device", "cpu", "--random-weights", "3"]
    arguments += ["--steps", "2", "--resolution", "64"]
    arguments += ["--repeats", "3", "--peers", "diffusers-eager,ours-eager", "--output", str(output)]
    arguments += ["--only", "floor,images,stages,host,kernels,peers,variants,plots"]
    assert images.main(arguments) == 1  # as a section failed
    results = json.loads(output.read_text(encoding="utf-8"))
    sections = results["sections"]
    assert "ZeroDivisionError" in sections["host"]["error"]
    assert sections["images"]["image"]["count"] == 3 and sections["images"]["memory"] is None
    assert set(sections["stages"]["parts"]) == {"text", "hint", "time", "step", "decode"}
    assert sections["kernels"]["note"] == "not measured on a CPU"
    assert sections["peers"]["diffusers-eager"]["error"] == "RuntimeError: no memory is left"
    peer = sections["variants"]["ours-eager"]
    assert peer["ratio"] == pytest.approx(2.0 / peer["ours"]["median"]) and peer["latent_error"] == 1.0
    assert set(results["seconds"]) == set(sections)
    assert results["about"]["ours"]["height"] == 64 and results["about"]["torch"] == torch.__version__
    assert [Path(file).name for file in sections["plots"]["files"]] == ["out-stages.svg", "out-step.svg"]
    drawn = ElementTree.parse(sections["plots"]["files"][0]).getroot()
    assert {"all steps: 1.00", "host, rest: 0.500"} <= {title.text for title in drawn.iter(SVG + "title")}
    ElementTree.parse(sections["plots"]["files"][1])
    printed = capsys.readouterr().out
    written = output.with_suffix(".txt").read_text(encoding="utf-8")
    for text in (printed, written):
        assert "whole image" in text and "failed: ZeroDivisionError" in text and "diffusers-eager failed:" in text


def fake_peer(seconds: float = 0.0, **options: Any) -> images.Peer:
    return images.Peer(FAKE, options, "json", seconds)


@pytest.fixture
def card(micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Dict[str, Any]]:
    """Runs the command on a card that is not there, with contenders that pretend; gives what it wrote."""
    monkeypatch.setattr("runtime.choose.cuda_problem", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(images, "OURS", "tests.benchmark_fakes:FakeOurs")
    monkeypatch.setattr(images, "DEVICE", "tests.benchmark_fakes:FakeDevice")
    monkeypatch.setitem(images.PEERS, "diffusers-compiled", fake_peer())
    monkeypatch.setitem(images.PEERS, "diffusers-eager", fake_peer(refuse="no memory is left"))
    monkeypatch.setitem(images.PEERS, "ours-eager", fake_peer())
    output, build = tmp_path / "out.json", tmp_path / "build"

    def run(*more: str) -> Dict[str, Any]:
        arguments = ["--model", micro, "--samples", "1,2", "--output", str(output), "--build-dir", str(build), *more]
        images.main(arguments)
        assert not (build / "benchmarks" / "work").exists()
        return dict(json.loads(output.read_text(encoding="utf-8")), text=output.with_suffix(".txt").read_text())

    return run


def test_command_on_a_card(card: Callable[..., Dict[str, Any]]) -> None:
    results = card()
    sections = results["sections"]
    assert set(sections) == set(images.SECTIONS) == set(results["seconds"]) == set(results["at"])
    assert not [name for name, found in sections.items() if "error" in found]
    assert sections["images"]["image"]["count"] == 200 == len(sections["images"]["samples"])
    assert sections["images"]["memory"]["process"] == 3.0
    # The stage that fails takes its process with it, and the others' times are there all the same.
    assert set(sections["stages"]["parts"]) == {"text", "hint", "decode", "step", "chain"}
    assert "cannot be captured" in sections["stages"]["failed"]["time"]
    assert sections["host"]["call_beyond_device"] == pytest.approx(0.5)
    assert sections["peers"]["diffusers-eager"]["error"] == "RuntimeError: no memory is left"
    peer = sections["peers"]["diffusers-compiled"]
    assert peer["ratio"] == pytest.approx(2.0 / 1.5) and peer["drift"] == {"peer": 0.0, "ours": 0.0}
    assert (sections["start-up"]["first"]["initialise_seconds"], sections["start-up"]["second_over_first"]) == (8, 0.25)
    rows = sections["throughput"]["rows"]
    assert [(row["samples"], row["tile_sizes"]) for row in rows] == [(1, None), (2, "scaled")]
    assert [row["images_a_second"] for row in rows] == pytest.approx([1e3 / 1.5] * 2)
    assert len(sections["plots"]["files"]) == 3
    assert "waiting too" in results["text"] and "tma_matmul_kernel" in results["text"]


def test_one_section_again_leaves_the_others(
    card: Callable[..., Dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = card("--only", "images,stages,peers,throughput", "--peers", "diffusers-compiled", "--repeats", "6")
    after = card("--only", "peers,throughput,plots", "--samples", "4", "--peers", "diffusers-eager")
    assert after["sections"]["images"] == before["sections"]["images"] and after["at"]["images"]
    assert set(after["sections"]["peers"]) == {"diffusers-compiled", "diffusers-eager"}
    assert [row["samples"] for row in after["sections"]["throughput"]["rows"]] == [1, 2, 4]
    assert len(after["sections"]["plots"]["files"]) == 3
    assert "== images" in after["text"]
    monkeypatch.setitem(images.RUN, "images", lambda bench: 1 / 0)
    assert card("--only", "images")["sections"]["images"] == before["sections"]["images"]
    monkeypatch.setenv("FAKE_CARD", "another card")
    with pytest.raises(SystemExit, match="another kind of run .device a card there, another card here.; name another"):
        card("--only", "images")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["about"]["device"] == "a card"


def test_peers_have_their_rows_without_ours(
    card: Callable[..., Dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_OURS_REFUSES", "no kernel for this card")
    sections = card("--only", "images,peers,throughput", "--peers", "diffusers-compiled")["sections"]
    assert sections["images"]["error"] == "RuntimeError: no kernel for this card"
    peer = sections["peers"]["diffusers-compiled"]
    assert peer["peer"]["median"] == 2.0 and peer["ours"] is None
    assert peer["ours_problem"] == "ours is not started again: RuntimeError: no kernel for this card"
    assert all("no kernel" in row["error"] for row in sections["throughput"]["rows"])


def test_what_would_not_end_in_time_is_not_begun(
    card: Callable[..., Dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(images.SECONDS, "images", 1.0)
    monkeypatch.setitem(images.SECONDS, "kernels", 500.0)
    monkeypatch.setattr(images, "SAMPLES_SECONDS", 500.0)
    monkeypatch.setitem(images.PEERS, "diffusers-compiled", fake_peer(seconds=500.0))
    results = card("--budget-seconds", "300", "--peers", "diffusers-compiled", "--only", "peers,throughput,kernels")
    sections = results["sections"]
    assert sections["peers"]["diffusers-compiled"]["error"].startswith("not begun: it takes some 500 s, and of the 300")
    assert "not begun" in sections["kernels"]["error"] and "== kernels" in results["text"]
    assert ["not begun" in row.get("error", "") for row in sections["throughput"]["rows"]] == [False, True]


def test_a_section_that_hangs_leaves_time_to_the_next(card: Callable[..., Dict[str, Any]], micro: str) -> None:
    args = images.parse_arguments(["--model", micro, "--device", "cuda", "--build-dir", micro + "-build"])
    args.budget_seconds = 1000.0
    bench = images.Benchmark(args)
    with bench.within(100.0):
        assert 170 < bench.left <= 180
        with bench.within(10.0):
            assert 40 < bench.left <= 45
        with pytest.raises(WorkerError, match="not begun"), bench.within(500.0):
            pass
        assert bench.left > 170
    assert bench.left > 990


def test_sections_after_the_budget_are_not_begun(micro: str, tmp_path: Path) -> None:
    args = images.parse_arguments(["--model", micro, "--device", "cpu", "--output", str(tmp_path / "out.json")])
    args.budget_seconds = 0.0
    bench = images.Benchmark(args)
    bench.section("images", images.RUN["images"])
    assert "not begun" in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["sections"]["images"]["error"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "image"], "unknown section image"),
        (["--peers", "them"], "unknown peer them"),
        (["--samples", "1,x"], "invalid literal"),
        (["--samples", "0"], "at least 1"),
        (["--model", "huge"], "no model config"),
        (["--picture", "nowhere.jpg"], "no picture nowhere.jpg"),
        (["--output", "there.txt"], "to be a JSON file, not there.txt"),
        (["--device", "cuda:first"], "--device is cpu, cuda or cuda:1"),
        (["--device", "tpu"], "--device is cpu, cuda or cuda:1"),
    ],
)
def test_command_refuses_bad_arguments(arguments: List[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        images.parse_arguments(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_processes_that_compile_norms_ahead_end_with_their_time() -> None:
    """None of them is waited for, and none is left."""
    from benchmarks import group_norm

    begin = time.monotonic()
    assert group_norm.compile_ahead(["--limit", "1"], workers=2, seconds=0.2) == 0
    assert time.monotonic() - begin < 5
