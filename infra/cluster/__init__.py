"""Where trials run: Ray on this machine or on a cluster, with retries by cause.

    with connect(spec.cluster) as cluster:
        for result in cluster.run(run_trial, trials):  # as each returns
            store.write_result(result)

A trial runs in a worker: a process that keeps its CPUs and GPUs, and the model it has loaded,
until the cluster is left. Workers are actors because a plain Ray task may meet a warm process
that CUDA has already bound to another GPU than the one the task was given: in waves of four
one-GPU tasks that happened to 42 of 60.
"""

from infra.cluster.connection import Cluster, connect
from infra.cluster.dispatch import Job, Source, dispatch
from infra.cluster.machines import Machines, Outcome
from infra.cluster.pool import Pool
from infra.cluster.resources import Node, Share
from infra.cluster.transfer import LostCheckpointError, damaged
from infra.cluster.worker import TrialFunction

__all__ = [
    "Cluster",
    "Job",
    "LostCheckpointError",
    "Machines",
    "Node",
    "Outcome",
    "Pool",
    "Share",
    "Source",
    "TrialFunction",
    "connect",
    "damaged",
    "dispatch",
]
