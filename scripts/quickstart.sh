#!/usr/bin/env bash
# Installs what is missing, builds vilg, generates an image from a line of Chinese and captions an image.
#   ./scripts/quickstart.sh "细腻风格的女宇航员"
set -euo pipefail
prompt=${1:-细腻风格的女宇航员}
cd "$(dirname "$0")/.."

./scripts/setup.sh
# shellcheck disable=SC1091
[ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
cargo build --release --locked
vilg=${CARGO_TARGET_DIR:-target}/release/vilg

mkdir -p out
"$vilg" t2i -o out/generated.png -- "$prompt"
caption=$("$vilg" caption src/demo/sample.png)

printf '\ngenerated “%s”: %s\n' "$prompt" "$PWD/out/generated.png"
printf 'captioned %s: %s\n' "$PWD/src/demo/sample.png" "$caption"
printf 'next: %s --help\n' "$vilg"
