#!/usr/bin/env bash
# Trains two layers of the 10 B model at full width for three steps on two ranks (one process each), and prints the peak memory
# of a rank next to the estimate of `vilg plan`. Takes some minutes and about 20 GB of memory.
#   scripts/slice_10b.sh [more arguments of vilg train]      # needs a build with --features mpi
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
vilg=$root/${CARGO_TARGET_DIR:-target}/release/vilg
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Sixteen copies of one image, a tokenizer trained for one step and a vocabulary of the right size: only sizes matter here.
mkdir images
for i in $(seq 16); do
    cp "$root/src/demo/sample.png" "images/$i.png"
    echo "一张细腻风格的图片" >"images/$i.txt"
done
python3 - <<'PY'
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [chr(0x4E00 + i) for i in range(21128 - 5)]
open("vocab.txt", "w").write("\n".join(words) + "\n")
PY
run() { "$vilg" "$@" >>log 2>&1 || { tail -n 5 log; exit 1; }; }
run train --config "$root/configs/emoji-tokenizer.toml" --set 'data.sources=[{path="images"}]' --set name=tokenizer \
    --set image_tokenizer.image_size=256 --set 'image_tokenizer.channel_multipliers=[1,1,2,2]' --set image_tokenizer.channels=32 \
    --set 'image_tokenizer.attention_sides=[]' --set image_tokenizer.codebook_size=8192 --set train.init_from='""' \
    --set train.steps=1 --set train.warmup_steps=0 --set train.batch_size=1 --set train.sample_every=0 --set image_tokenizer.restart_after=0
run data encode images --model runs/tokenizer/model -o codes

settings=(--config "$root/configs/10b.toml" --set model.layers=2 --set 'data.sources=[{path="codes"}]' --set text.vocab=vocab.txt
    --set image_tokenizer.path=runs/tokenizer/model --set train.steps=3 --set train.warmup_steps=1 --set train.sample_every=0
    --set train.batch_size=2 --set train.caption_batch_size=2 --set train.accumulation=1 --set train.background_checkpoints=false)
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun -n 2 --bind-to none --oversubscribe "$vilg" train "${settings[@]}" "$@"
"$vilg" plan "${settings[@]}" "$@" --gpus 2 --on cpu
python3 - <<'PY'
import json
peaks = [json.loads(line)["peak_memory_bytes"] for line in open("runs/10b/metrics.jsonl")]
print(f"rank 0 held at most {max(peaks) / 1e9:.2f} GB")
PY
