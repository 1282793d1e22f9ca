#!/usr/bin/env bash
# Builds the emoji data (20,468 Chinese text-image pairs, about five minutes) in data/emoji, or in the
# folder given as first argument; further arguments go to build_emoji.py. Does nothing if the folder exists.
#   ./scripts/build_emoji.sh [OUT] [--size 64] [--cache DIR] ...
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)

out=$scripts/../data/emoji
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    out=$1
    shift
fi
if [ -e "$out" ]; then
    printf '%s is there already\n' "$out" >&2
    exit 0
fi
parent=$(dirname "$out")
mkdir -p "$parent"
# shellcheck source=scripts/venv.sh
. "$scripts/venv.sh" "$parent/.venv"
exec "$python" "$scripts/build_emoji.py" --out "$out" "$@"
