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
# shellcheck source=scripts/pages.sh
. scripts/pages.sh "the page of vilg serve is" "$vilg"
"$python" scripts/serve_check.py "$(realpath "$vilg")" "$requests" "${@:2:1}"
