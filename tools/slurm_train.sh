#!/usr/bin/env bash
# Trains a config on the nodes of a Slurm job, and goes on by itself after an interruption.
#
#   sbatch --partition gpu --nodes 4 tools/slurm_train.sh CONFIG [arguments of tools/train.py]
#
# Submit it from the repository. Resources are sbatch's own options; those below are defaults, and
# `--gpus-per-node N --ntasks-per-node N` belong together: one task per GPU. See docs/slurm.md.
#
#   sbatch -p gpu --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 --time 12:00:00 \
#     tools/slurm_train.sh configs/sa2va_4b_dual_loop.py --deepspeed deepspeed_zero2 \
#     --work-dir work_dirs/run1 --cfg-options model.objective.beta=0.05
#
# Two minutes before the time limit (SIGUSR1) and when it is pre-empted (SIGTERM) the training
# saves and exits with 85; the job then puts itself back into the queue and resumes.
#
#SBATCH --job-name=sa2va-dual-loop
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

# tools/train.py exits with this when it was asked to stop and has saved.
readonly requeue_code=85

fail() {
  printf '%s: error: %s\n' "${SLURM_JOB_NAME:-slurm_train.sh}" "$1" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail 'this is a batch script: sbatch [options] tools/slurm_train.sh CONFIG'
(($# > 0)) || fail 'no config given: sbatch [options] tools/slurm_train.sh CONFIG'
config=$1
shift
for argument in "$@"; do
  case $argument in
    --resume | --resume=*)
      fail "a job resumes by itself, from the newest checkpoint of its work directory: leave --resume out (to start from other weights: --cfg-options load_from=PATH)" ;;
    --launcher | --launcher=*)
      fail 'the launcher is slurm: leave --launcher out' ;;
  esac
done

# Slurm runs a copy of this file from its spool folder.
cd "$SLURM_SUBMIT_DIR"
[[ -f tools/train.py ]] || fail "there is no tools/train.py in $PWD: run sbatch in the repository"
[[ -f $config ]] || fail "there is no config $config in $PWD"
python=.venv/bin/python
[[ -x $python ]] || python=$(command -v python) || fail 'there is neither .venv (make setup) nor python on PATH'

tasks=${SLURM_NTASKS_PER_NODE:-1}
gpus=${SLURM_GPUS_ON_NODE:-$tasks}
[[ $tasks == "$gpus" ]] \
  || fail "$tasks tasks and $gpus GPUs per node: give --ntasks-per-node and --gpus-per-node the same number"
[[ $SLURM_NTASKS == $((SLURM_JOB_NUM_NODES * tasks)) ]] \
  || fail "$SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes of $tasks each: leave --ntasks out"

# Where the first node is reached, by Slurm's own account: node names need not resolve. A port of
# the job's own, since two jobs may share a node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

printf '%s: job %s, start %s, %s nodes (%s), %s tasks each, %s:%s\n' "$(date '+%F %T')" \
  "$SLURM_JOB_ID" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$SLURM_JOB_NUM_NODES" \
  "$SLURM_JOB_NODELIST" "$tasks" "$MASTER_ADDR" "$MASTER_PORT"

# A signal that reaches this shell is for the training, which is waited for.
trap : TERM USR1

# Ranks exit one after another, so the first to go must not take the others with it
# (--kill-on-bad-exit); those that hang after an error are ended by --wait.
status=0
srun --kill-on-bad-exit=0 --wait=60 \
  "$python" tools/train.py "$config" --launcher slurm --resume auto "$@" || status=$?

state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
if [[ $state != RUNNING ]]; then
  # Until this script ends, such a job is COMPLETING.
  printf '%s: Slurm ends the job (cancelled, time limit, or a lost node; the training ended with %s); to start it again: scontrol requeue %s\n' \
    "$(date '+%F %T')" "$status" "$SLURM_JOB_ID"
elif ((status == requeue_code)); then
  printf '%s: the training was asked to stop and has saved: back into the queue\n' "$(date '+%F %T')"
  scontrol requeue "$SLURM_JOB_ID"
elif ((status != 0)); then
  printf '%s: the training ended with %s; to go on from its last checkpoint: scontrol requeue %s\n' \
    "$(date '+%F %T')" "$status" "$SLURM_JOB_ID" >&2
fi
exit "$status"
