"""Settings of the runtimes that trade memory for time, by what a target's ``properties`` call them.

Each is off or on as the runtime's own default has it, unless a target says otherwise:

- onnxruntime: ``enable_cpu_mem_arena`` keeps what was allocated once for the next inference, in pieces that grow by
  powers of two; ``enable_mem_pattern`` allocates all of an inference in one piece; ``session.disable_prepacking``
  leaves out the copies of weights in the order that the kernels read them (onnxruntime.ai/docs, SessionOptions).
  There is none for mapping: weights are mapped from a file of external data (github.com/microsoft/onnxruntime, pull
  request 11127) or of the ORT format (``session.use_memory_mapped_ort_model``), never from one ``.onnx`` file, which an
  arm is; ``/proc/self/maps`` shows so with 1.32.
- openvino: ``ENABLE_MMAP`` reads weights by mapping their file (docs.openvino.ai, optimizing memory usage).
- tflite: ``model_content`` hands over the file's bytes, which the process then holds, instead of its path, which is
  mapped (ai.google.dev/edge, Interpreter).
"""

from __future__ import annotations

ARENA, PATTERN = "enable_cpu_mem_arena", "enable_mem_pattern"
MMAP = "ENABLE_MMAP"
CONTENT = "model_content"
ON, OFF = "1", "0"

VARIANTS: dict[str, dict[str, dict[str, str]]] = {
    "onnxruntime": {
        "no arena": {ARENA: OFF, PATTERN: OFF},
        "no memory pattern": {PATTERN: OFF},
        "no prepacking": {"session.disable_prepacking": ON},
    },
    "openvino": {"no mmap": {MMAP: "NO"}},
    "tflite": {"from bytes": {CONTENT: ON}},
}
"""By runtime and name of the variant: the properties that make it."""
