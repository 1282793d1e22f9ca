#!/usr/bin/env bash
# Drives the page of `vilg serve` in a headless Chromium, its API with the official `openai` client and curl, and puts it under
# the load of 16 clients, some of which leave, send nonsense or are slow (serve_check.py).
#
#     ./scripts/serve_check.sh [--requests N] [VILG] [FOLDER]
#
# N: requests of the load [200]; VILG: the program [target/debug/vilg]; FOLDER: for screenshots [none].
set -euo pipefail
cd "$(dirname "$0")/.."

requests=200
if [ "${1-}" = --requests ]; then
    requests=$2
    shift 2
fi
vilg=${1:-${CARGO_TARGET_DIR:-target}/debug/vilg}
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    ./scripts/setup.sh pages || { echo "the page of vilg serve is not checked: chromium cannot be installed here" >&2; exit 0; }
fi
[ -x "$vilg" ] || cargo build --locked

venv=target/pages
if ! $venv/bin/python -c 'import openai, selenium' 2>/dev/null; then
    python3 -m venv --clear $venv
    $venv/bin/pip install --quiet --disable-pip-version-check selenium==4.51.0 openai==3.57.0
fi
$venv/bin/python scripts/serve_check.py "$(realpath "$vilg")" "$requests" "${@:2:1}"
