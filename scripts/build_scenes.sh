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
for tool in npm python3; do
    command -v "$tool" >/dev/null || { printf 'error: %s is missing\nhint: ./scripts/setup.sh data\n' "$tool" >&2; exit 1; }
done

mkdir -p "$(dirname "$out")"
venv=$(dirname "$out")/.venv
"$venv/bin/python" -c 'import PIL, resvg_py, opencc' 2>/dev/null || {
    [ -x "$venv/bin/pip" ] || python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 resvg_py==0.5.0 opencc==1.4.2
}
exec nice -n 10 "$venv/bin/python" "$scripts/build_scenes.py" --out "$out" --cache "$(dirname "$out")/emoji.npm" "$@"
