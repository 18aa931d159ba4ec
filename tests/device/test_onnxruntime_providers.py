"""GPU providers as far as a machine without one goes: what onnxruntime is asked for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from rowcol_edge.device.digests import sha256_file
from rowcol_edge.device.runtimes import RuntimeOptions, load_runtime
from rowcol_edge.device.runtimes.onnxruntime_providers import CPU, providers
from rowcol_edge.errors import BundleError

ARTIFACT = Path("arm.onnx")  # only one that TensorRT builds engines for is read
TENSORRT, CUDA, XNNPACK = (f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "Xnnpack"))


def test_without_a_word_it_is_the_cpu() -> None:
    chosen = providers(RuntimeOptions(threads=3, properties={"session.intra_op.allow_spinning": "0"}), ARTIFACT)
    assert chosen.options == {CPU: {}}
    assert (chosen.threads, chosen.entries) == (3, {"session.intra_op.allow_spinning": "0"})


def test_options_go_to_their_provider_and_the_order_is_kept(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWCOL_ENGINE_CACHE", str(tmp_path))
    artifact = onnx_file(tmp_path / "m.onnx")
    properties = {
        f"{TENSORRT}.trt_fp16_enable": "1",
        f"{TENSORRT}.trt_timing_cache_enable": "0",
        f"{CUDA}.cudnn_conv_algo_search": "HEURISTIC",
        "ep.share_ep_contexts": "0",
    }
    chosen = providers(RuntimeOptions(providers=(TENSORRT, CUDA, CPU), properties=properties), artifact)
    assert list(chosen.options) == [TENSORRT, CUDA, CPU]
    assert chosen.options[TENSORRT] == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(tmp_path / "onnxruntime" / sha256_file(artifact)[0][:16]),
        "trt_timing_cache_enable": "0",
        "trt_timing_cache_path": str(tmp_path / "onnxruntime"),
        "trt_fp16_enable": "1",
    }
    assert chosen.options[CUDA] == {"cudnn_conv_algo_search": "HEURISTIC"}
    assert chosen.entries["ep.share_ep_contexts"] == "0"
    assert "session.disable_cpu_ep_fallback" not in chosen.entries


def test_another_model_under_the_same_name_gets_engines_of_its_own_and_the_same_timings(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWCOL_ENGINE_CACHE", str(tmp_path))
    options = RuntimeOptions(providers=(TENSORRT, CPU))
    first, second, again = (
        providers(options, onnx_file(tmp_path / "dense@fp32.onnx", seed=seed)).options[TENSORRT] for seed in (0, 1, 0)
    )
    assert first["trt_engine_cache_path"] != second["trt_engine_cache_path"]
    assert all(Path(chosen["trt_engine_cache_path"]).is_dir() for chosen in (first, second))  # it makes one level only
    assert first["trt_timing_cache_path"] == second["trt_timing_cache_path"]
    assert first == again


def test_engines_that_cannot_be_kept_are_built_with_a_warning(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROWCOL_ENGINE_CACHE", str(tmp_path / "file"))
    chosen = providers(RuntimeOptions(providers=(TENSORRT, CPU)), onnx_file(tmp_path / "m.onnx"))
    assert chosen.options == {TENSORRT: {}, CPU: {}}
    assert "warning: the engine cannot be kept" in capsys.readouterr().err


def test_without_the_cpu_in_the_list_no_node_may_fall_back_to_it() -> None:
    assert providers(RuntimeOptions(providers=(CUDA,)), ARTIFACT).entries["session.disable_cpu_ep_fallback"] == "1"


def test_xnnpack_gets_the_threads_of_the_session() -> None:
    chosen = providers(RuntimeOptions(threads=4, providers=(XNNPACK, CPU)), ARTIFACT)
    assert chosen.options[XNNPACK] == {"intra_op_num_threads": "4"}
    assert (chosen.threads, chosen.entries["session.intra_op.allow_spinning"]) == (1, "0")
    own = RuntimeOptions(4, (XNNPACK, CPU), {f"{XNNPACK}.intra_op_num_threads": "2"})
    assert providers(own, ARTIFACT).options[XNNPACK] == {"intra_op_num_threads": "2"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("TensorRTExecutionProvider.trt_fp16_enable", "did you mean TensorrtExecutionProvider"),
        (f"{CUDA}.device_id", f"expected an option of {TENSORRT}, got {CUDA}"),
        (TENSORRT, r"an option is written PROVIDER\.OPTION"),
    ],
)
def test_an_option_for_a_provider_that_is_not_listed_is_refused(key: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        providers(RuntimeOptions(providers=(TENSORRT,), properties={key: "1"}), ARTIFACT)


@pytest.mark.parametrize("provider", [TENSORRT, CUDA, XNNPACK])
def test_this_build_of_onnxruntime_does_not_have_them(
    provider: str, tmp_path: Path, onnx_file: Callable[..., Path]
) -> None:
    assert provider not in onnxruntime.get_available_providers()
    options = RuntimeOptions(providers=(provider, CPU), install_line="pip from here")
    message = f"{provider}: expected one that onnxruntime .* {CPU}, got not available .* has it with: pip from here;"
    with pytest.raises(BundleError, match=message):
        load_runtime("onnxruntime").open(onnx_file(tmp_path / "m.onnx"), options)


@pytest.mark.parametrize("tells", [True, False])
def test_a_real_provider_that_takes_no_node_is_no_silent_run_on_the_cpu(
    tells: bool, tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's x86-64 wheel has this one, for models in the cloud; where it has not, that is the error.

    A version that does not tell where nodes run has written it into a profile.
    """
    if not tells:
        base = onnxruntime.InferenceSession.__base__
        monkeypatch.delattr(base, "get_provider_graph_assignment_info", raising=False)
    options = RuntimeOptions(providers=("AzureExecutionProvider", CPU))
    offered = "AzureExecutionProvider" in onnxruntime.get_available_providers()
    expected = "got all of them on CPUExecutionProvider" if offered else "got not available"
    with pytest.raises(BundleError, match=f"AzureExecutionProvider: .* {expected}"):
        load_runtime("onnxruntime").open(onnx_file(tmp_path / "m.onnx"), options)


