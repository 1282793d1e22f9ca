#!/usr/bin/env bash
# Drives the raters' pages of `vilg eval human` in a headless Chromium and computes their report again (human_pages.py).
#
#     ./scripts/human_pages.sh [VILG] [FOLDER]    # the program [target/debug/vilg]; a folder for screenshots [none]
set -euo pipefail
cd "$(dirname "$0")/.."

vilg=${1:-${CARGO_TARGET_DIR:-target}/debug/vilg}
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    ./scripts/setup.sh pages || { echo "the raters' pages are not checked: chromium cannot be installed here" >&2; exit 0; }
fi
[ -x "$vilg" ] || cargo build --locked

venv=target/pages
if ! $venv/bin/python -c 'import openai, selenium' 2>/dev/null; then
    python3 -m venv --clear $venv
    $venv/bin/pip install --quiet --disable-pip-version-check selenium==4.51.0 openai==3.57.0
fi
$venv/bin/python scripts/human_pages.py "$(realpath "$vilg")" "${@:2:1}"
