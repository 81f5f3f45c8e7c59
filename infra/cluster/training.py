"""A fine-tune on several workers that share every batch: Ray Train sets up torch.distributed.

    result = train_together(run_trial, spec, workers=2, cpus=1.0, gpus=0.0)

Every worker runs the trial; the first saves the checkpoint and gives the result. gloo carries
gradients between CPUs, NCCL between GPUs. A worker that is lost begins all of them again, from the
last state, at most twice; one whose trial fails ends all of them.
"""

import tempfile
from typing import Any

import ray
from ray.train import (
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
    get_context,
)

from infra.cluster.dispatch import MAX_LOST
from infra.cluster.told import keep
from infra.cluster.worker import TrialFunction, Worker, failed
from infra.errors import UserError, first_line
from infra.progress import listen
from infra.records import TrialResult, TrialSpec


def train_together(
    function: TrialFunction, spec: TrialSpec, *, workers: int, cpus: float, gpus: float
) -> TrialResult:
    """Run a trial in `workers` processes of so many CPUs and GPUs each.

    The result is a failed one where it fails in one of them. Raises UserError where they cannot be
    started or one is lost too often.
    """
    from ray.train.torch import TorchTrainer  # with torch, which takes seconds

    config = {"function": function, "spec": spec, "threads": max(1, int(cpus))}
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    scaling = ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=resources)
    reason = ""
    for _ in range(MAX_LOST):
        with tempfile.TemporaryDirectory() as folder:
            trainer: Any = TorchTrainer(
                _work,  # type: ignore[arg-type]  # what it returns is in the result
                train_loop_config=config,
                scaling_config=scaling,
                run_config=RunConfig(storage_path=folder),
            )
            try:
                given: TrialResult = trainer.fit().return_value
                return given
            except WorkerGroupError as error:
                first = error.worker_failures[min(error.worker_failures)]
                if isinstance(first, TrialFailedError):
                    return failed(spec, str(first))
                reason = first_line(first)
            except TrainingFailedError as error:
                reason = first_line(getattr(error, "controller_failure", error))
    raise UserError(f"recovery on {workers} workers failed {MAX_LOST} times: {reason}")


class TrialFailedError(Exception):
    """What a trial came to in one worker: raised, since the others wait for it in a collective."""


def _work(config: dict[str, Any]) -> TrialResult:
    """What every worker does; only the first saves the checkpoint, and its result is taken."""
    from ray.train.torch import get_device

    worker = Worker(config["threads"])
    listen(keep)
    spec: TrialSpec = config["spec"]
    if get_device().type == "cuda":
        import torch

        torch.cuda.set_device(get_device())
    if get_context().get_world_rank():
        spec = spec.model_copy(update={"checkpoint": False})
    node = ray.get_runtime_context().get_node_id()
    _, result = worker.trial(config["function"], spec, 1, node)
    if result.state == "failed":
        raise TrialFailedError(result.cause)
    return result
