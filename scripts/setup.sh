#!/usr/bin/env bash
# Installs the build dependencies of vilg on a fresh Debian machine: a linker and Rust.
# `scripts/setup.sh data` adds the dependencies of the emoji data: npm and Python's venv; `scripts/setup.sh cuda` only venv;
# `scripts/setup.sh mpi` those of the feature `mpi`: Open MPI and libclang, which reads its headers; `scripts/setup.sh test`
# those of the tests: all of these, a C++ compiler, and `ip` for two hosts on one machine. `scripts/setup.sh pages` adds a
# browser and its driver, for scripts/human_pages.sh and scripts/serve_check.sh alone.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }

missing=()
command -v cc >/dev/null || missing+=(build-essential)
if [ "${1-}" = data ]; then
    command -v npm >/dev/null || missing+=(npm)
fi
if [ "${1-}" = data ] || [ "${1-}" = cuda ] || [ "${1-}" = test ] || [ "${1-}" = pages ]; then
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
fi
if [ "${1-}" = mpi ] || [ "${1-}" = test ]; then
    command -v mpicc >/dev/null && command -v mpirun >/dev/null || missing+=(libopenmpi-dev openmpi-bin)
    ldconfig -p | grep -q 'libclang[-0-9.]*so' || missing+=(libclang1)
fi
if [ "${1-}" = test ]; then
    command -v ip >/dev/null || missing+=(iproute2)
    # The tests of the CUDA kernels compile them as C++.
    command -v c++ >/dev/null || missing+=(g++)
fi
if [ "${1-}" = pages ]; then
    command -v chromium >/dev/null || missing+=(chromium)
    command -v chromedriver >/dev/null || missing+=(chromium-driver)
fi
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
rust_is_new_enough() {
    command -v rustc >/dev/null || return 1
    local have
    have=$(rustc --version | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$wanted" "$have" | sort -V | head -n 1)" = "$wanted" ]
}
# shellcheck disable=SC1091
[ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
if ! rust_is_new_enough && ! command -v rustup >/dev/null; then
    missing+=(rustup)
fi

if [ ${#missing[@]} -gt 0 ]; then
    say "installing: ${missing[*]}"
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || { say "hint: run as root: apt-get install ${missing[*]}"; exit 1; }
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -qq
    if ! "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2; then
        say "hint: Debian before 13 has no rustup package: install Rust $wanted or newer from rust-lang.org, then try again"
        exit 1
    fi
fi
rust_is_new_enough || rustup toolchain install stable --profile minimal --component clippy,rustfmt >&2
rust_is_new_enough || rustup default stable >&2
