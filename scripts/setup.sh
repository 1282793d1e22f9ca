#!/usr/bin/env bash
# Installs what a fresh Debian machine lacks to build vilg: a linker and Rust.
# `scripts/setup.sh data` adds what the emoji data needs: npm and Python's venv; `scripts/setup.sh cuda` adds the venv only.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }

missing=()
command -v cc >/dev/null || missing+=(build-essential)
if [ "${1-}" = data ]; then
    command -v npm >/dev/null || missing+=(npm)
fi
if [ "${1-}" = data ] || [ "${1-}" = cuda ]; then
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
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
