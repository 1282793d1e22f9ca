#!/usr/bin/env bash
# Checks a build of vilg on a GPU in at most five minutes, the most valuable parts first. Needs a driver, CUDA's libraries
# (cuBLAS, cuRAND, NCCL) and the program, nothing else: see docs/gpu.md.
#
#   scripts/gpu_check.sh                       # the first GPU, ./vilg or target/release/vilg
#   scripts/gpu_check.sh --only device,ops,attention --seconds 60
#   scripts/gpu_check.sh --device cpu --small  # dry run: the same parts at small sizes, on the CPU (scripts/test.sh runs it)
#
# stdout: a JSON line for each part as it finishes, with name, status (ok, failed, skipped, timed out), seconds, figures and
# error; then a line with the name `summary`. Exit code: 0 if no part failed or timed out, 1 otherwise, 2 wrong usage.
set -uo pipefail

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
}
SELF=$(readlink -f "$0")
ROOT=$(dirname "$(dirname "$SELF")")
VILG=${VILG:-} DEVICE=${DEVICE:-cuda:0} SMALL=${SMALL:-} ONLY='' BUDGET='' INSIDE=''
while [ $# -gt 0 ]; do
    case $1 in
    --vilg) VILG=$(readlink -f "${2:?--vilg needs a file}") && shift 2 ;;
    --device) DEVICE=${2:?--device needs a device} && shift 2 ;;
    --only) ONLY=${2:?--only needs names of parts} && shift 2 ;;
    --seconds) BUDGET=${2:?--seconds needs a number} && shift 2 ;;
    --small) SMALL=1 && shift ;;
    # How the script runs a part under a time limit.
    --inside) INSIDE=${2:?} && shift 2 ;;
    *) usage ;;
    esac
done
# A dry run is not about time: it may share its processors.
BUDGET=${BUDGET:-$((SMALL ? 3000 : 300))}
[[ $BUDGET =~ ^[1-9][0-9]*$ ]] || usage
if [ -z "$VILG" ]; then
    VILG=$ROOT/vilg
    [ -f "$VILG" ] || VILG=${CARGO_TARGET_DIR:-$ROOT/target}/release/vilg
fi
VILG=$(readlink -f "$VILG")

# ---- Parts. stdout: the figures, as JSON; stderr: what went wrong; exit code 3: skipped, for the reason on stderr.

vilg() { "$VILG" "$@" --quiet; }

skip() { echo "$*" >&2 && exit 3; }

# Text as a JSON string of at most three lines.
json() {
    head -n 3 | LC_ALL=C tr -d '\000-\010\013-\037' | sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/ /g' |
        awk 'BEGIN { printf "\"" } { printf "%s%s", (NR > 1 ? "\\n" : ""), substr($0, 1, 500) } END { printf "\"" }'
}

device_open() {
    local facts
    facts=$(vilg doctor --json --device "$DEVICE") || return 1
    printf '{"doctor":%s,"driver":%s}' "$facts" \
        "$(nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv,noheader 2>/dev/null | json)"
    local opened
    opened=$(grep -o '"device":"[^"]*"' <<<"$facts" | cut -d'"' -f4)
    case $opened in
    "$DEVICE" | "${DEVICE/%cuda/cuda:0}") ;;
    *) echo "$DEVICE does not open: $opened" >&2 && return 1 ;;
    esac
}

ops() { vilg doctor --check ops --json --device "$DEVICE"; }
attention() { vilg doctor --check attention --json --device "$DEVICE"; }
collectives() { vilg doctor --check collectives --json --device "$DEVICE"; }

# Sixteen copies of one image, encoded by the demo's image tokenizer.
codes() {
    local i
    mkdir -p images || return 1
    for i in $(seq 16); do
        cp "$ROOT/src/demo/sample.png" "images/$i.png" || return 1
        echo "一张细腻风格的图片，第$i张" >"images/$i.txt"
    done
    vilg data encode images --model demo -o codes --json --device cpu
}

