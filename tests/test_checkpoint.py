"""Loading of checkpoints of every kind, good and bad, what it costs in memory, and seeded random weights."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
from safetensors.torch import save_file

from cldm.checkpoint import DERIVED, load_model
from cldm.config import ModelConfig, load_config
from cldm.model import ControlLDM
from cldm.weights import RANDOM_WEIGHTS_VERSION, CheckpointError, Weights, find_weights
from tests.micro_model import micro_config, shared_config, state_of

ROOT = Path(__file__).resolve().parent.parent
State = Dict[str, torch.Tensor]
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return shared_config(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def state(config: ModelConfig) -> State:
    return state_of(config, seed=3)


def save_zip(state: Any, path: Path) -> None:
    torch.save(state, path)


def save_old(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_safe(state: State, path: Path) -> None:
    save_file(state, str(path))


KINDS = {
    "safetensors": ("a.safetensors", save_safe),
    "pth": ("a.pth", save_zip),
    "ckpt with a nested state_dict": (
        "a.ckpt",
        lambda state, path: save_zip({"epoch": 3, "global_step": 7, "state_dict": state}, path),
    ),
    "old format": ("a.pth", save_old),
    "old format, nested, upper-case suffix": (
        "a.CKPT",
        lambda state, path: save_old({"state_dict": state, "lr": 1e-4}, path),
    ),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def load(config: ModelConfig, path: Path) -> ControlLDM:
    return load_model(config, find_weights(config, str(path)))


def refused(config: ModelConfig, path: Path) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load(config, path)
    return str(caught.value)


def assert_holds(model: ControlLDM, state: State) -> None:
    found = model.state_dict()
    assert set(found) == set(state)
    for name, tensor in found.items():
        assert tensor.device.type == "cpu" and tensor.dtype == torch.float32, name
        assert not tensor.requires_grad
        assert torch.equal(tensor, state[name].float()), name


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_kind_and_type_loads_to_equal_fp32(
    kind: str, dtype: torch.dtype, config: ModelConfig, state: State, tmp_path: Path
) -> None:
    name, save = KINDS[kind]
    stored = {key: tensor.to(dtype) for key, tensor in state.items()}
    save(stored, tmp_path / name)
    model = load(config, tmp_path / name)
    assert_holds(model, stored)
    assert not model.training


@kinds
def test_loaded_weights_do_not_alias_the_file(kind: str, config: ModelConfig, state: State, tmp_path: Path) -> None:
    name, save = KINDS[kind]
    path = tmp_path / name
    save(state, path)
    model = load(config, path)
    with open(path, "r+b") as file:  # in place: a mapping of the file would show it
        file.write(b"\xff" * path.stat().st_size)
    assert_holds(model, state)
    os.truncate(path, 0)  # and a mapping would now end the process
    assert_holds(model, state)


def test_parameters_and_views_load(config: ModelConfig, state: State, tmp_path: Path) -> None:
    odd = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    base = torch.cat([torch.zeros(5), state[FIRST].flatten()])
    odd[FIRST] = base[5:].view(state[FIRST].shape)
    save_zip(odd, tmp_path / "a.pth")
    assert_holds(load(config, tmp_path / "a.pth"), state)


@kinds
def test_derived_names_are_accepted(kind: str, config: ModelConfig, state: State, tmp_path: Path) -> None:
    name, save = KINDS[kind]
    extra = {key: torch.arange(77) for key in DERIVED}
    save({**state, **extra}, tmp_path / name)
    assert_holds(load(config, tmp_path / name), state)


@pytest.mark.parametrize("count", [1, 10, 11, 25])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mis-shaped"])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_names_that_do_not_fit_are_listed(
    kind: str, fault: str, count: int, config: ModelConfig, state: State, tmp_path: Path
) -> None:
    name, save = KINDS[kind]
    bad = dict(state)
    names = list(state)[:count]
    if fault == "missing":
        for key in names:
            del bad[key]
    elif fault == "unexpected":
        names = [f"model_ema.decay{i:02}" for i in range(count)]
        bad.update({key: torch.zeros(2) for key in names})
    else:
        bad.update({key: torch.zeros(3, 5, 7) for key in names})
    save(bad, tmp_path / name)
    message = refused(config, tmp_path / name)
    assert f"{count} {fault}:" in message and str(tmp_path / name) in message and "micro" in message
    listed = [line.strip().split(":")[0] for line in message.splitlines()[2:]]
    if fault == "unexpected":
        shown = [line for line in listed if line in names]  # their order is the file's own
        assert len(shown) == min(count, 10)
    else:
        assert listed[:10] == names[:10]
    assert (f"and {count - 10} more" in message) == (count > 10)
    assert len(message.splitlines()) == 2 + min(count, 10) + (count > 10)
    if fault == "mis-shaped":
        assert f"{names[0]}: (3, 5, 7) instead of {tuple(state[names[0]].shape)}" in message


def test_all_faults_are_told_at_once(config: ModelConfig, state: State, tmp_path: Path) -> None:
    bad = dict(state)
    last = list(state)[-1]
    del bad[last]
    bad["extra"] = torch.zeros(1)
    bad[FIRST] = torch.zeros(1)
    save_safe(bad, tmp_path / "a.safetensors")
    message = refused(config, tmp_path / "a.safetensors")
    for said in ("1 missing:", last, "1 unexpected:", "extra", "1 mis-shaped:", FIRST):
        assert said in message


def test_checkpoint_of_another_library(config: ModelConfig, tmp_path: Path) -> None:
    foreign = {
        f"down_blocks.{i}.resnets.0.{part}.weight": torch.zeros(4) for i in range(4) for part in ("conv1", "norm1")
    }
    save_safe(foreign, tmp_path / "a.safetensors")
    message = refused(config, tmp_path / "a.safetensors")
    assert "8 unexpected:" in message and "down_blocks.0.resnets.0.conv1.weight" in message
    total = len(ControlLDM(config).state_dict())
    assert f"{total} missing:" in message and f"and {total - 10} more" in message


@pytest.mark.parametrize("kept", [0.0005, 0.02, 0.5, 0.999])
@kinds
def test_truncated(kind: str, kept: float, config: ModelConfig, state: State, tmp_path: Path) -> None:
    name, save = KINDS[kind]
    path = tmp_path / name
    save(state, path)
    os.truncate(path, int(kept * path.stat().st_size))
    message = refused(config, path)
    assert str(path) in message and "truncated" in message and "copy it again" in message
    assert len(message) < 400 and "weights_only" not in message


@kinds
@pytest.mark.parametrize("seed", range(12))
def test_garbage(kind: str, seed: int, config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / KINDS[kind][0]
    generator = torch.Generator().manual_seed(seed)
    path.write_bytes(torch.randint(0, 256, (1 + 40 * seed**2,), generator=generator, dtype=torch.uint8).numpy())
    message = refused(config, path)
    assert str(path) in message and ("truncated" in message or "more than tensors" in message)


def test_damage_never_raises_anything_else(tmp_path: Path) -> None:
    """Every length of a small file in the old format, and bytes of its pickle changed: refused or read, no crash."""
    from cldm.checkpoint import _open_tensors

    path = tmp_path / "a.pth"
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    damaged = [whole[:length] for length in range(1, len(whole), 3)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in range(0, len(whole), 3)]
    for content in damaged:
        path.write_bytes(content)
        try:
            with _open_tensors(path) as tensors:
                assert all(isinstance(name, str) for name in tensors.shapes)
        except CheckpointError as error:
            assert str(path) in str(error)


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def _save_bare_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("save", [save_zip, save_old, _save_bare_pickle])
def test_code_is_not_run(save: Callable[[Any, Path], None], config: ModelConfig, state: State, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    save({"state_dict": {} if save is _save_bare_pickle else state, "hook": _Touch(marker)}, path)
    message = refused(config, path)
    assert not marker.exists()
    if save is not _save_bare_pickle:
        assert "holds more than tensors" in message and "was not unpickled" in message and ".mkdir" in message
    assert "weights_only" not in message  # torch's own advice is to load it all the same
    pickle.loads(pickle.dumps(_Touch(marker)))
    assert marker.exists(), "the test's own object does nothing"


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(3), {"state_dict": {"a": "text"}}, {"model": {"a": 1}}],
    ids=str,
)
def test_not_a_state_dict(content: Any, config: ModelConfig, tmp_path: Path) -> None:
    save_zip(content, tmp_path / "a.pth")
    assert "is not a state_dict" in refused(config, tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64], ids=str)
def test_weights_that_are_no_real_numbers(
    dtype: torch.dtype, config: ModelConfig, state: State, tmp_path: Path
) -> None:
    save_zip({**state, FIRST: state[FIRST].to(dtype)}, tmp_path / "a.pth")
    message = refused(config, tmp_path / "a.pth")
    assert FIRST in message and str(dtype) in message


def test_empty_file(config: ModelConfig, tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / name).write_bytes(b"")
        assert "is empty" in refused(config, tmp_path / name)


def test_folder_missing_file_and_unknown_suffix(config: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "is a folder" in refused(config, folder)
    assert f"no checkpoint at {tmp_path / 'absent.pth'}" in refused(config, tmp_path / "absent.pth")
    (tmp_path / "a.onnx").write_bytes(b"x")
    message = refused(config, tmp_path / "a.onnx")
    assert "unknown kind" in message and ".safetensors, .pth, .ckpt" in message


def test_which_weights_are_found(tmp_path: Path) -> None:
    """Asked for, then the config's own files in its order, then its seed."""
    config = dataclasses.replace(micro_config(tmp_path), checkpoint=("first.safetensors", "second.pth"))
    assert find_weights(config).seed == 7 and str(find_weights(config)) == "random weights, seed 7"
    for i, name in enumerate(("other.ckpt", "second.pth", "first.safetensors")):
        (tmp_path / name).write_bytes(bytes([i]))
        expected = None if name == "other.ckpt" else tmp_path / name
        assert find_weights(config).path == expected
    assert find_weights(config, str(tmp_path / "other.ckpt")).path == tmp_path / "other.ckpt"
    assert find_weights(config, random_seed=0) == find_weights(dataclasses.replace(config, seed=None), random_seed=0)
    assert find_weights(config, random_seed=0).path is None


