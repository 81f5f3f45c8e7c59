#!/usr/bin/env bash
# A search or a study on whole nodes of a Slurm cluster; when its time is up or it is preempted, it
# is queued again and goes on where it stopped.
#
#     sbatch --nodes=4 infra/deploy/slurm.sh search mine.toml
#
# Submit from the checkout. Every node needs .venv at the same path (`make .venv`, once on a shared
# home); run directories must be where the first node of the next attempt finds them.
#
#SBATCH --job-name=sparseramp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sparseramp-%j.log
#
# --exclusive, because Ray stops every Ray of its user on a node. --signal tells this script five
# minutes before the limit, and at preemption where the site has PreemptParameters=send_user_signal.

set -euo pipefail
umask 077
export PATH="$PWD/.venv/bin:$PATH"

# One token for this job, on every node in a file that only its user can read.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="/tmp/sparseramp-$SLURM_JOB_ID.token"
scratch=$(mktemp -d)
# shellcheck disable=SC2317 # called by the trap
remove() {
    rm -rf "$scratch"
    srun rm -f "$RAY_AUTH_TOKEN_PATH" || true # a node may be gone
}
trap remove EXIT
head -c 32 /dev/urandom | base64 --wrap=0 >"$scratch/token"
sbcast --force --preserve "$scratch/token" "$RAY_AUTH_TOKEN_PATH"

# This script runs on the first node, which becomes the head. A name may resolve to loopback there.
address="${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}:6379"
# A node that falls silent is lost after 16 s; Ray's own settings make it 63.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000
export RAY_health_check_failure_threshold=4
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 # seconds; its 30 are too few for many nodes

stopped=
# shellcheck disable=SC2317
stop() {
    stopped=yes
    [[ ! -s $scratch/pid ]] || kill -TERM "$(<"$scratch/pid")" || true
}
trap stop USR1 TERM

# The driver alone is told to stop: Ray goes when the driver has.
# shellcheck disable=SC2016
srun --cpu-bind=none --kill-on-bad-exit=0 ray symmetric-run \
    --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats -- \
    env RAY_ADDRESS="$address" bash -c 'echo $$ >"$0"; exec sparseramp "$@"' "$scratch/pid" "$@" &
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do # a signal ended the wait, and the driver is cleaning up
    status=0
    wait $! || status=$?
done

if [[ ! -s $scratch/pid ]]; then
    echo "slurm.sh: Ray did not start on all $SLURM_JOB_NUM_NODES nodes, see above" >&2
    exit 1
fi
if [[ $stopped && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
