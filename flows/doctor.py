"""What this installation and machine are, for a person or for a bug report.

    sparseramp doctor --json

It starts nothing: a cluster is looked at only where an address names one.
"""

import json
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from infra import environment
from infra.devices import describe_devices
from infra.errors import UserError
from infra.provenance import provenance
from infra.sources import cache_dir
from infra.specs import ClusterSpec

COMPILERS = ("c++", "g++", "clang++")


def doctor(address: str = "") -> dict[str, Any]:
    """Look at everything; what is missing or unreachable is said, not raised.

    `address` is that of a Ray cluster; empty: RAY_ADDRESS, else none.
    """
    facts = provenance()
    cache = cache_dir().resolve()
    return {
        "checkout": str(environment.CHECKOUT),
        **{key: facts.pop(key) for key in ("commit", "host", "platform", "python")},
        "versions": facts,
        "devices": describe_devices().model_dump(),
        "disks": {
            "here": _disk(Path.cwd()),
            "cache": _disk(cache),
        },
        "compiler": _compiler(),
        "packages": _try(environment.guard),
        "telemetry": _telemetry(),
        "cluster": _cluster(address or os.environ.get("RAY_ADDRESS", "")),
    }