def test_no_weights_at_all(tmp_path: Path) -> None:
    config = dataclasses.replace(micro_config(tmp_path), seed=None)
    with pytest.raises(CheckpointError, match=r"no checkpoint of micro: put micro.safetensors into .*random weights"):
        find_weights(config)
    with pytest.raises(CheckpointError, match="not both"):
        find_weights(config, "a.pth", 3)
    for seed in (-1, 2**63):
        with pytest.raises(CheckpointError, match="between 0 and"):
            find_weights(config, random_seed=seed)


def test_digest_is_of_content_config_and_seed(tmp_path: Path) -> None:
    config = micro_config(tmp_path)
    wider = dataclasses.replace(config, text=dataclasses.replace(config.text, mlp_width=96))
    path, copy = tmp_path / "a.pth", tmp_path / "b.pth"
    path.write_bytes(b"one")
    copy.write_bytes(b"one")
    before = find_weights(config, str(path)).digest
    digests = [before, find_weights(wider, str(path)).digest]
    assert find_weights(config, str(copy)).digest == before, "the name must not count"
    path.write_bytes(b"two")
    digests.append(find_weights(config, str(path)).digest)
    digests += [find_weights(each, random_seed=seed).digest for each in (config, wider) for seed in (0, 1)]
    assert len(set(digests)) == len(digests)


