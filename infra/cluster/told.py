"""What trials tell of how far they are, in Ray's key-value store: a key for each of this driver.

listen(keep)    # in a worker; see infra/progress.py
told()          # in the driver: [{"trial": 7, "step": 37, "steps": 200, "loss": 3.21}]

Nothing here ever fails a trial: where the store does not answer, nothing is known.
"""

import contextlib
import json

import ray
from ray.exceptions import RayError
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from infra.progress import Facts

NAMESPACE = "sparseramp"


def keep(facts: Facts) -> None:
    """In a worker: replace what is known of the trial that `facts` names."""
    with contextlib.suppress(RayError):
        _internal_kv_put(f"{_prefix()}{facts['trial']}", json.dumps(facts), namespace=NAMESPACE)


def told() -> list[Facts]:
    """In the driver: the last that each of its trials told."""
    with contextlib.suppress(RayError):
        keys = _internal_kv_list(_prefix(), namespace=NAMESPACE)
        values = [_internal_kv_get(key, namespace=NAMESPACE) for key in sorted(keys)]
        return [json.loads(value) for value in values if value]
    return []


def forget() -> None:
    """In the driver, at its end: a cluster would keep it for ever."""
    with contextlib.suppress(RayError):
        _internal_kv_del(_prefix(), del_by_prefix=True, namespace=NAMESPACE)


def _prefix() -> str:
    return f"{ray.get_runtime_context().get_job_id()}/"
