#!/usr/bin/env bash
# Builds vilg with CUDA and NCCL on a machine that has neither, and checks that the program starts, reports
# what is missing, and computes on the CPU and on an emulated GPU. It says nothing about the speed of a GPU. x86-64 Linux only.
#
# nvcc comes as PyPI wheels; in place of the libraries, stand-ins are linked that open the real ones when they are called
# (scripts/cuda_shims.py). To build a program for use, see docs/gpu.md.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
skip() { say "CUDA is not checked here: $*"; exit 0; }
step() { printf "\n== %s\n" "$*" >&2; "$@"; }

[ "$(uname -sm)" = "Linux x86_64" ] || skip "the wheels and stand-ins are for x86-64 Linux"
python3 -c 'import ensurepip, venv' 2>/dev/null || ./scripts/setup.sh cuda || skip "Python's venv cannot be installed"

# Ranks on GPUs are processes of MPI. With the other features, the dependencies are those that the tests compile as well.
features=cuda,nccl,mpi,remote
./scripts/setup.sh mpi
BINDGEN_EXTRA_CLANG_ARGS="-I$(cc -print-file-name=include)"
export BINDGEN_EXTRA_CLANG_ARGS
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
home=$target/cuda
# cudarc 0.19.10 knows nvcc up to 13.4. The compiler and its headers, no libraries: 105 MB.
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96)
if [ "$(cat "$home/wheels" 2>/dev/null)" != "${wheels[*]}" ]; then
    rm -rf "$home"
    mkdir -p "$home"
    step python3 -m venv "$home/venv"
    if ! step "$home/venv/bin/pip" install --quiet --disable-pip-version-check --retries 1 --timeout 20 --no-deps \
        --target "$home/wheels.d" "${wheels[@]}" 2>"$home/pip.log"; then
        # pip's error is the same for a missing package and a missing network, but it only warns about the network.
        grep -qiE 'connection broken|connectionerror|proxyerror|timed out|name resolution|max retries' "$home/pip.log" &&
            skip "nvcc's wheels cannot be downloaded: $(grep -m 1 -oiE "[A-Za-z]+Error\([^)]*" "$home/pip.log" || true)"
        cat "$home/pip.log" >&2
        exit 1
    fi
    printf '%s' "${wheels[*]}" >"$home/wheels"
fi
export CUDA_HOME=$home/wheels.d/nvidia/cu13
export CUDA_PATH=$CUDA_HOME PATH=$CUDA_HOME/bin:$PATH
# Kernels for one GPU architecture, without optimization: only the emulated GPU runs them.
export CUDA_COMPUTE_CAP=80 CUDAFORGE_THREADS=2 NVCC_APPEND_FLAGS="-Ofc max"

source_of() { # source folder of a dependency
    cargo metadata --locked --format-version 1 --features $features | python3 -c '
import json, pathlib, sys
found = [p for p in json.load(sys.stdin)["packages"] if p["name"] == sys.argv[1]]
print(pathlib.Path(found[0]["manifest_path"]).parent)' "$1"
}
step ./scripts/cuda_shims.py "$(source_of cudarc)" 13 "$home/shims"
# candle's kernels link the static CUDA runtime, which opens the driver by itself.
ln -sf "$CUDA_HOME/lib/libcudart_static.a" "$home/shims/libcudart.a"
export LIBRARY_PATH=$home/shims

CUDARC_CUDA_VERSION=12040 step cargo check --locked --features $features
step cargo clippy --locked --all-targets --features $features -- -D warnings
# It only starts and computes for a moment: optimization would take minutes.
step cargo build --locked --features $features --config profile.dev.package.vilg.opt-level=0
vilg=$target/debug/vilg

broken() { say "CUDA: $*"; exit 1; }
# Runs vilg, which must fail with one line that says why and one hint.
refuses() {
    local code=0
    "$vilg" "$@" >"$home/out" 2>"$home/err" || code=$?
    cat "$home/err" >&2
    [ $code = 1 ] || [ $code = 2 ] || broken "\`vilg $*\` ended with code $code"
    [ "$(wc -l <"$home/err")" = 2 ] && grep -q '^error: ' "$home/err" && grep -q '^hint: ' "$home/err" ||
        broken "\`vilg $*\` does not fail in two lines"
    [ ! -s "$home/out" ] || broken "\`vilg $*\` prints a result"
}
step "$vilg" doctor | tee "$home/doctor" >&2
if python3 -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null; then
    say "this machine has a driver: the behavior without a driver is not checked"
else
    grep -q '^cuda  *built, but this machine has no CUDA driver$' "$home/doctor" || broken "\`vilg doctor\` does not report the missing driver"
    grep -q '^device  *cpu$' "$home/doctor" || broken "the CPU is not the default"
    refuses t2i 红苹果 -o "$home/never.png" --device cuda
    refuses train --config configs/emoji.toml --device cuda:1
    refuses t2i 红苹果 -o "$home/never.png" --device cpu --kernels fused
    [ ! -e "$home/never.png" ] || broken "an image was generated"
    # The same program must call the real driver if there is one. This fake driver has a device that cannot be opened.
    echo 'int cuInit(unsigned flags) { return flags; } int cuDeviceGetCount(int *n) { *n = 1; return 0; }' |
        cc -x c -shared -o "$home/libcuda.so.1" -
    export LD_LIBRARY_PATH=$home
    "$vilg" doctor | grep -q '^cuda  *built; cuda:0 ' || broken "the shims do not call an existing driver"
    refuses t2i 红苹果 -o "$home/never.png" --device cuda
    refuses t2i 红苹果 -o "$home/never.png" --device cuda:1
    unset LD_LIBRARY_PATH
fi
caption=$(step "$vilg" caption src/demo/sample.png)
[ -n "$caption" ] && [ "$caption" = "$("$vilg" caption src/demo/sample.png --device cpu)" ] || broken "no caption on the CPU"
say "$caption"

# What the program computes on a GPU, on an emulated one.
step ./scripts/emulated_gpu.sh "$vilg" "$home/emulated"

# Above, candle's kernels are built for sm_80, and ours to PTX. The kernels of tensors and ours must also assemble for newer
# GPUs, which are not available here; ours without a warning.
kernels=$(source_of candle-kernels)/src
assemble() {
    for kernel in affine binary cast conv fill indexing reduce sort ternary unary; do
        nvcc -cubin -std=c++17 -arch="$1" -I"$kernels" "$kernels/$kernel.cu" -o "$home/$kernel.$1.cubin"
    done
}
ours() {
    nvcc -cubin -std=c++17 -arch="$1" -Werror all-warnings src/ops/cuda/kernels.cu -o "$home/ours.$1.cubin"
}
for architecture in sm_80 sm_90a sm_100; do
    step ours $architecture
done
step assemble sm_90a
step assemble sm_100
say "CUDA: builds, links, starts, falls back, and computes on an emulated GPU; no real one was used"
