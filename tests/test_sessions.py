"""Sessions on ONNX Runtime and PyTorch: the same call, the same numbers, in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch

from cldm.checkpoint import load_model
from cldm.model import ControlLDM
from cldm.weights import find_weights
from deploy.export import example_inputs, export_all
from deploy.graphs import build_graph
from deploy.manifest import ArtefactError
from deploy.spec import Build, GraphSpec, graph_specs
from runtime.ort_session import OrtSession
from runtime.torch_session import TorchSession
from runtime.workspace import Workspace
from tests.small_model import small_config

pytestmark = pytest.mark.usefixtures("one_thread")

GRAPHS = ("text", "hint", "time", "step", "decode")
BUILD = Build(small_config(), 64, 96)


@pytest.fixture(scope="module")
def model() -> ControlLDM:
    return load_model(BUILD.config, find_weights(BUILD.config))


@pytest.fixture(scope="module")
def folder(model: ControlLDM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sessions")
    export_all(BUILD, find_weights(BUILD.config), lambda: model, root)
    return root / BUILD.folder_name


def make_session(kind: str, name: str, model: ControlLDM, folder: Path) -> Any:
    spec = graph_specs(BUILD)[name]
    if kind == "onnxruntime":
        return OrtSession(folder / spec.file, spec)
    return TorchSession(build_graph(name, model, BUILD.precision, BUILD.samples), spec)


def buffers_for(spec: GraphSpec, seed: int) -> Dict[str, torch.Tensor]:
    """Inputs as in a run, and outputs full of what no graph would write."""
    inputs = {name: torch.from_numpy(value) for name, value in example_inputs(spec, BUILD, seed).items()}
    steps = inputs["timesteps"].shape[0] if "timesteps" in inputs else 0
    outputs = {}
    for name, tensor in spec.outputs.items():
        shape = [steps if isinstance(dim, str) else dim for dim in tensor.shape]
        poison = 77 if tensor.dtype == "uint8" else float("nan")
        outputs[name] = torch.full(shape, poison, dtype=getattr(torch, tensor.dtype))
    return {**inputs, **outputs}


@pytest.mark.parametrize("name", GRAPHS)
def test_both_kinds_compute_the_same_in_place(name: str, model: ControlLDM, folder: Path) -> None:
    spec = graph_specs(BUILD)[name]
    results = {}
    for kind in ("onnxruntime", "torch"):
        buffers = buffers_for(spec, seed=4)
        addresses = {key: tensor.data_ptr() for key, tensor in buffers.items()}
        inputs = {key: buffers[key].clone() for key in spec.inputs}
        make_session(kind, name, model, folder).bind(buffers).enqueue()
        assert {key: tensor.data_ptr() for key, tensor in buffers.items()} == addresses
        assert all(torch.equal(buffers[key], inputs[key]) for key in spec.inputs), "an input was written"
        results[kind] = {key: buffers[key].float().numpy() for key in spec.outputs}
    for key in spec.outputs:
        found, wanted = results["onnxruntime"][key], results["torch"][key]
        if spec.outputs[key].dtype == "uint8":
            assert np.abs(found - wanted).max() <= 1
            assert len(np.unique(found)) > 50
        else:
            assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-4


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_a_binding_reads_its_buffers_anew_each_time(kind: str, model: ControlLDM, folder: Path) -> None:
    """What a pipeline relies on: new contents behind the same addresses, no second bind."""
    buffers = buffers_for(graph_specs(BUILD)["text"], seed=4)
    bound = make_session(kind, "text", model, folder).bind(buffers)
    bound.enqueue()
    first = buffers["keys_values"].clone()
    buffers["token_ids"].add_(1).remainder_(BUILD.config.text.vocab_size)
    bound.enqueue()
    assert not torch.equal(buffers["keys_values"], first)
    buffers["token_ids"].sub_(1).remainder_(BUILD.config.text.vocab_size)
    bound.enqueue()
    assert torch.equal(buffers["keys_values"], first)


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_two_bindings_of_one_session_are_independent(kind: str, model: ControlLDM, folder: Path) -> None:
    session = make_session(kind, "hint", model, folder)
    spec = graph_specs(BUILD)["hint"]
    one, two = buffers_for(spec, seed=4), buffers_for(spec, seed=5)
    bound_one, bound_two = session.bind(one), session.bind(two)
    bound_two.enqueue()
    assert torch.isnan(one["hint_features"]).all()
    bound_one.enqueue()
    assert not torch.equal(one["hint_features"], two["hint_features"])


@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
def test_buffers_that_do_not_fit(kind: str, model: ControlLDM, folder: Path) -> None:
    session = make_session(kind, "hint", model, folder)
    good = buffers_for(graph_specs(BUILD)["hint"], seed=4)
    with pytest.raises(ValueError, match="no buffer for tensor canny"):
        session.bind({key: value for key, value in good.items() if key != "canny"})
    with pytest.raises(ValueError, match="canny must be contiguous uint8"):
        session.bind({**good, "canny": good["canny"].float()})
    with pytest.raises(ValueError, match=r"\(64, 96\)"):
        session.bind({**good, "canny": good["canny"][:32]})
    with pytest.raises(ValueError, match="contiguous"):
        session.bind({**good, "canny": good["canny"].T.contiguous().T})
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.bind(good)


def test_files_that_onnx_runtime_cannot_load(folder: Path, tmp_path: Path) -> None:
    spec = graph_specs(BUILD)["hint"]
    content = (folder / spec.file).read_bytes()
    for bad in (content[: len(content) // 2], b"not onnx", b""):
        (tmp_path / "bad.onnx").write_bytes(bad)
        with pytest.raises(ArtefactError, match="cannot load"):
            OrtSession(tmp_path / "bad.onnx", spec)
    with pytest.raises(ArtefactError, match="cannot load"):
        OrtSession(tmp_path / "missing.onnx", spec)


def test_workspace_keeps_one_tensor_a_name() -> None:
    workspace = Workspace("cpu")
    tensor = workspace.add("latent", (1, 4, 2, 3), "float32")
    assert workspace.add("latent", (1, 4, 2, 3), "float32") is tensor
    with pytest.raises(ValueError, match="disagree about latent"):
        workspace.add("latent", (1, 4, 2, 4), "float32")
    with pytest.raises(ValueError, match="disagree about latent"):
        workspace.add("latent", (1, 4, 2, 3), "float16")
    workspace.write("latent", np.ones((1, 4, 2, 3)))
    copy = workspace.read("latent")
    copy[:] = 5
    assert float(workspace["latent"].sum()) == 24
    with pytest.raises(ValueError, match="latent has shape"):
        workspace.write("latent", np.ones((4, 2, 3)))


def test_a_staged_workspace_reads_and_writes_host_copies() -> None:
    workspace = Workspace("cpu", staged=True)
    tensor = workspace.add("latent", (2, 3), "float16")
    workspace.write("latent", np.full((2, 3), 1.5))
    assert not tensor.any()
    workspace.upload("latent")
    assert bool((tensor == 1.5).all())
    tensor.fill_(7)
    assert (workspace.read("latent") == 1.5).all()
    workspace.download("latent")
    read = workspace.read("latent")
    assert read.dtype == np.float32
    assert (read == 7).all()
    read[:] = 0
    assert (workspace.read("latent") == 7).all()
    assert workspace.host("latent").data_ptr() != tensor.data_ptr()


def test_poison_spares_inputs_alone() -> None:
    workspace = Workspace("cpu", staged=True)
    for name, dtype in (("token_ids", "int32"), ("latent", "float32"), ("image", "uint8"), ("hint", "float16")):
        workspace.add(name, (2, 3), dtype).fill_(5)
        workspace.host(name).fill_(6)
    workspace.poison(harmless=["token_ids"])
    assert not workspace["token_ids"].any()
    assert bool((workspace.host("token_ids") == 6).all())
    for tensors in (workspace.__getitem__, workspace.host):
        assert bool(tensors("latent").isnan().all())
        assert bool(tensors("hint").isnan().all())
        assert bool((tensors("image") == 255).all())