def test_digest_of_random_weights_is_of_their_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = micro_config(tmp_path)
    (tmp_path / "a.pth").write_bytes(b"one")
    seeded = find_weights(config).digest
    file = find_weights(config, str(tmp_path / "a.pth")).digest
    monkeypatch.setattr("cldm.weights.RANDOM_WEIGHTS_VERSION", RANDOM_WEIGHTS_VERSION + 1)
    assert find_weights(config).digest != seeded
    assert find_weights(config, str(tmp_path / "a.pth")).digest == file


def test_hash_cache_is_used_until_the_file_changes(tmp_path: Path) -> None:
    config = micro_config(tmp_path)
    cache, path = tmp_path / "cache" / "hashes.json", tmp_path / "a.pth"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    digest = find_weights(config, str(path), cache=cache).digest
    assert digest == find_weights(config, str(path)).digest
    path.write_bytes(b"two")  # the same size, and the old time: only a reader of the content would notice
    os.utime(path, ns=(10**18, 10**18))
    assert find_weights(config, str(path), cache=cache).digest == digest
    os.utime(path, ns=(10**18, 10**18 + 1))
    changed = find_weights(config, str(path), cache=cache).digest
    assert changed == find_weights(config, str(path)).digest != digest
    path.write_bytes(b"three")
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert find_weights(config, str(path), cache=cache).digest == find_weights(config, str(path)).digest != changed


def test_random_weights_are_the_seeds(config: ModelConfig) -> None:
    def weights(seed: int) -> State:
        return load_model(config, find_weights(config, random_seed=seed)).state_dict()

    a, b, other = weights(5), weights(5), weights(6)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], other[name]) for name in a)
    assert find_weights(config, random_seed=5).digest == find_weights(config, random_seed=5).digest


