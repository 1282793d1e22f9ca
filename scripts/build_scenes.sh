#!/usr/bin/env bash
# Builds 128-pixel scenes with Chinese captions, lines of poetry and questions in data/scenes, or in the folder named
# first; further arguments go to build_scenes.py. Shares the package cache and the Python environment of build_emoji.sh.
#   ./scripts/build_scenes.sh [OUT] [--scenes 30000] [--poems 21000] [--cache DIR] ...
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)

out=$scripts/../data/scenes
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
exec nice -n 10 "$python" "$scripts/build_scenes.py" --out "$out" --cache "$parent/emoji.npm" "$@"
