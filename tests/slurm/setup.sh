#!/usr/bin/env bash
# A real Slurm with two nodes on this one machine, for the tests. Debian, as root.
#
#   tests/slurm/setup.sh install          Debian's packages (nothing where they are there)
#   tests/slurm/setup.sh start FOLDER     daemons, everything they write under FOLDER
#   tests/slurm/setup.sh node FOLDER N    starts the daemon of node nN (again)
#   tests/slurm/setup.sh stop FOLDER      ends what `start` and `node` started
#
# After `start`: SLURM_CONF=FOLDER/slurm.conf sinfo
set -euo pipefail

fail() {
  printf 'setup.sh: error: %s\n' "$1" >&2
  exit 1
}

install_packages() {
  if command -v sbatch slurmctld slurmd munged >/dev/null; then
    return
  fi
  command -v apt-get >/dev/null || fail 'there is no apt-get: install Slurm by hand'
  [[ $EUID == 0 ]] || fail 'apt-get needs root'
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
}

# Below those that the system gives to whoever asks for any: daemons come and go, and nobody else may
# get a port of theirs in between.
free_ports() {
  python3 - "$1" <<'PYTHON'
import pathlib
import random
import socket
import sys

ephemeral = int(pathlib.Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split()[0])
held = []
for port in random.sample(range(10_000, max(20_000, ephemeral)), 100):
    probe = socket.socket()
    try:
        probe.bind(('', port))
    except OSError:
        continue
    held.append(probe)
    if len(held) == int(sys.argv[1]):
        break
print(*(probe.getsockname()[1] for probe in held))
PYTHON
}

configure() {
  local folder=$1 host controller n1 n2
  host=$(hostname -s)
  read -r controller n1 n2 < <(free_ports 3)
  mkdir -p "$folder"/{state,spool-n1,spool-n2,munge}
  chmod 700 "$folder/munge"
  [[ -f $folder/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
  # No control groups and no accounting: a machine in a container has neither. Node names that do
  # not resolve, as on many clusters.
  cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for so long before it may start (two minutes for anything below 5), and then
# for the scheduler to come by.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
SchedulerParameters=bf_interval=1,sched_interval=1
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
ReturnToService=2
SlurmdTimeout=6
KillWait=30
MinJobAge=3600
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$n1 CPUs=2 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$n2 CPUs=2 Gres=gpu:1 State=UNKNOWN
# A job in urgent takes the nodes from one in gpu, which gets SIGTERM and a minute.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
CONF
  printf 'NodeName=n[1-2] Name=gpu File=/dev/null\n' >"$folder/gres.conf"
}

start_node() {
  slurmd -N "n$2" -f "$1/slurm.conf"
}

start() {
  local folder=$1
  configure "$folder"
  export SLURM_CONF=$folder/slurm.conf
  munged --force --key-file "$folder/munge/key" --socket "$folder/munge/socket" \
    --pid-file "$folder/munge/pid" --log-file "$folder/munge/log" \
    --seed-file "$folder/munge/seed" --num-threads 2
  slurmctld -i -f "$SLURM_CONF"
  start_node "$folder" 1
  start_node "$folder" 2
  for _ in {1..900}; do
    [[ $(sinfo --noheader --format %T%D 2>/dev/null) == idle2 ]] && return
    sleep 0.2
  done
  stop "$folder"
  tail -n 5 "$folder"/slurm*.log >&2
  fail "the nodes are not up after 180 s; logs in $folder"
}

stop() {
  local folder=$1 pidfile pid
  export SLURM_CONF=$folder/slurm.conf
  timeout 10 scancel --full --signal KILL --state RUNNING --user root 2>/dev/null || true
  timeout 10 scancel --state PENDING --state RUNNING --user root 2>/dev/null || true
  for _ in {1..25}; do
    [[ -z $(timeout 5 squeue --noheader 2>/dev/null) ]] && break
    sleep 0.2
  done
  for pidfile in "$folder"/slurmd-n*.pid "$folder/slurmctld.pid" "$folder/munge/pid"; do
    [[ -f $pidfile ]] || continue
    pid=$(<"$pidfile")
    kill "$pid" 2>/dev/null || continue
    for _ in {1..50}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  done
}

[[ $# == 1 && $1 == install ]] && { install_packages; exit; }
(($# >= 2)) || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
case $action in
  start) start "$folder" ;;
  node) start_node "$folder" "$3" ;;
  stop) stop "$folder" ;;
  *) fail "unknown action $action" ;;
esac
