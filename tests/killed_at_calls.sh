#!/usr/bin/env bash
# Kills a run of two ranks at each single system call that writes, syncs, renames or deletes, and resumes it: the newest
# checkpoint must be complete every time, and the result must be bit-equal to that of an undisturbed run. Then the same with
# SIGTERM at every such call: signals during saving. Needs strace.
#   tests/killed_at_calls.sh PATH_TO_VILG FOLDER    # FOLDER contains tiny.toml, as made by tests/it/ranks.rs
set -euo pipefail
vilg=$(realpath "$1")
cd "$2"

skip() { echo "skipped: $*"; exit 0; }
command -v strace >/dev/null || skip "strace is not installed"
strace -qq -o /dev/null true 2>/dev/null || skip "strace may not trace here"

calls=(write fsync rename unlink openat)
train() { # name, then what to run it under
    local name=$1
    shift
    "$@" "$vilg" --threads 2 train --config tiny.toml --nproc 2 --set name="$name" --set train.zero_stage=3 \
        --set train.steps=6 --set train.checkpoint_every=2 --set train.decay_start=1 --set train.background_checkpoints="$background" 2>log
}
as_nobody_killed() {
    cmp runs/killed/model/model.safetensors runs/whole/model/model.safetensors &&
        cmp runs/killed/checkpoints/step-6/state.json runs/whole/checkpoints/step-6/state.json &&
        ! grep -q 'panicked\|is not usable' log
}

kills=0
for background in false true; do
    rm -rf runs/whole
    train whole
    for call in "${calls[@]}"; do
        for ((n = 1; ; n++)); do
            rm -rf runs/killed
            # strace counts the calls of each thread.
            if train killed strace -f -qq -o /dev/null -e trace="$call" -e inject="$call:signal=KILL:when=$n"; then
                break
            fi
            kills=$((kills + 1))
            train killed || { cat log; echo "killed at $call $n, it does not resume"; exit 1; }
            as_nobody_killed || { cat log; echo "killed at $call $n, its result differs"; exit 1; }
        done
    done
    rm -rf runs/killed
    stops=0
    # Each run does at least one step and exits with code 75, or ends.
    until train killed strace -f -qq -o /dev/null -e trace=fsync,rename -e inject=fsync,rename:signal=TERM; do
        stops=$((stops + 1))
        [ $stops -lt 20 ] || { cat log; echo "signals prevent progress"; exit 1; }
    done
    as_nobody_killed || { cat log; echo "signals during saving change the result"; exit 1; }
done
echo "$kills kills at single calls cost no bit"
