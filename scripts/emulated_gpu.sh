#!/usr/bin/env bash
# Runs a build with CUDA on an emulated GPU (scripts/emulated_gpu/driver.cpp): the parts of gpu_check.sh at small sizes, on one
# device and on two, and what a training step asks of the device against what `vilg plan` expects. It shows what the program
# computes on a GPU and which ops it launches; it says nothing about speed. scripts/cuda.sh runs it on its build.
#
#   scripts/emulated_gpu.sh VILG [FOLDER]       # FOLDER: for the emulator and its kernels, target/emulated_gpu
#   scripts/emulated_gpu.sh VILG FOLDER COMMAND [ARGUMENT..]    # runs a command on the emulated GPU instead
set -euo pipefail
root=$(readlink -f "$(dirname "$0")/..")
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
vilg=$(readlink -f "$1")
home=$(realpath -m "${2:-${CARGO_TARGET_DIR:-$root/target}/emulated_gpu}")
sources=$root/scripts/emulated_gpu

# Translated kernels stay valid as long as the emulator does.
made=$(cat "$sources"/*.cpp "$sources"/*.h "$sources/ptx_to_c.py" | sha256sum)
if [ "$(cat "$home/made" 2>/dev/null)" != "$made" ]; then
    rm -rf "$home"
    mkdir -p "$home/bin"
    g++ -std=c++17 -O2 -Wall -Wextra -Werror -shared -fPIC -DEMULATED_GPU_SOURCES="\"$sources\"" \
        "$sources/driver.cpp" "$sources/libraries.cpp" -o "$home/libcuda.so.1" -ldl -lrt -lpthread
    for library in cublas.so.13 curand.so.10 nccl.so.2; do
        ln -s libcuda.so.1 "$home/lib$library"
    done
    # It lists two devices, as the driver does; other questions have no answer.
    printf '#!/bin/sh\n[ "$1" = --list-gpus ] && printf "GPU 0\\nGPU 1\\n"\n' >"$home/bin/nvidia-smi"
    chmod +x "$home/bin/nvidia-smi"
    printf '%s' "$made" >"$home/made"
fi
export LD_LIBRARY_PATH=$home PATH=$home/bin:$PATH
if [ $# -gt 2 ]; then
    exec "${@:3}"
fi

"$root/scripts/gpu_check.sh" --vilg "$vilg" --device cuda:0 --small \
    --only device,ops,losses,kernels,collectives,stages,demo,10b-slice
python3 "$sources/count_step.py" "$vilg"