@pytest.mark.parametrize("threads", [1, 5])
def test_random_weights_do_not_depend_on_the_process(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers themselves, so that builds of another process, day or thread count match.

    Whoever has to change them here raises RANDOM_WEIGHTS_VERSION.
    """
    monkeypatch.setattr("cldm.checkpoint.available_cores", lambda: threads)
    torch.manual_seed(99)
    model = load_model(load_config("tiny"), Weights(None, 1, ""))
    for name, parameter in model.named_parameters():
        key = int.from_bytes(hashlib.sha256(f"1 {name}".encode()).digest()[:8], "little")
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key))
        if parameter.dim() > 1:
            wanted = drawn / parameter[0].numel() ** 0.5
        else:
            wanted = 0.1 * drawn + (1.0 if name.endswith(".weight") else 0.0)
        torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-7)
        assert not parameter.requires_grad


def test_an_error_while_weights_are_drawn_comes_out(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
        raise MemoryError(name)

    monkeypatch.setattr("cldm.checkpoint._draw", fail)
    with pytest.raises(MemoryError, match="weight"):
        load_model(config, find_weights(config, random_seed=5))


def test_no_initial_values_and_no_compiler(config: ModelConfig) -> None:
    """To fill an embedding that lies nowhere PyTorch imports its compiler, which takes longer than all else here."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from cldm.checkpoint import load_model, shape_of_model\n"
        "from cldm.config import load_config\n"
        "from cldm.weights import Weights\n"
        "config = load_config(sys.argv[2])\n"
        "assert all(p.is_meta for p in shape_of_model(config).parameters())\n"
        "assert not any(p.is_meta for p in load_model(config, Weights(None, 1, '')).state_dict().values())\n"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", program, str(ROOT), str(Path(config.folder) / "micro.yaml")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_random_weights_keep_the_scale(seed: int, tiny_config: ModelConfig) -> None:
    model = load_model(tiny_config, find_weights(tiny_config, random_seed=seed))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tiny_config.text.vocab_size, (1, 77), generator=generator)
    context = model.encode_text(ids)
    x = torch.randn((1, 4, 16, 16), generator=generator)
    hint = (torch.rand((1, 3, 128, 128), generator=generator) < 0.1).float()
    noise = model.predict_noise(x, torch.tensor([500]), context, hint)
    image = model.decode(x)
    for what, value in (("text", context), ("noise", noise), ("image", image)):
        assert torch.isfinite(value).all(), what
        assert 0.1 < float(value.std()) < 10, what


MEASURE = """
import json, re, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cldm.checkpoint import load_model
from cldm.config import load_config
from cldm.weights import Weights

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

# Libraries come into memory when they are first used: so once with a small file.
load_model(load_config(sys.argv[2]), Weights(Path(sys.argv[3]), None, ""))
config = load_config(sys.argv[4])
before, anonymous, done = status("VmRSS"), [status("RssAnon")], threading.Event()

def watch():
    while not done.is_set():
        anonymous.append(status("RssAnon"))
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
model = load_model(config, Weights(Path(sys.argv[5]), None, ""))
anonymous.append(status("RssAnon"))
done.set()
thread.join()
size = sum(4 * p.numel() for p in model.parameters())
print(json.dumps({"size": size, "peak": status("VmHWM") - before, "anonymous": max(anonymous) - anonymous[0]}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """The config of a model of some 230 MB, and its weights: zeros, as only their size counts.

    Its UNet's size is its own, so that nothing here hangs on the tiny model's.
    """
    import yaml

    folder = tmp_path_factory.mktemp("large")
    config = load_config("tiny")
    values = dataclasses.asdict(dataclasses.replace(config, name="large"))
    del values["folder"]
    values["unet"].update(model_channels=112, channel_mult=[1, 2, 2, 2], attention_levels=[0, 1, 2])
    path = folder / "large.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values))), encoding="utf-8")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ControlLDM(load_config(str(path))).state_dict().items()}
    return {"config": path, "folder": folder, "state": {name: torch.zeros(shape) for name, shape in shapes.items()}}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory figures from Linux's /proc")
@pytest.mark.parametrize(
    "kind, anonymous_files", [("safetensors", 0.2), ("pth", 0.2), ("old format", 1.2)], ids=lambda value: str(value)
)
def test_memory(
    kind: str, anonymous_files: float, large: Dict[str, Any], config: ModelConfig, state: State, tmp_path: Path
) -> None:
    """At most 1.2 files beyond the model; where the file is mapped, hardly anything of it in memory of our own.

    VmHWM, not getrusage: that one remembers the size of the process that started this one.
    """
    name, save = KINDS[kind]
    path, small = large["folder"] / name, tmp_path / name
    save(large["state"], path)
    save(state, small)
    num_bytes = path.stat().st_size
    configs = str(Path(config.folder) / "micro.yaml"), str(large["config"])
    command = [sys.executable, "-c", MEASURE, str(ROOT), configs[0], str(small), configs[1], str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    path.unlink()
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["size"] > 200e6 and abs(num_bytes - found["size"]) < 0.02 * num_bytes
    assert found["peak"] - found["size"] <= 1.2 * num_bytes, found
    assert found["anonymous"] - found["size"] <= anonymous_files * num_bytes, found
    assert found["anonymous"] > 0.9 * found["size"], "the measurement missed the model itself"
