"""The engines of a bundle's arms, built before something waits for them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from ..errors import BundleError, MeasurementError
from .bundle import Bundle
from .predictor import load_checked, runtime_options
from .processes import child_environment, worker_command
from .runtimes import ENGINE_BUILDERS

if TYPE_CHECKING:
    from .runtimes.base import EngineBuilder, EngineFile


def build_engines(bundle: Bundle, arms: Sequence[str] | None = None) -> Iterator[tuple[str, EngineFile]]:
    """Build the engine of each arm, or find it; progress goes to stderr.

    BundleError: a bundle whose runtime builds none, or as for opening an arm.
    """
    name = bundle.manifest.runtime.name
    if name not in ENGINE_BUILDERS:
        raise BundleError(
            "engine",
            expected=f"a bundle for {', '.join(ENGINE_BUILDERS)}",
            got=f"one for {name}",
            hint="nothing has to be built: run verify",
        )
    runtime = cast("EngineBuilder", load_checked(bundle))
    for arm in bundle.manifest.arms if arms is None else [bundle.arm(wanted) for wanted in arms]:
        yield arm.name, runtime.build_engine(bundle.artifact(arm), runtime_options(bundle))


def prepare(bundle: Bundle, arms: Sequence[str]) -> None:
    """`build_engines` in a process of its own, where the runtime needs it: no memory of the builder stays behind.

    MeasurementError: it failed; the reason stands on stderr.
    """
    if bundle.manifest.runtime.name not in ENGINE_BUILDERS:
        return
    worker, folder = worker_command()
    command = [*worker[:-1], "engine", str(bundle.root), "--arms", ",".join(arms)]
    done = subprocess.run(command, env=child_environment(folder), stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise MeasurementError(
            "building the engines",
            expected="a process that ends well",
            got=f"exit code {done.returncode}",
            hint="it has said why",
        )
