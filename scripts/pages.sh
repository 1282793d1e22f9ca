# shellcheck shell=bash
# Sourced by the scripts that drive pages in a headless Chromium. Argument 1: what is not checked where Chromium cannot be
# installed; the script then ends, with 0. Argument 2: the program, built if it is missing. Leaves the interpreter of an
# environment with selenium and openai in $python.
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    ./scripts/setup.sh pages || { echo "$1 not checked: chromium cannot be installed here" >&2; exit 0; }
fi
[ -x "$2" ] || cargo build --locked

python=target/pages/bin/python
if ! $python -c 'import openai, selenium' 2>/dev/null; then
    python3 -m venv --clear target/pages
    target/pages/bin/pip install --quiet --disable-pip-version-check selenium==4.51.0 openai==3.57.0
fi
