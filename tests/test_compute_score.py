"""The command line of the score on a fake pipeline, and finding the environment."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path

import cv2
import pytest

import compute_score
import environment
from ldm.plans import exact_plan, subset_plan
from ldm.schedule import ScheduleConfig
from scoring import backbones, pictures
from tests.scoring_fakes import FakePipeline, write_pictures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that stands for the repository's, with two pictures, and without any backbone."""
    write_pictures(tmp_path / "pictures", ["bird_10.jpg", "bird_2.jpg"])
    monkeypatch.setattr(compute_score, "ROOT", tmp_path)
    monkeypatch.setattr(backbones, "METRICS_DIR", tmp_path / "metrics")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HACKATHON_BUILD_DIR", raising=False)
    return tmp_path


@pytest.fixture
def pipeline(monkeypatch):
    fake = FakePipeline()
    module = types.ModuleType("canny2image_TRT")
    module.hackathon = lambda: fake
    monkeypatch.setitem(sys.modules, "canny2image_TRT", module)
    return fake


def _main(place, *arguments):
    return compute_score.main(["--pictures", str(place / "pictures"), *arguments])


def test_whole_run(place, pipeline, capsys):
    assert _main(place, "--model", "tiny", "--repeats", "2") == 0
    assert pipeline.initialized == {"model": "tiny"}
    assert pipeline.closed
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0] == "model      fake, no weights"
    assert lines[1] == "backend    onnxruntime: no CUDA device"
    assert "PD: not measured: pt_inception-2015-12-05-6726825d.pth not found, put it at" in output.out
    assert output.out.index("bird_2.jpg") < output.out.index("bird_10.jpg")
    assert "total " in output.out
    assert "2/2" in output.err  # the progress bar
    folder = place / "build" / "score"
    assert sorted(path.name for path in folder.iterdir()) == ["contact_sheet.png", "score.csv", "score.json"]
    report = json.loads((folder / "score.json").read_text())
    assert [picture["name"] for picture in report["pictures"]] == ["bird_2.jpg", "bird_10.jpg"]
    assert report["arguments"]["repeats"] == 2
    assert len((folder / "score.csv").read_text().splitlines()) == 3
    assert cv2.imread(str(folder / "contact_sheet.png")).shape[1] > 4 * 96
    assert len(list((place / "build" / "reference").iterdir())) == 2


def test_every_option_arrives(place, pipeline):
    options = "--backend torch --precision fp16 --checkpoint a.pth --device cuda:1 --random-weights 0"
    options += " --limit 1 --seed 5 --steps 3 --warmup 0"
    output = place / "out put"
    arguments = [*options.split(), "--prompt", "", "--output", str(output), "--no-reference"]
    assert _main(place, *arguments) == 0
    assert pipeline.initialized == {
        "backend": "torch",
        "precision": "fp16",
        "checkpoint": "a.pth",
        "device": "cuda:1",
        "random_weights": 0,
    }
    assert pipeline.count("process") == 1
    call = next(call for call in pipeline.calls if call[0] == "process")
    assert (call[2][0], call[2][5], call[2][9]) == ("", 3, 5)
    assert (output / "score.json").is_file()
    assert pipeline.count("reference") == 0
    assert not (place / "build" / "reference").exists()


def test_build_folder_of_the_environment(place, pipeline, monkeypatch):
    monkeypatch.setenv("HACKATHON_BUILD_DIR", str(place / "else where"))
    assert _main(place) == 0
    assert sorted(path.name for path in (place / "else where").iterdir()) == ["reference", "score"]
    assert len(list((place / "else where" / "reference").glob("*.npz"))) == 2
    assert not (place / "build").exists()


def test_speed_arrives(place, pipeline, capsys):
    assert _main(place, "--speed", "7") == 0
    assert pipeline.initialized == {"speed": "7"}
    output = capsys.readouterr().out
    assert "sampling   as asked" in output.splitlines()[:6]
    assert output.count("sampling   as asked") == 2  # above the progress, and under the table


def test_speed_alone_compares_all_of_them(place, pipeline, capsys, monkeypatch):
    plans = [subset_plan(ScheduleConfig(), 20, (19, 12, 7, 3)), exact_plan(ScheduleConfig(), 20)]
    ran = []

    def run(image, request, plan):
        ran.append(len(plan.indices))
        return pipeline._result(image, 20 - ran[-1], request)

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(pipeline, "plans", lambda request: plans, raising=False)
    monkeypatch.setenv("HACKATHON_SPEED", "pd:5")  # one that may not be had must not end the table
    assert _main(place, "--speed", "--warmup", "0", "--output", str(place / "out")) == 0
    assert pipeline.initialized == {"speed": "exact"}
    assert ran == [20, 4, 4, 20, 20]
    output = capsys.readouterr()
    assert "2 of" in output.out and "each with 2 plans" in output.out
    assert "run(), 1 timed call a picture and plan, after 0 untimed a plan and picture size\n" in output.out
    assert "process()," not in output.out
    assert "4: 4 of 20 evaluations, subset" in output.out
    assert "an estimate" in output.out and "PD was not measured" in output.out
    assert "4/4" in output.err
    assert [path.name for path in (place / "out").iterdir()] == ["speed.json"]
    report = json.loads((place / "out" / "speed.json").read_text())
    assert [row["evaluations"] for row in report["rows"]] == [4, 20]
    assert report["rows"][0]["pictures"][0]["pixel_mean_abs"] == 16
    assert pipeline.count("reference") == 2 and pipeline.closed


