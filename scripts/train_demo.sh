#!/usr/bin/env bash
# Trains a model of scenes, poems and emoji of 128 x 128 pixels from nothing: data, image tokenizer, codes, vocabulary,
# generator, and an image of 40 prompts. Run it again after an interruption: what is complete is kept, and training resumes.
#   ./scripts/train_demo.sh [more arguments of vilg train for the generator]
# Ten hours on two cores of a Zen 5 EPYC (estimated from the first steps).
set -euo pipefail
cd "$(dirname "$0")/.."

vilg=${VILG:-target/release/vilg}
codes=data/scenes-codes-128
emoji=(other gendered toned)

./scripts/setup.sh data
./scripts/build_emoji.sh data/emoji-128 --size 128 --cache data/emoji.npm
./scripts/build_scenes.sh data/scenes-large --object-scale 1.7
[ -x "$vilg" ] || cargo build --release --locked

"$vilg" train --config configs/scenes-tokenizer.toml
tokenizer=runs/scenes-tokenizer/model

for split in train heldout; do
    "$vilg" data encode data/scenes-large/$split --model $tokenizer -o "$codes/${split/train/scenes}"
done
for part in "${emoji[@]}"; do
    "$vilg" data encode "data/emoji-128/train/$part" --model $tokenizer -o "$codes/emoji-$part"
done
[ -e data/scenes-vocab.txt ] ||
    "$vilg" data vocab data/scenes-large/train "${emoji[@]/#/data/emoji-128/train/}" -o data/scenes-vocab.txt --normalize simplified

"$vilg" train --config configs/scenes.toml "$@"
"$vilg" t2i --prompts scripts/demo_prompts.txt --model runs/scenes -o runs/scenes/prompts.png --labels
