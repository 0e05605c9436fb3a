#!/usr/bin/env bash
# Installs what some tests want of the system and `make test` does not install by itself:
#
#   chromium           a browser for the page of the training report
#   slurm-wlm, munge   a cluster of two nodes on this machine (tests/slurm/setup.sh)
#
# Debian, as root. Nothing is done where all of it is there; exits 1 where something stays missing.
set -euo pipefail

fail() {
  printf 'ci_packages.sh: error: %s\n' "$1" >&2
  exit 1
}

on_path() {
  local name
  for name in "$@"; do
    command -v "$name" >/dev/null || return 1
  done
}

packages=()
on_path chromium || on_path chromium-browser || on_path google-chrome || on_path google-chrome-stable \
  || packages+=(chromium)
on_path sbatch slurmctld slurmd || packages+=(slurm-wlm)
on_path munged || packages+=(munge)

if ((${#packages[@]} == 0)); then
  echo 'ci_packages.sh: Chromium, Slurm and munge are there'
  exit
fi
on_path apt-get || fail "there is no apt-get; missing: ${packages[*]}"
[[ $EUID == 0 ]] || fail "apt-get needs root; missing: ${packages[*]}"
echo "ci_packages.sh: apt-get installs ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || fail 'apt-get update failed'
apt-get install -qq -y --no-install-recommends "${packages[@]}" || fail 'apt-get install failed'
