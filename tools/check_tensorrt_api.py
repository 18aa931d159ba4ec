"""Hold the calls of the TensorRT runtime, and its stand-in in the tests, against NVIDIA's real Python bindings.

    python tools/check_tensorrt_api.py [VERSION]

Downloads ``tensorrt-cu12-bindings`` (1 MB) with pip and loads it over empty libraries made with the C compiler: enough
to ask for names and signatures, not to run anything. No GPU is needed. Exit code 1 names what is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARIES = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
CALLS = {
    "Builder.create_network": "flags: int = 0",
    "Builder.create_builder_config": "",
    "Builder.create_optimization_profile": "",
    "Builder.build_serialized_network": "-> tensorrt_bindings.tensorrt.IHostMemory",
    "OnnxParser.parse": "model: buffer",
    "OnnxParser.get_error": "index: int",
    "ParserError.desc": "-> str",
    "INetworkDefinition.get_layer": "index: int",
    "INetworkDefinition.get_input": "index: int",
    "IOptimizationProfile.set_shape": "input: str, min: tensorrt_bindings.tensorrt.Dims",
    "IBuilderConfig.set_flag": "flag: tensorrt_bindings.tensorrt.BuilderFlag",
    "IBuilderConfig.clear_flag": "flag: tensorrt_bindings.tensorrt.BuilderFlag",
    "IBuilderConfig.create_timing_cache": "serialized_timing_cache: buffer",
    "IBuilderConfig.set_timing_cache": "ignore_mismatch: bool",
    "IBuilderConfig.get_timing_cache": "-> tensorrt_bindings.tensorrt.ITimingCache",
    "IBuilderConfig.set_memory_pool_limit": "pool_size: int",
    "IBuilderConfig.add_optimization_profile": "-> int",
    "ITimingCache.serialize": "-> tensorrt_bindings.tensorrt.IHostMemory",
    "Runtime.deserialize_cuda_engine": "",
    "ICudaEngine.get_tensor_name": "index: int",
    "ICudaEngine.get_tensor_mode": "name: str",
    "ICudaEngine.get_tensor_dtype": "name: str",
    "ICudaEngine.get_tensor_shape": "-> tensorrt_bindings.tensorrt.Dims",
    "ICudaEngine.get_tensor_profile_shape": "name: str, profile_index: int",
    "ICudaEngine.create_execution_context": "",
    "IExecutionContext.set_input_shape": "",
    "IExecutionContext.get_tensor_shape": "name: str",
    "IExecutionContext.set_tensor_address": "name: str, memory: int) -> bool",
    "IExecutionContext.execute_async_v3": "stream_handle: int) -> bool",
    "IProfiler.report_layer_time": "layer_name: str, ms: float",
    "IProgressMonitor.phase_start": "phase_name: str, parent_phase: str, num_steps: int",
    "IProgressMonitor.step_complete": "phase_name: str, step: int) -> bool",
    "IProgressMonitor.phase_finish": "phase_name: str",
    "init_libnvinfer_plugins": "namespace: str",
}
"""Call → a part of its signature."""
NAMES = (
    "IExecutionContext.profiler",
    "IBuilderConfig.builder_optimization_level", "IBuilderConfig.progress_monitor", "INetworkDefinition.num_layers",
    "INetworkDefinition.num_inputs", "ICudaEngine.num_io_tensors", "OnnxParser.num_errors", "ILayer.type",
    "ITensor.name", "ITensor.shape", "LayerType.QUANTIZE", "BuilderFlag.INT8", "BuilderFlag.FP16", "BuilderFlag.TF32",
    "MemoryPoolType.WORKSPACE", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "TensorIOMode.INPUT",
    "ILogger.Severity.INTERNAL_ERROR", "ILogger.Severity.ERROR", "float32", "float16", "int8", "int32", "int64",
    "uint8", "bool",
)  # fmt: skip
PROBE = """
import sys
from functools import reduce
import tensorrt_bindings as trt
for name in sys.argv[1:]:
    try:
        found = reduce(getattr, name.split("."), trt)
        print(name, (found.__doc__ or "").strip().replace(chr(10), " ") if callable(found) else "", sep="\\t")
    except AttributeError:
        pass
"""


def main() -> int:
    version = sys.argv[1] if len(sys.argv) > 1 else "10.3.0"
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", work]
        subprocess.run([*pip, f"tensorrt-cu12-bindings=={version}"], check=True)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            wheel.extractall(work)
        source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
        for library in LIBRARIES:
            build = [
                "cc",
                "-x",
                "c",
                "-",
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{library}",
                "-o",
                str(Path(work) / library),
            ]
            subprocess.run(build, input=source, text=True, check=True)
        told = subprocess.run(
            [sys.executable, "-c", PROBE, *CALLS, *NAMES],
            env={**os.environ, "PYTHONPATH": work, "LD_LIBRARY_PATH": work}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = dict(line.split("\t", 1) for line in told.stdout.splitlines())
    wrong = [name for name in (*CALLS, *NAMES) if name not in found]
    wrong += [f"{name}: {found[name]}" for name, part in CALLS.items() if name in found and part not in found[name]]
    print("\n".join(wrong) or f"tensorrt {version}: all {len(CALLS)} calls and {len(NAMES)} names are there")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
