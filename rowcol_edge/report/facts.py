"""Where and how a profile was measured, as label and text for people."""

from __future__ import annotations

from ..device.profile import Profile, settings_text
from ..device.table import machine_told, mebibytes


def environment_facts(profile: Profile) -> dict[str, str]:
    """The machine. What most machines tell and this one does not stands there as not measured; what is of boards of one
    make only, or holds on some machines only, is left out elsewhere."""
    host = profile.environment
    told = machine_told(profile)
    facts = {
        "board": host.board,
        "processor": f"{host.machine} {host.cpu_model}".strip(),
        "instruction set": ", ".join(host.isa),
        "cores": f"{host.cores_usable} usable of {host.cores}",
        **{what: before if before == after else f"{before} → {after}" for what, (before, after) in told.items()},
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
