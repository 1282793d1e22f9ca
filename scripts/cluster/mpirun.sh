#!/usr/bin/env bash
# Trains on the hosts of an Open MPI host file (`node1 slots=2`), one rank per slot. If a signal, a killed rank or a lost host
# stops the run, it is restarted from the newest checkpoint:
#   scripts/cluster/mpirun.sh HOSTFILE configs/10b.toml [more arguments of vilg train]
# The folder must be the same on all hosts (a shared file system). Ctrl-C ends it for good, after a checkpoint.
set -euo pipefail
hosts=${1:?usage: mpirun.sh HOSTFILE CONFIG [ARGUMENTS]}
config=${2:?usage: mpirun.sh HOSTFILE CONFIG [ARGUMENTS]}
shift 2
vilg=${VILG:-target/release/vilg}
failures=0
while :; do
    code=0
    begun=$SECONDS
    # Without --bind-to none each rank is pinned to one core.
    mpirun --hostfile "$hosts" --bind-to none "$vilg" train --config "$config" "$@" || code=$?
    case $code in
    0 | 2 | 130) exit "$code" ;; # done, wrong usage, Ctrl-C
    75) failures=0 ;;
    *)
        # Ten failures in a row within ten minutes each: restarting does not help.
        [ $((SECONDS - begun)) -lt 600 ] && failures=$((failures + 1)) || failures=1
        [ $failures -lt 10 ] || exit "$code"
        ;;
    esac
    echo "mpirun ended with $code: starting again in 10 s" >&2
    sleep 10
done
