"""Manifests: what counts as made, what is named when it does not, and the command that makes it."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Any, Dict, Optional

import pytest

import export_onnx
from cldm.config import load_config
from cldm.weights import Weights, find_weights
from deploy.manifest import (
    ROOT,
    ArtefactError,
    check_artefact,
    code_digest,
    code_files,
    export_command,
    identity,
    manifest_path,
    read_manifest,
    write_manifest,
)
from deploy.spec import Build, graph_specs
from runtime.choose import choose_model
from tests.micro_model import micro_config, write_micro

WEIGHTS = Weights(None, 7, "0123456789abcdef")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(micro_config(tmp_path / "model"), 64, 128, 2, "fp32")


@pytest.fixture
def wanted(build: Build) -> Dict[str, Any]:
    return identity(build, graph_specs(build)["hint"], WEIGHTS)


@pytest.fixture
def made(wanted: Dict[str, Any], tmp_path: Path) -> Path:
    """A file with a data file beside it, and its manifest."""
    file = tmp_path / "build" / "hint.onnx"
    file.parent.mkdir()
    file.write_bytes(b"graph")
    data = file.with_name("hint.onnx.data")
    data.write_bytes(b"weights of it")
    write_manifest(file, {**wanted, "nodes": 28}, [data, file], None)
    return file


def refused(file: Path, wanted: Dict[str, Any], cache: Optional[Path] = None) -> str:
    with pytest.raises(ArtefactError) as caught:
        check_artefact(file, wanted, cache)
    assert str(file.parent) in str(caught.value)
    return str(caught.value)


def test_what_matches_is_accepted(made: Path, wanted: Dict[str, Any], tmp_path: Path) -> None:
    for cache in (None, tmp_path / "cache.json", tmp_path / "cache.json"):
        found = check_artefact(made, wanted, cache)
        assert found["nodes"] == 28 and found["files"]["hint.onnx"]["bytes"] == 5
        assert set(found["files"]) == {"hint.onnx", "hint.onnx.data"}


def test_every_field_of_the_identity_counts(made: Path, wanted: Dict[str, Any]) -> None:
    for field in wanted:
        message = refused(made, {**wanted, field: "something else"})
        assert f"made for something else: {field} is" in message and "wanted something else" in message
        assert ";" not in message, "one difference only"
    message = refused(made, {**wanted, "height": 256, "precision": "fp16"})
    assert "precision is fp32, wanted fp16" in message and "height is 64, wanted 256" in message


def test_identity_tells_builds_apart(build: Build, wanted: Dict[str, Any]) -> None:
    spec = graph_specs(build)["hint"]
    others = [
        identity(build, graph_specs(build)["text"], WEIGHTS),
        identity(build, spec, dataclasses.replace(WEIGHTS, digest="f" * 16)),
        identity(build, spec, WEIGHTS, kind="plan"),
    ]
    for change in ({"height": 128}, {"width": 64}, {"samples": 1}, {"precision": "fp16"}):
        other = dataclasses.replace(build, **change)
        others.append(identity(other, graph_specs(other)["hint"], WEIGHTS))
    texts = [json.dumps(value, sort_keys=True) for value in [wanted, *others]]
    assert len(set(texts)) == len(texts)


def test_identity_is_of_the_code_that_makes_the_file(
    build: Build, wanted: Dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_by = {str(path.relative_to(ROOT)) for path in code_files()}
    named = {"cldm": "checkpoint controlnet model", "deploy": "export graphs onnx_files spec tracing"}
    assert {f"{folder}/{name}.py" for folder, names in named.items() for name in names.split()} <= made_by
    assert {f"ldm/{path.name}" for path in (ROOT / "ldm").glob("*.py")} <= made_by
    copies = []
    for path in code_files():
        copies.append(tmp_path / "copy" / path.relative_to(ROOT))
        copies[-1].parent.mkdir(parents=True, exist_ok=True)
        copies[-1].write_bytes(path.read_bytes())
    monkeypatch.setattr("deploy.manifest.ROOT", tmp_path / "copy")
    digests = {wanted["code"], code_digest()}
    assert len(digests) == 1, "the place of the repository must not count"
    for copy in copies:
        copy.write_bytes(copy.read_bytes() + b"\n")
        digests.add(identity(build, graph_specs(build)["hint"], WEIGHTS)["code"])
    assert len(digests) == 1 + len(copies)


def test_field_that_the_manifest_lacks(made: Path, wanted: Dict[str, Any]) -> None:
    """Such as one that a later version of the repository compares, too."""
    assert "plugin is None, wanted abc" in refused(made, {**wanted, "plugin": "abc"})


def test_no_manifest(made: Path, wanted: Dict[str, Any]) -> None:
    manifest_path(made).unlink()
    assert "hint.onnx was not made, or not to its end" in refused(made, wanted)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"files"', b"\xff\xfe\x00", b"[]", b"null", b"{}", b'{"files": []}', b'{"files": {}}']
    + [b'{"files": {"other.onnx": {}}}', b'{"files": {"hint.onnx": {}, "../other": {}}}'],
    ids=repr,
)
def test_damaged_or_foreign_manifest(content: bytes, made: Path, wanted: Dict[str, Any]) -> None:
    manifest_path(made).write_bytes(content)
    message = refused(made, wanted)
    assert "hint.onnx.json is" in message and ("damaged" in message or "not a manifest" in message)


@pytest.mark.parametrize("kept", [1, 30, 200])
def test_truncated_manifest(kept: int, made: Path, wanted: Dict[str, Any]) -> None:
    os.truncate(manifest_path(made), kept)
    assert "hint.onnx.json is damaged" in refused(made, wanted)


@pytest.mark.parametrize("entry", [None, 5, {}, {"bytes": "5"}, {"bytes": 5}, {"bytes": 5, "sha256": None}], ids=repr)
def test_manifest_without_sizes_or_hashes(entry: Any, made: Path, wanted: Dict[str, Any]) -> None:
    value = read_manifest(made)
    value["files"]["hint.onnx"] = entry
    manifest_path(made).write_text(json.dumps(value))
    refused(made, wanted)


@pytest.mark.parametrize("name", ["hint.onnx", "hint.onnx.data"])
@pytest.mark.parametrize("cached", [False, True])
def test_damaged_files(name: str, cached: bool, made: Path, wanted: Dict[str, Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache.json" if cached else None
    check_artefact(made, wanted, cache)
    member = made.with_name(name)
    whole = member.read_bytes()
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    member.write_bytes(changed)
    os.utime(member, ns=(1, 1))
    assert f"{name} is corrupt" in refused(made, wanted, cache)
    os.truncate(member, 3)
    assert f"{name} is truncated" in refused(made, wanted, cache)
    member.unlink()
    assert f"{name} is missing" in refused(made, wanted, cache)
    member.write_bytes(whole)
    check_artefact(made, wanted, cache)


def follow(command: str, build: Build, weights: Weights, folder: Path) -> None:
    """What export_onnx.py would make from the command has to be that build, from those weights, in that folder."""
    words = shlex.split(command)
    assert words[:2] == ["python3", "export_onnx.py"] and (ROOT / words[1]).is_file()
    args = export_onnx.parse_arguments(words[2:])
    config = choose_model(args.model, args.checkpoint)
    assert config == build.config
    assert Build(config, args.height, args.width, args.samples, args.precision) == build
    found = find_weights(config, args.checkpoint, args.random_weights)
    assert found.digest == weights.digest and found.seed == weights.seed
    assert args.output.resolve() == folder.resolve() and not args.no_check and args.graphs is None


def test_command_that_makes_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(str(write_micro(tmp_path / "a folder; with 'odd' names")))
    folder = tmp_path / "my builds"
    checkpoint = tmp_path / "my own.pth"
    checkpoint.write_bytes(b"x")
    for chosen in (config, load_config("tiny")):
        for weights in (
            find_weights(chosen),
            find_weights(chosen, random_seed=7),
            find_weights(chosen, random_seed=12),
            find_weights(chosen, str(checkpoint)),
        ):
            for where in (folder, ROOT / "build"):
                build = Build(chosen, 128, 192, 3, "fp16")
                follow(export_command(build, weights, where), build, weights, where)
    monkeypatch.chdir(tmp_path)
    build = Build(config, 64, 64)
    relative = find_weights(config, checkpoint.name)
    command = export_command(build, relative, Path("my builds"))
    monkeypatch.chdir("/")
    follow(command, build, relative, folder)


def test_command_names_the_seed_where_a_checkpoint_lies_ready(tmp_path: Path) -> None:
    config = micro_config(tmp_path)
    seeded = find_weights(config)
    (tmp_path / "micro.safetensors").write_bytes(b"x")
    build = Build(config, 64, 64)
    follow(export_command(build, seeded, tmp_path), build, seeded, tmp_path)
    own = find_weights(config)
    command = export_command(build, own, tmp_path)
    assert "--checkpoint" not in command and "--random-weights" not in command
    follow(command, build, own, tmp_path)


def test_command_of_the_shipped_model_is_short() -> None:
    config = load_config("tiny")
    command = export_command(Build(config, 256, 384), find_weights(config), ROOT / "build")
    assert command == ("python3 export_onnx.py --model tiny --precision fp32 --samples 1 --height 256 --width 384")