def test_noise_floor_option(place, pipeline, capsys):
    assert _main(place, "--noise-floor", "--limit", "1") == 0
    assert pipeline.count("reference") == 2
    assert "Noise floor" in capsys.readouterr().out


def test_contest_folder_is_the_default_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "CONTEST_FOLDER", tmp_path / "absent")
    assert pictures.default_folder() == ROOT / "pictures"
    monkeypatch.setattr(pictures, "CONTEST_FOLDER", tmp_path)
    assert pictures.default_folder() == tmp_path
    monkeypatch.undo()
    assert str(pictures.CONTEST_FOLDER) == "/home/player/pictures_croped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "0"], "--limit must be 1 or more, got 0"),
        (["--steps", "0"], "ddim_steps must be between 1 and 1000, got 0"),
        (["--seed", "-1"], "fixed seed"),
        (["--seed", "4294967296"], "seed must be between"),
        (["--repeats", "0"], "repeats must be 1 or more"),
        (["--warmup", "-1"], "warmup must be 0 or more"),
        (["--noise-floor", "--no-reference"], "noise floor"),
        (["--pictures", "/no/such/folder"], "no picture folder at /no/such/folder"),
    ],
)
def test_bad_arguments_are_told_before_any_work(place, pipeline, capsys, arguments, message):
    assert _main(place, *arguments) == 1
    assert message in capsys.readouterr().err
    assert pipeline.initialized is None


def test_unreadable_picture_is_named_before_any_work(place, pipeline, capsys):
    (place / "pictures" / "bird_3.jpg").write_bytes(b"\xff\xd8 truncated")
    assert _main(place) == 1
    assert "bird_3.jpg is not a picture" in capsys.readouterr().err
    assert pipeline.initialized is None


def test_damaged_backbone_is_named_before_any_work(place, pipeline, capsys):
    (place / "metrics").mkdir()
    (place / "metrics" / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"half")
    assert _main(place) == 1
    assert "pt_inception-2015-12-05-6726825d.pth is truncated or another file" in capsys.readouterr().err
    assert pipeline.initialized is None


def test_unwritable_output_is_told_before_any_work(place, pipeline, capsys):
    (place / "file").write_text("")
    assert _main(place, "--output", str(place / "file" / "score")) == 1
    assert "cannot write" in capsys.readouterr().err
    assert pipeline.initialized is None


