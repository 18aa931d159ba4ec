"""Where and how a profile was measured, as label and text for people."""

from __future__ import annotations

from ..device.profile import Profile, settings_text
from ..device.table import NONE, mebibytes


def environment_facts(profile: Profile) -> dict[str, str]:
    """The machine; what it does not tell is left out."""
    host, after = profile.environment, profile.after
    facts = {
        "board": host.board,
        "processor": f"{host.machine} {host.cpu_model}".strip(),
        "instruction set": ", ".join(host.isa),
        "cores": f"{host.cores_usable} usable of {host.cores}",
        "governor": _change(host.governor, after.governor),
        "frequency": _change(_megahertz(host.frequency_khz), _megahertz(after.frequency_khz)),
        "temperature": _change(_celsius(host.temperature_c), _celsius(after.temperature_c)),
        "throttling": _change(host.throttled, after.throttled),
        "power mode": _change(host.power_mode, after.power_mode),
        "rails": ", ".join(host.rails) or host.rails_unread,
        "memory": "" if host.memory_bytes is None else mebibytes(host.memory_bytes),
        "load before": "" if host.load_1m is None else f"{host.load_1m:g}",
        "virtual machine": host.virtual,
        "emulator": host.emulated,
        "system": f"{host.system} {host.kernel}",
        "Python, numpy": f"{host.python}, {host.numpy}",
    }
    return {label: text for label, text in facts.items() if text}


def protocol_facts(profile: Profile) -> dict[str, str]:
    """How the runs were laid out, and the settings that hold for all of them."""
    protocol = profile.protocol
    caps = {**profile.environment.caps, **profile.caps}
    facts = {
        "measured": profile.created,
        "runtime": f"{profile.runtime} {profile.runtime_version}",
        "threads": str(profile.threads or "the runtime's default"),
        "runtime settings": settings_text(profile),
        "instruction caps": " ".join(f"{key}={value}" for key, value in sorted(caps.items())),
        "rounds": f"{protocol.rounds}, each arm once a round in a process of its own",
        "a run": f"{protocol.run_seconds:g} s after {protocol.warmup_seconds:g} s of warm-up",
        "took": f"{protocol.elapsed_seconds:.0f} s of {protocol.budget_seconds:.0f} s",
        "interval": f"{protocol.confidence:.0%}, bootstrap over rounds, {protocol.resamples:,} resamples",
        "energy": profile.energy_note,
        "build": profile.digest[:16],
    }
    return {label: text for label, text in facts.items() if text}


def _change(before: str, after: str) -> str:
    """One value, or both where it changed while measuring."""
    return before if before == after else f"{before or NONE} → {after or NONE}"


def _megahertz(khz: int | None) -> str:
    return "" if khz is None else f"{khz / 1000:.0f} MHz"


def _celsius(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} °C"
