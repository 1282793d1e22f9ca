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
for tool in npm python3; do
    command -v "$tool" >/dev/null || { printf 'error: %s is missing\nhint: ./scripts/setup.sh data\n' "$tool" >&2; exit 1; }
done

mkdir -p "$(dirname "$out")"
venv=$(dirname "$out")/.venv
# The renderers' versions are pinned, because the pixels depend on them.
"$venv/bin/python" -c 'import PIL, resvg_py' 2>/dev/null || {
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 resvg_py==0.5.0
}
exec "$venv/bin/python" "$scripts/build_emoji.py" --out "$out" "$@"
