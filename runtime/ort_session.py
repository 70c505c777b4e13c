"""Sessions on ONNX Runtime, on the CPU, reading and writing the workspace in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np

from cldm.machine import available_cores
from deploy.manifest import ArtefactError
from deploy.spec import GraphSpec
from runtime.session import check_buffers


class OrtSession:
    """Runs an ONNX file.

    Parameters
    ----------
    file : Path
    spec : GraphSpec
    threads : int, optional
        Default: the cores that this process may use.

    Raises
    ------
    ArtefactError
        ONNX Runtime cannot load the file.
    """

    def __init__(self, file: Path, spec: GraphSpec, threads: Optional[int] = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        # One operator after the other: the graphs are chains, and the cores are better spent inside an operator.
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # Threads spin for work inside a run, not after it: OpenCV and the other graphs' sessions want the cores then.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.spec = spec
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            raise ArtefactError(f"ONNX Runtime cannot load {file}: {str(error).splitlines()[0]}") from error

    def bind(self, buffers: Mapping[str, Any]) -> BoundOrt:
        check_buffers(self.spec, buffers)
        if self._session is None:
            raise RuntimeError(f"the session of {self.spec.name} is closed")
        binding = self._session.io_binding()
        for names, bind in ((self.spec.inputs, binding.bind_input), (self.spec.outputs, binding.bind_output)):
            for name in names:
                tensor, dtype = buffers[name], np.dtype(self.spec.tensors[name].dtype)
                bind(name, "cpu", 0, dtype, list(tensor.shape), tensor.data_ptr())
        return BoundOrt(self.spec.name, self._session, binding, dict(buffers))

    def close(self) -> None:
        self._session = None


class BoundOrt:
    """An `OrtSession` with its buffers, which it reads and writes in place."""

    def __init__(self, name: str, session: Any, binding: Any, buffers: Mapping[str, Any]) -> None:
        self._name = name
        self._session = session
        self._binding = binding
        self._buffers = buffers  # the binding holds addresses only

    def enqueue(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # as above
            raise RuntimeError(f"ONNX Runtime failed in {self._name}: {str(error).splitlines()[0]}") from error