# Trains three small layers for STEPS steps: tiny NAME [more arguments of vilg train].
STEPS=$((SMALL ? 4 : 20))
tiny() {
    local name=$1 hidden=$((SMALL ? 32 : 64))
    shift
    [ -d codes ] || codes >/dev/null || return 1
    rm -rf "runs/$name"
    vilg train --config "$ROOT/configs/emoji.toml" --set name="$name" --set 'data.sources=[{path="codes"}]' \
        --set text.vocab=demo --set image_tokenizer.path=demo --set model.layers=3 --set "model.hidden=$hidden" \
        --set model.heads=2 --set train.batch_size=4 --set train.caption_batch_size=4 --set train.warmup_steps=2 \
        --set train.steps=$STEPS --set train.sample_every=0 --set train.precision=f32 "$@" >/dev/null
}

# The value of a key in each line of JSON.
values() { grep -o "\"$1\":[^,}]*" "$2" | cut -d: -f2; }

# Compares the losses of two runs: the first step within 1e-4, all within 2 %.
same_losses() {
    local losses=() key run
    for key in image text; do
        for run in "$1" "$2"; do
            values $key "runs/$run/metrics.jsonl" >"$key.$run"
        done
        losses+=("$(paste "$key.$1" "$key.$2" | awk -v key=$key -v steps=$STEPS '
            { difference = $1 - $2; if (difference < 0) difference = -difference; share = difference / ($1 > 0 ? $1 : 1e-9) }
            # What is not a number is null in the log.
            $1 !~ /^[0-9]/ || $2 !~ /^[0-9]/ || !(share <= (NR == 1 ? 1e-4 : 0.02)) { bad = bad ? bad : NR }
            share > most { most = share }
            NR == 1 { first = share }
            { last = $2 }
            END {
                printf "\"%s\":{\"steps\":%d,\"first_difference\":%.3g,\"largest_difference\":%.3g,\"last\":%.6g}", key, NR, first, most, last
                if (NR != steps || NF != 2) bad = NR + 1
                if (bad) { print key ": the losses differ at step " bad >"/dev/stderr"; exit 1 }
            }')") || return 1
    done
    local IFS=,
    printf '{%s}' "${losses[*]}"
}

# In a dry run, two ranks stand in for the device: otherwise a run would be compared with itself.
losses() {
    local ranks=1
    [ "$DEVICE" != cpu ] || ranks=2
    tiny cpu --device cpu && tiny device --device "$DEVICE" --nproc $ranks && same_losses cpu device
}

# The same losses with the kernels of the program, which stock ops are compared with above.
kernels() {
    [ "$DEVICE" != cpu ] || skip "the kernels are for CUDA devices"
    [ -f runs/cpu/metrics.jsonl ] || tiny cpu --device cpu || return 1
    tiny fused --device "$DEVICE" --kernels fused --set train.offload=none && same_losses cpu fused
}

# ZeRO stages shard over two ranks if there are two GPUs (or on the CPU). With one GPU, a single rank owns everything.
stages() {
    local ranks=1 device=$DEVICE stage figures=() all=(0 0,none 1 2 3 3,none 3,disk)
    [ -z "$SMALL" ] || all=(0,none 3)
    [ -f runs/cpu/metrics.jsonl ] || tiny cpu --device cpu || return 1
    if [ "$DEVICE" = cpu ]; then
        ranks=2
    elif [ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -gt 1 ]; then
        ranks=2 device=cuda
    fi
    for stage in "${all[@]}"; do
        local more=(--set "train.zero_stage=${stage%,*}")
        [ "$stage" = "${stage%,*}" ] || more+=(--set "train.offload=${stage#*,}")
        tiny stage --device "$device" --nproc $ranks "${more[@]}" || return 1
        figures+=("\"$stage\":$(same_losses cpu stage)") || return 1
    done
    local IFS=,
    printf '{"ranks":%d,"stages":{%s}}' $ranks "${figures[*]}"
}

# Without sampling, images are the CPU's. Where two codes are almost equally likely, rounding may choose the other one, and
# all later codes differ: one of four images may.
demo() {
    local prompts=(红苹果 立体风格的太阳 扁平风格的小狗 细腻风格的女宇航员) all
    [ -z "$SMALL" ] || prompts=(红苹果)
    mkdir -p demo
    local draw=(t2i "${prompts[@]}" --temperature 0 --guidance 1 --json)
    vilg "${draw[@]}" -o demo/cpu.png --device cpu >demo/cpu.json 2>demo/err || { cat demo/err >&2 && return 1; }
    vilg "${draw[@]}" -o demo/device.png --device "$DEVICE" >demo/device.json 2>demo/err || { cat demo/err >&2 && return 1; }
    grep -o '"codes":\[[0-9,]*\]' demo/cpu.json >demo/cpu.codes
    grep -o '"codes":\[[0-9,]*\]' demo/device.json >demo/device.codes
    all=$(paste -d'|' demo/cpu.codes demo/device.codes | awk -F'|' '$1 == $2 { equal++ } END { print equal + 0 }')
    local caption
    caption=$(vilg caption "$ROOT/src/demo/sample.png" --device "$DEVICE") || return 1
    printf '{"images":%d,"equal":%d,"tokens_per_second":%s,"caption":%s}' ${#prompts[@]} "$all" \
        "$(values tokens_per_second demo/device.json)" "$(json <<<"$caption")"
    [ "$(wc -l <demo/cpu.codes)" = ${#prompts[@]} ] || { echo "no codes in the JSON of vilg t2i" >&2 && return 1; }
    [ "$all" -ge $((${#prompts[@]} - ${#prompts[@]} / 4)) ] || { echo "$all of ${#prompts[@]} images have the CPU's codes" >&2 && return 1; }
    [ "$caption" = "$(vilg caption "$ROOT/src/demo/sample.png" --device cpu)" ] || { echo "the caption is not the CPU's" >&2 && return 1; }
}

attention_speed() {
    local size=(--shape 10b-layer --sides 32 --repeat 5)
    [ -z "$SMALL" ] || size=(--shape tiny --sides 4 --repeat 1)
    vilg bench attention "${size[@]}" --json --device "$DEVICE"
}

layer_speed() {
    local size=(--shape 10b-layer --batch 4 --repeat 3)
    [ -z "$SMALL" ] || size=(--shape tiny --repeat 1)
    vilg bench train "${size[@]}" --precision bf16 --json --device "$DEVICE"
}

# A step of the same layer with stock ops and with the kernels of the program.
kernels_speed() {
    [ "$DEVICE" != cpu ] || skip "the kernels are for CUDA devices"
    local size=(--shape 10b-layer --batch 4 --repeat 3) precision kernels figures=() found
    [ -z "$SMALL" ] || size=(--shape tiny --repeat 1)
    for precision in bf16 f32; do
        for kernels in stock fused; do
            found=$(vilg bench train "${size[@]}" --precision $precision --json --device "$DEVICE" --kernels $kernels) || return 1
            figures+=("\"$precision $kernels\":$found")
        done
    done
    local IFS=,
    printf '{%s}' "${figures[*]}"
}

decode_speed() {
    local size=(--shape perf --batch 16 --repeat 2)
    [ -z "$SMALL" ] || size=(--shape tiny --repeat 1)
    vilg bench decode "${size[@]}" --json --device "$DEVICE"
}

# 256-pixel codes of a tokenizer that was trained for one step: only their number matters.
large_codes() {
    [ -d images ] || codes >/dev/null || return 1
    awk 'BEGIN { print "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]"; for (i = 5; i < 21128; i++) print "w" i }' >vocab.txt
    vilg train --config "$ROOT/configs/emoji-tokenizer.toml" --set 'data.sources=[{path="images"}]' --set name=tokenizer \
        --set image_tokenizer.image_size=256 --set 'image_tokenizer.channel_multipliers=[1,1,2,2]' \
        --set image_tokenizer.channels=32 --set 'image_tokenizer.attention_sides=[]' --set image_tokenizer.codebook_size=8192 \
        --set train.init_from='""' --set train.steps=1 --set train.warmup_steps=0 --set train.batch_size=1 \
        --set train.sample_every=0 --set image_tokenizer.restart_after=0 --device cpu >/dev/null &&
        vilg data encode images --model runs/tokenizer/model -o large-codes --device cpu >/dev/null
}

# Trains a shipped configuration for some steps: its last line of metrics.jsonl, the memory of the GPU and the plan.
configuration() {
    local name=$1 watch='' plan
    shift
    local settings=(--config "$ROOT/configs/$name.toml" --set train.steps=4 --set train.warmup_steps=1
        --set train.sample_every=0 --set train.background_checkpoints=false --set train.checkpoint_every=100 "$@")
    if [ -n "$SMALL" ]; then
        [ -d codes ] || codes >/dev/null || return 1
        settings+=(--set 'data.sources=[{path="codes"}]' --set text.vocab=demo --set image_tokenizer.path=demo
            --set model.layers=2 --set model.hidden=64 --set model.heads=2)
    else
        [ -d large-codes ] || large_codes || return 1
        settings+=(--set 'data.sources=[{path="large-codes"}]' --set text.vocab=vocab.txt --set image_tokenizer.path=runs/tokenizer/model)
    fi
    if [[ $DEVICE = cuda* ]] && command -v nvidia-smi >/dev/null; then
        nvidia-smi --id="$(grep -o '[0-9]*$' <<<"$DEVICE" || echo 0)" --query-gpu=memory.used --format=csv,noheader,nounits \
            --loop-ms=200 >memory.txt 2>/dev/null &
        watch=$!
    fi
    rm -rf "runs/$name"
    vilg train "${settings[@]}" --device "$DEVICE" >/dev/null
    local code=$?
    [ -z "$watch" ] || kill "$watch"
    [ $code = 0 ] || return $code
    plan=$(vilg plan "${settings[@]}" --gpus 1 --gpu-memory 80 --json 2>/dev/null)
    printf '{"seconds":[%s],"last_step":%s,"memory_mib":%s,"plan":%s}' "$(values seconds "runs/$name/metrics.jsonl" | paste -sd,)" \
        "$(tail -n 1 "runs/$name/metrics.jsonl")" \
        "$(awk '$1 > most { most = $1 } NR == 1 { first = $1 } END { printf NR ? "{\"before\":%d,\"peak\":%d}" : "null", first, most }' memory.txt 2>/dev/null || echo null)" \
        "${plan:-null}"
}

small_model() {
    configuration 300m --set train.batch_size=16 --set train.caption_batch_size=16 --set train.accumulation=1
}

# Two layers of the 10 B model at full width, as in scripts/slice_10b.sh.
slice_10b() {
    configuration 10b --set model.layers=2 --set train.batch_size=2 --set train.caption_batch_size=2 --set train.accumulation=1
}

# The same work in PyTorch, if python3 has it: training steps of 38 M parameters in bf16, decoding of 16 images.
pytorch() {
    local device=${DEVICE%%:*} size=(--repeat 3) ours=(--shape perf --repeat 3) python=${PYTHON:-python3}
    if [ "$device" = cuda ]; then
        "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || skip "no PyTorch with CUDA"
    else
        "$python" -c 'import torch' 2>/dev/null || skip "no PyTorch"
    fi
    [ -z "$SMALL" ] || { size=(--repeat 1 --layers 2 --hidden 32 --heads 2 --side 4 --batch 2 --codebook 32) && ours=(--shape tiny --repeat 1); }
    local theirs_train theirs_decode our_train
    theirs_train=$("$python" "$ROOT/scripts/bench_pytorch.py" train --device "$device" --precision bf16 "${size[@]}") || return 1
    theirs_decode=$("$python" "$ROOT/scripts/bench_pytorch.py" decode --device "$device" --precision f32 "${size[@]}") || return 1
    our_train=$(vilg bench train "${ours[@]}" --precision bf16 --json --device "$DEVICE") || return 1
    printf '{"pytorch_train":%s,"vilg_train":%s,"pytorch_decode":%s}' "$theirs_train" "$our_train" "$theirs_decode"
}

if [ -n "$INSIDE" ]; then
    cd "$WORK" && "$INSIDE"
    exit
fi

# ---- The run.

[ -x "$VILG" ] || { echo "error: there is no program $VILG" >&2 && exit 2; }

# NCCL, cuBLAS and the like: where the loader looks, else in PyTorch's wheels and the usual folders.
libraries() {
    local site
    for site in $(python3 -c 'import site; print(*site.getsitepackages(), site.getusersitepackages())' 2>/dev/null); do
        printf '%s\n' "$site"/nvidia/*/lib
    done
    printf '%s\n' "${CUDA_HOME:-/usr/local/cuda}/lib64" /usr/local/cuda*/lib64 /usr/local/nvidia/lib64
}
while read -r folder; do
    [ ! -d "$folder" ] || LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done < <(libraries)

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export VILG DEVICE SMALL WORK LD_LIBRARY_PATH

bad=0 done_well=0 skipped=0
report() { # name, status, seconds, figures, error
    printf '{"name":"%s","status":"%s","seconds":%s,"figures":%s,"error":%s}\n' "$1" "$2" "$3" "${4:-null}" "${5:-null}"
}

part() { # name, limit in seconds, function
    local left=$((BUDGET - SECONDS)) limit=$2 status begun code error=''
    if [ -n "$ONLY" ] && [[ ,$ONLY, != *,$1,* ]]; then
        return
    fi
    if [ -n "${closed:-}" ]; then
        report "$1" skipped 0 null "$(json <<<"$closed")"
        skipped=$((skipped + 1))
        return
    fi
    if [ "$left" -lt 5 ]; then
        report "$1" skipped 0 null "$(json <<<"no time left")"
        skipped=$((skipped + 1))
        return
    fi
    [ -z "$SMALL" ] || limit=$((limit * 10))
    [ "$limit" -le "$left" ] || limit=$left
    begun=$(date +%s.%N)
    timeout --kill-after 3 "$limit" bash "$SELF" --inside "$3" >"$WORK/figures" 2>"$WORK/error"
    code=$?
    case $code in
    0) status=ok && done_well=$((done_well + 1)) ;;
    3) status=skipped && skipped=$((skipped + 1)) ;;
    124 | 137) status='timed out' && bad=$((bad + 1)) ;;
    *) status=failed && bad=$((bad + 1)) ;;
    esac
    [ $code = 0 ] || error=$(json <"$WORK/error")
    report "$1" "$status" "$(awk -v a="$begun" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')" \
        "$(tr -d '\n' <"$WORK/figures")" "$error"
    if [ "$1" = device ] && [ $code != 0 ]; then
        closed="the device does not open"
    fi
}

part device 30 device_open
part ops 60 ops
part attention 60 attention
part losses 60 losses
part kernels 30 kernels
part collectives 30 collectives
part stages 60 stages
part demo 40 demo
part attention-speed 40 attention_speed
part layer-speed 45 layer_speed
part kernels-speed 45 kernels_speed
part 300m 75 small_model
part 10b-slice 75 slice_10b
part decode-speed 30 decode_speed
part pytorch 60 pytorch
[ $((bad + done_well + skipped)) -gt 0 ] || { echo "error: --only $ONLY names no part" >&2 && exit 2; }
report summary "$([ $bad = 0 ] && echo ok || echo failed)" $SECONDS \
    "{\"ok\":$done_well,\"failed\":$bad,\"skipped\":$skipped,\"device\":\"$DEVICE\"}"
[ $bad = 0 ]
