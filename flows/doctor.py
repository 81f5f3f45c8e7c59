"""What this installation and this machine are, for a person or for a bug report.

    sparseramp doctor --json

Nothing is started: a cluster is looked at only where an address names one.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra import environment
from infra.cache import cache_dir
from infra.devices import describe_devices
from infra.errors import UserError
from infra.provenance import provenance
from infra.specs import ClusterSpec

COMPILERS = ("c++", "g++", "clang++")


def doctor(address: str = "") -> dict[str, Any]:
    """Look at everything; what is missing or unreachable is said, not raised.

    `address` is that of a Ray cluster; empty: RAY_ADDRESS, else none.
    """
    facts = dict(provenance())
    general = {key: facts.pop(key) for key in ("commit", "host", "platform", "python")}
    return {
        "checkout": str(environment.CHECKOUT),
        **general,
        "versions": facts,
        "devices": describe_devices().model_dump(),
        "disks": {"here": _disk(Path.cwd()), "cache": _disk(cache_dir())},
        "compiler": _compiler(),
        "packages": _packages(),
        "telemetry": {
            name: "off" if os.environ.get(name) == value else "on"
            for name, value in environment.TELEMETRY_OFF.items()
        },
        "cluster": _cluster(address or os.environ.get("RAY_ADDRESS", "")),
    }


def show(address: str = "", *, as_json: bool = False) -> None:
    """Print it as a table, or as one line of JSON.

    Raises UserError afterwards where a cluster is named and cannot be used, for scripts to stop.
    """
    found = doctor(address)
    if as_json:
        print(json.dumps(found))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for name, text in _rows(found):
            table.add_row(name, text)
        Console(highlight=False, markup=False).print(table)
    if found["cluster"] and "error" in found["cluster"]:
        raise UserError(found["cluster"]["error"])


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "checkout", f"{found['checkout']} {found['commit'][:12]}".rstrip()
    yield "python", f"{found['python']} on {found['platform']}"
    yield from found["versions"].items()
    devices = found["devices"]
    yield "processor", f"{devices['cpu']}, {devices['cores']} cores"
    yield "memory", _free(devices["available_bytes"], devices["memory_bytes"])
    for gpu in devices["gpus"]:
        memory = _free(gpu["free_bytes"], gpu["memory_bytes"])
        yield "GPU", f"{gpu['name']}, {memory}, driver {gpu['driver']}"
    if not devices["gpus"]:
        yield "GPU", "none"
    for name, disk in found["disks"].items():
        free = _free(disk["free_bytes"], disk["total_bytes"])
        yield f"disk, {name}", f"{disk['path']}, {free}{'' if disk['writable'] else ', READ-ONLY'}"
    yield "compiler", found["compiler"] or "none (C++ engines cannot be built)"
    yield "packages", found["packages"]
    on = [name for name, state in found["telemetry"].items() if state == "on"]
    yield "telemetry", f"ON: {', '.join(on)}" if on else "off"
    cluster = found["cluster"]
    if cluster is None:
        yield "cluster", "this machine (no cluster.address and no RAY_ADDRESS)"
    elif "error" in cluster:
        yield "cluster", f"{cluster['address']}: cannot be used"
    else:
        yield (
            "cluster",
            (
                f"{cluster['address']}: {len(cluster['nodes'])} nodes, {cluster['cpus']:g} CPUs, "
                f"{cluster['gpus']:g} GPUs; {cluster['parallel']} trials at once of "
                f"{cluster['cpus_per_trial']:g} CPUs and {cluster['gpus_per_trial']:g} GPUs"
            ),
        )


def _free(free: int, total: int) -> str:
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _disk(path: Path) -> dict[str, Any]:
    """Of the file system that holds the path, or will when it has been created."""
    existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    usage = shutil.disk_usage(existing)
    return {
        "path": str(path),
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "writable": os.access(existing, os.W_OK),
    }


def _compiler() -> str:
    """The first line of its version; empty where there is none."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        path = shutil.which(name)
        if path:
            done = subprocess.run([path, "--version"], capture_output=True, text=True)
            return f"{path}: {next(iter(done.stdout.splitlines()), '')}"
    return ""


def _packages() -> str:
    try:
        environment.guard()
    except UserError as error:
        return str(error)
    return "this checkout's"


def _cluster(address: str) -> dict[str, Any] | None:
    if address in ("", "local"):
        return None
    from infra.cluster import connect  # Ray takes a second

    try:
        with connect(ClusterSpec(address=address, grows=True)) as cluster:  # may have no node yet
            return cluster.describe()
    except UserError as error:
        return {"address": address, "error": str(error)}