def opened_with(
    monkeypatch: pytest.MonkeyPatch, path: Path, options: RuntimeOptions, active: list[str], used: list[str] | None
) -> list[Any]:
    """Open with a stand-in for a build with GPU providers, of which `active` load and `used` take nodes.

    `used` None is a version that does not tell: the profile of its run is the real one, of the CPU.
    """
    real, seen = onnxruntime.InferenceSession, []

    class Session:
        def __init__(self, name: str, settings: Any, providers: list[Any], **_: Any) -> None:
            seen.append(providers)
            self._inner = real(name, settings, providers=[CPU])

        def get_providers(self) -> list[str]:
            return active

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    if used is not None:
        parts = [SimpleNamespace(ep_name=ep) for ep in used]
        Session.get_provider_graph_assignment_info = lambda _: parts  # type: ignore[attr-defined]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    load_runtime("onnxruntime").open(path, options).close()
    return seen


def test_what_a_gpu_build_is_asked_for(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RuntimeOptions(providers=(CUDA, CPU), properties={f"{CUDA}.device_id": "1"})
    seen = opened_with(monkeypatch, onnx_file(tmp_path / "m.onnx"), options, [CUDA, CPU], [CUDA, CPU])
    assert seen == [[(CUDA, {"device_id": "1"}), CPU]]


@pytest.mark.parametrize("used", [[TENSORRT], [TENSORRT, CPU], [TENSORRT, CUDA]])
def test_the_accelerator_that_is_asked_for_first_takes_nodes_and_others_what_it_leaves(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, used: list[str]
) -> None:
    options = RuntimeOptions(providers=(TENSORRT, CUDA, CPU))
    assert opened_with(monkeypatch, onnx_file(tmp_path / "m.onnx"), options, [TENSORRT, CUDA, CPU], used)


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ([CPU], f"on {TENSORRT}, {CUDA}: .* got all of them on {CPU}"),
        ([CUDA, CPU], f"on {TENSORRT}: .* got all of them on {CPU}, {CUDA}"),
        (None, f"on {TENSORRT}, {CUDA}: .* got all of them on {CPU}"),
    ],
)
def test_an_accelerator_that_takes_no_node_is_no_silent_run_on_another(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, used: list[str] | None,
    message: str,
) -> None:  # fmt: skip
    options = RuntimeOptions(providers=(TENSORRT, CUDA, CPU))
    with pytest.raises(BundleError, match=rf"m\.onnx {message}"):
        opened_with(monkeypatch, onnx_file(tmp_path / "m.onnx"), options, [TENSORRT, CUDA, CPU], used)


def test_a_provider_whose_library_does_not_load_is_an_error(
    tmp_path: Path, onnx_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RuntimeOptions(providers=(TENSORRT, CUDA, CPU))
    with pytest.raises(BundleError, match=f"execution provider {TENSORRT}: .* got not available"):
        opened_with(monkeypatch, onnx_file(tmp_path / "m.onnx"), options, [CUDA, CPU], [CUDA])
