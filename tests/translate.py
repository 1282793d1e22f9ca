"""A translator for the tests of `vilg data translate`: word by word from a small dictionary, with faults on demand.

Usage: translate.py [FAULT [FILE]]. Every text that is translated is appended to FILE.
"""

import json
import os
import sys
import time

WORDS = {"a": "一只", "cat": "猫", "dog": "狗", "red": "红色的", "car": "汽车", "on": "在", "the": "", "grass": "草地上"}


def translate(text):
    return "".join(WORDS.get(word, word) for word in text.lower().split())


def main():
    fault = sys.argv[1] if len(sys.argv) > 1 else ""
    file = sys.argv[2] if len(sys.argv) > 2 else os.devnull
    if fault == "garbage":
        print("loading the model", flush=True)
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        # The order is free.
        for line in reversed(lines):
            question = json.loads(line)
            text = question["text"]
            if "bomb" in text or (fault == "dies-once" and not os.path.exists(file)):
                open(file, "a").close()
                print("cannot go on with this text", file=sys.stderr, flush=True)
                sys.exit(3)
            if "stuck" in text:
                time.sleep(600)
            if "refuse" in text:
                answer = {"id": question["id"], "error": "too hard"}
            elif "blank" in text:
                answer = {"id": question["id"], "text": " "}
            else:
                answer = {"id": question["id"], "text": translate(text)}
                with open(file, "a", encoding="utf-8") as log:
                    log.write(json.dumps(text) + "\n")
            if fault == "slow":
                time.sleep(0.002)
            for _ in range(2 if fault == "twice" else 1):
                print(json.dumps(answer), flush=True)


main()
