#!/usr/bin/env bash
# Trains a config on several machines without Slurm: run it on each of them, with torchrun inside.
#
#   tools/dist_train.sh --nnodes 2 --node-rank 0 --master-addr node-a --nproc-per-node 8 CONFIG ...
#   tools/dist_train.sh --nnodes 2 --node-rank 1 --master-addr node-a --nproc-per-node 8 CONFIG ...
#
# What follows the config goes to tools/train.py. See docs/slurm.md.
set -euo pipefail

fail() {
  printf 'dist_train.sh: error: %s\n' "$1" >&2
  exit 2
}

usage() {
  cat <<'TEXT'
usage: tools/dist_train.sh [options] CONFIG [arguments of tools/train.py]

  --nproc-per-node N   processes on this machine, one per GPU (required)
  --nnodes N           machines that take part (default: 1)
  --node-rank N        number of this machine, from 0 (required where --nnodes > 1)
  --master-addr HOST   machine 0, as the others reach it (required where --nnodes > 1)
  --master-port PORT   a free port of machine 0 (default: 29500)

Every machine gets the same command but for --node-rank, within ten minutes of each other. A SIGTERM
makes the training save and stop; the same command with `--resume auto` goes on.
TEXT
}

nproc='' nnodes=1 node_rank='' master_addr='' master_port=29500
while (($# > 0)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --nproc-per-node | --nnodes | --node-rank | --master-addr | --master-port)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --nproc-per-node) nproc=$2 ;;
        --nnodes) nnodes=$2 ;;
        --node-rank) node_rank=$2 ;;
        --master-addr) master_addr=$2 ;;
        --master-port) master_port=$2 ;;
      esac
      shift 2 ;;
    -*) fail "unknown option $1 (options of tools/train.py come after the config)" ;;
    *) break ;;
  esac
done
(($# > 0)) || { usage >&2; exit 2; }
config=$1
shift

number() { [[ $2 =~ ^[0-9]+$ ]] || fail "$1 must be a number, got '$2'"; }
[[ -n $nproc ]] || fail '--nproc-per-node is missing: processes on this machine, one per GPU'
number --nproc-per-node "$nproc"
number --nnodes "$nnodes"
number --master-port "$master_port"
((nproc > 0 && nnodes > 0)) || fail '--nproc-per-node and --nnodes start at 1'
((master_port > 0 && master_port < 65536)) || fail "--master-port must lie in 1..65535, got $master_port"
if ((nnodes > 1)); then
  [[ -n $node_rank ]] || fail "--nnodes $nnodes needs --node-rank, the number of this machine from 0"
  [[ -n $master_addr ]] || fail "--nnodes $nnodes needs --master-addr, the address of machine 0"
fi
node_rank=${node_rank:-0} master_addr=${master_addr:-127.0.0.1}
number --node-rank "$node_rank"
((node_rank < nnodes)) || fail "--node-rank $node_rank, but --nnodes $nnodes: they count from 0"
for argument in "$@"; do
  case $argument in
    --launcher | --launcher=*) fail 'the launcher is pytorch: leave --launcher out' ;;
  esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f $config ]] || fail "there is no config $config"
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python) || fail 'there is neither .venv (make setup) nor python on PATH'

if ((node_rank == 0)); then
  # torchrun says so as well, in the middle of a long traceback.
  "$python" - "$master_port" <<'PYTHON' || fail "port $master_port of this machine is taken: choose another with --master-port, on every machine"
import socket
import sys

with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(('', int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PYTHON
fi

exec "$python" -m torch.distributed.run \
  --nnodes "$nnodes" --node-rank "$node_rank" --nproc-per-node "$nproc" \
  --master-addr "$master_addr" --master-port "$master_port" --rdzv-conf timeout=600 \
  "$root/tools/train.py" "$config" --launcher pytorch "$@"