def test_full_disk_is_told_before_any_work(place, pipeline, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    assert _main(place) == 1
    assert "score has 0 MB free" in capsys.readouterr().err
    assert pipeline.initialized is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_read_only_output_is_told_before_any_work(place, pipeline, capsys):
    folder = place / "read-only"
    folder.mkdir(mode=0o500)
    assert _main(place, "--output", str(folder)) == 1
    assert "cannot write" in capsys.readouterr().err
    assert pipeline.initialized is None


def test_errors_of_the_pipeline_close_it(place, pipeline, capsys):
    def fail(*arguments):
        raise ValueError("the decoder's output is flat")

    pipeline.process = fail
    assert _main(place) == 1
    assert "bird_2.jpg: the decoder's output is flat" in capsys.readouterr().err
    assert pipeline.closed
    assert list((place / "build" / "score").iterdir()) == []


@pytest.mark.parametrize("where", ["process", "reference"])
def test_interrupt_leaves_whole_files_only(place, pipeline, capsys, monkeypatch, where):
    run = getattr(pipeline, where)

    def interrupted(*arguments, **keywords):
        if pipeline.count(where) == 1:
            raise KeyboardInterrupt
        return run(*arguments, **keywords)

    monkeypatch.setattr(pipeline, where, interrupted)
    assert _main(place, "--warmup", "0") == 130
    assert "interrupted" in capsys.readouterr().err
    assert pipeline.closed
    files = [path for path in (place / "build").rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".npz"]


def test_interrupt_while_writing_leaves_the_old_report(place, pipeline, monkeypatch):
    assert _main(place) == 0
    folder = place / "build" / "score"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(self, *arguments, **keywords):
        with open(self, "w") as file:
            file.write("half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    assert _main(place) == 130
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- the real thing


def _score_tiny(folder, output):
    """`compute_score.py` as a user starts it, from another folder."""
    command = [sys.executable, str(ROOT / "compute_score.py"), "--model", "tiny", "--backend", "onnxruntime"]
    command += ["--limit", "1", "--steps", "2", "--output", str(output)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HACKATHON_")}
    environ.update(HACKATHON_BUILD_DIR=str(folder / "made"), TORCH_HOME=str(folder / "torch"))
    done = subprocess.run(command, cwd=str(folder), env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((output / "score.json").read_text())


def test_main_job_on_the_tiny_model(tmp_path, tiny_weights):
    outputs = [tmp_path / "first", tmp_path / "second"]
    (text, first), (_, second) = [_score_tiny(tmp_path, output) for output in outputs]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "made", "second"]
    assert sorted(path.name for path in outputs[0].iterdir()) == ["contact_sheet.png", "score.csv", "score.json"]
    assert len(list((tmp_path / "made" / "reference").glob("*.npz"))) == 1
    assert cv2.imread(str(outputs[0] / "contact_sheet.png")).shape[1] > 4 * 384

    (picture,), (again,) = first["pictures"], second["pictures"]
    assert picture["receipt"]["backend"] == "onnxruntime" and picture["receipt"]["evaluations"] == 2
    assert picture["receipt"]["weights"] == str(tiny_weights) == "tiny.safetensors" in text
    assert (picture["receipt"]["width"], picture["receipt"]["height"]) == (384, 256)
    values = picture["values"]
    assert 0 < values["latent_relative_error"] < 1e-4
    assert values["pixel_max_abs"] <= 1 and values["latency_ms"] > 0
    absent = {"pd": "pt_inception-2015-12-05-6726825d.pth", "lpips": "alexnet-owt-7be5be79.pth"}
    for key, name in absent.items():
        if (backbones.METRICS_DIR / name).is_file():
            assert values[key] < 1
        else:
            place = backbones.METRICS_DIR / name
            assert first["not_measured"][key] == f"not measured: {name} not found, put it at {place}"
            assert f": {first['not_measured'][key]}\n" in text and key not in values

    assert (picture["reference_cached"], again["reference_cached"]) == (False, True)
    assert {**again["values"], "latency_ms": 0} == {**values, "latency_ms": 0}
    assert again["reference_receipt"] == picture["reference_receipt"]


# --- environment


def _repository(folder, python_lines=None):
    """A folder with environment.py, a script that needs a package, and perhaps an interpreter in .venv."""
    folder.mkdir(exist_ok=True)
    shutil.copy(str(ROOT / "environment.py"), str(folder))
    (folder / "script.py").write_text(
        "import os, sys\n"
        "from environment import ensure_environment\n"
        "ensure_environment(['json', 'package_of_the_test'])\n"
        "import package_of_the_test\n"
        "print('ran', sys.argv[1:], os.getcwd(), [name for name in os.environ if 'CANNY2IMAGE' in name])\n"
    )
    if python_lines is not None:
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("\n".join(["#!/bin/sh", *python_lines, f'exec "{sys.executable}" "$@"', ""]))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return folder / "script.py"


def _start(script, *arguments, cwd):
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=str(cwd), capture_output=True, text=True, timeout=60)


def test_the_program_starts_again_in_the_environment_that_has_the_packages(tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "package_of_the_test.py").write_text("")
    script = _repository(tmp_path / "a clone", [f'export PYTHONPATH="{packages}"'])
    done = _start(script, "--prompt", "two words", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"ran ['--prompt', 'two words'] {tmp_path} []"


@pytest.mark.parametrize("lines", [None, ["true"]], ids=["no environment", "an environment that lacks it too"])
def test_without_the_packages_the_message_names_them(tmp_path, lines):
    done = _start(_repository(tmp_path / "clone", lines), cwd=tmp_path)
    assert done.returncode == 1
    assert "lacks the Python packages package_of_the_test." in done.stderr
    assert "bash preprocess.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interpreter_with_the_packages_goes_on(monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *arguments: pytest.fail("started again without need"))
    monkeypatch.setenv(environment.GUARD, "1")
    environment.ensure_environment(["json", "numpy"])
    assert environment.GUARD not in os.environ


def test_missing_packages():
    assert environment.missing_packages(["json", "absent_package"]) == ["absent_package"]
    assert environment.missing_packages(["absent_package or json", "json or absent_package"]) == []
    assert environment.missing_packages(["absent_a or absent_b"]) == ["absent_a or absent_b"]


def test_help_needs_no_packages():
    command = [sys.executable, "-S", str(ROOT / "compute_score.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--noise-floor" in done.stdout
