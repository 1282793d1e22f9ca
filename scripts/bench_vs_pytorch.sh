#!/usr/bin/env bash
# Benchmarks vilg and PyTorch side by side on this machine and prints medians and ratios; all values are in
# target/pytorch/result.json.
#   ./scripts/bench_vs_pytorch.sh                                  # all benchmarks, 5 rounds
#   ./scripts/bench_vs_pytorch.sh --works train,decode-1 --rounds 9
#   ./scripts/bench_vs_pytorch.sh --python /path/to/python         # a Python that already has PyTorch
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/setup.sh
# shellcheck disable=SC1091
[ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"

folder=target/pytorch
mkdir -p $folder
python=$folder/bin/python
case " $* " in
*" --python "*) ;;
*)
    "$python" -c 'import torch, dalle_pytorch' 2>/dev/null || {
        python3 -m venv --clear $folder
        pip=("$python" -m pip install --quiet --disable-pip-version-check)
        "${pip[@]}" torch==2.15.0 numpy==2.4.6 setuptools==80.9.0
        # The closest comparable project. bench_pytorch.py avoids the dependencies of its image tokenizers.
        "${pip[@]}" --no-deps dalle-pytorch==1.6.6 einops==0.8.2 axial-positional-embedding==0.3.12 rotary-embedding-torch==0.9.1
    }
    set -- --python "$python" "$@"
    ;;
esac
case " $* " in
*" --vilg "*) ;;
*)
    cargo build --release --locked
    set -- --vilg "${CARGO_TARGET_DIR:-target}/release/vilg" "$@"
    ;;
esac
exec python3 scripts/bench_compare.py --out $folder/result.json "$@"
