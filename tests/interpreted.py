"""Runs the Triton kernels on a CPU: by Triton's interpreter, in a process of its own that never had the compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest

ROOT = Path(__file__).resolve().parent.parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which there is for Linux only"
)


def run_interpreted(module: str, *arguments: str) -> Dict[str, Any]:
    """What a module prints as JSON on its last line when it is run with its kernels interpreted."""
    # Its products are so small that threads would spend more time on waiting for one another.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=str(ROOT), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def patch_interpreter() -> None:
    """Make Triton 3.6's interpreter take NumPy 2.4, where an array of one number no longer turns into an int.

    The interpreter's scalars are such arrays, and the loops' bounds are scalars.
    """
    import numpy as np
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(np.asarray(scalar.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_with_index
    _patch_fp8(interpreter)


def _patch_fp8(interpreter: Any) -> None:
    """Convert to and from e4m3 as a GPU does, to the nearest and saturating, by PyTorch.

    Triton 3.6's interpreter rounds ties up, carries no rounding from the mantissa into the exponent, and wraps around.
    """
    import numpy as np
    import torch

    convert, fp8, floats = interpreter._convert_float, interpreter.tl.float8e4nv, (np.float16, np.float32)

    def convert_with_fp8(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target == fp8:
            numbers = data.view(floats[source.primitive_bitwidth // 32]).astype(np.float32)
            return torch.from_numpy(numbers).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == fp8:
            numbers = torch.from_numpy(np.array(data, np.uint8)).view(torch.float8_e4m3fn).float().numpy()
            return numbers.astype(floats[target.primitive_bitwidth // 32])
        return convert(data, source, target, rounding)

    interpreter._convert_float = convert_with_fp8
