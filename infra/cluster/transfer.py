"""Checkpoints travel to the driver: renamed on its own node, pulled in pieces from another.

fetch(result, Path("runs/quickstart/best"), nullcontext)

It may take long, so it is written to be run in a thread: `writing` is entered around each write.
"""

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.cluster.ray_machines import RayMachines
from infra.cluster.worker import read_chunk, remove_folder
from infra.errors import first_line
from infra.records import TrialResult
from infra.sources import sha256_of

Writing = Callable[[], contextlib.AbstractContextManager[None]]


class LostCheckpointError(OSError):
    """A checkpoint is gone or damaged where it was made: only its trial can make it again."""


def fetch(result: TrialResult, destination: Path, writing: Writing) -> None:
    """Bring a checkpoint to `destination`; see `Cluster.fetch`."""
    partial = destination.with_name(f".{destination.name}.partial")
    with writing():
        destination.parent.mkdir(parents=True, exist_ok=True)
    own = ray.get_runtime_context().get_node_id()
    node = _node_now(result, own)
    if not damaged(result, partial):  # its driver was killed before it could rename it
        hashes = result.checkpoint_sha256
    else:
        hashes = _bring(result, node, own, partial, writing)
    for name, sha256 in result.checkpoint_sha256.items():
        if hashes[name] != sha256:
            raise LostCheckpointError(
                f"{result.checkpoint}/{name} on {result.host} is not the file that was saved"
            )
    replaced = destination.with_name(f".{destination.name}.replaced")
    with writing():
        shutil.rmtree(replaced, ignore_errors=True)
        if destination.exists():
            destination.rename(replaced)
        partial.rename(destination)
        shutil.rmtree(replaced, ignore_errors=True)
    if node != own:
        with contextlib.suppress(RayError):  # the node has gone, and with it the folder
            ray.get(_on_node(node, remove_folder).remote(result.checkpoint))


def damaged(result: TrialResult, folder: Path) -> str:
    """The first file of a checkpoint that is not in a folder as it was saved; empty: all are."""
    for name, sha256 in result.checkpoint_sha256.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != sha256:
            return name
    return ""


def _bring(
    result: TrialResult, node: str, own: str, partial: Path, writing: Writing
) -> dict[str, str]:
    """Move or copy a checkpoint to `partial`; returns the SHA-256 of what arrived."""
    with writing():
        shutil.rmtree(partial, ignore_errors=True)
    try:
        if node != own:
            read = _on_node(node, read_chunk)
            return _copy(result, lambda *at: ray.get(read.remote(*at)), partial, writing)
        if not _moved(result.checkpoint, partial, writing):
            hashes = _copy(result, read_chunk, partial, writing)
            shutil.rmtree(result.checkpoint, ignore_errors=True)
            return hashes
        return {name: sha256_of(partial / name) for name in result.checkpoint_sha256}
    except (RayError, FileNotFoundError) as error:
        reason = first_line(getattr(error, "cause", error))
        raise LostCheckpointError(
            f"{result.checkpoint} on {result.host} is out of reach: {reason}"
        ) from error
    except OSError:  # the disk of the run is full: what is there of the copy fills it
        with writing():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _node_now(result: TrialResult, own: str) -> str:
    """The node that holds the checkpoint; it has another id when Ray was started again there."""
    hosts = {node.node: node.host for node in RayMachines().nodes()}
    if result.node in hosts:
        return result.node
    same = [node for node, host in hosts.items() if host == result.host]
    return own if own in same else (same or [result.node])[0]


def _moved(source: str, partial: Path, writing: Writing) -> bool:
    """Rename a folder; False where it is on another file system."""
    try:
        with writing():
            Path(source).rename(partial)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _copy(
    result: TrialResult, read: Callable[[str, int], bytes], folder: Path, writing: Writing
) -> dict[str, str]:
    """Copy the files of a checkpoint in pieces; returns the SHA-256 of what arrived."""
    hashes = {}
    for name in result.checkpoint_sha256:
        digest, offset = hashlib.sha256(), 0
        with writing():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        with (folder / name).open("r+b") as file:
            while chunk := read(str(Path(result.checkpoint, name)), offset):
                with writing():
                    file.write(chunk)
                    file.flush()
                digest.update(chunk)
                offset += len(chunk)
        hashes[name] = digest.hexdigest()
    return hashes


def _on_node(node: str, function: Any) -> Any:
    """The function as a Ray task of that node, which takes nothing from its trials."""
    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(num_cpus=0)(function).options(scheduling_strategy=there)
