#!/usr/bin/env bash
# Drives the raters' pages of `vilg eval human` in a headless Chromium and computes their report again (human_pages.py).
#
#     ./scripts/human_pages.sh [VILG] [FOLDER]    # the program [target/debug/vilg]; a folder for screenshots [none]
set -euo pipefail
cd "$(dirname "$0")/.."

vilg=${1:-${CARGO_TARGET_DIR:-target}/debug/vilg}
# shellcheck source=scripts/pages.sh
. scripts/pages.sh "the raters' pages are" "$vilg"
"$python" scripts/human_pages.py "$(realpath "$vilg")" "${@:2:1}"
