#!/usr/bin/env bash
# Measures the data pipeline as docs/data.md quotes it (bench_data.py), in half a minute on a quiet machine.
#
#     ./scripts/bench_data.sh [VILG] [SCENES]    # the program [target/release/vilg]; shards of scenes [data/scenes/train]
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=scripts/venv.sh
. scripts/venv.sh data/.venv
"$python" scripts/bench_data.py "$(realpath "${1:-${CARGO_TARGET_DIR:-target}/release/vilg}")" "${2:-data/scenes/train}"
