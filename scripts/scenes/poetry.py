"""Lines of classical poetry: what they name, and records for them. Standard library and OpenCC only."""

import json
import random

from scenes.records import HERE, PLACES, SKY, STYLES, THINGS, TIMES, fill_sky, finish, new_object, set_scenery, stable_hash

def read_lexicon():
    lexicon = {}
    for line in (HERE / "poetry.tsv").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            word, meaning = line.split("\t")
            lexicon[word] = meaning
    return lexicon


LEXICON = read_lexicon()
LONGEST = max(map(len, LEXICON))


def meanings(line):
    """What a line names, in order: the longest word wins, and a word that means nothing hides the shorter words in it."""
    found, at = [], 0
    while at < len(line):
        for length in range(min(LONGEST, len(line) - at), 0, -1):
            meaning = LEXICON.get(line[at : at + length])
            if meaning:
                if meaning != "-" and meaning not in found:
                    found.append(meaning)
                at += length
                break
        else:
            at += 1
    return found


def named(found, kind):
    return [m.split(":")[1] for m in found if m.startswith(kind + ":")]


def is_drawable(found):
    """At least two things, one of them more than scenery, that can be in one image."""
    things, sky = named(found, "thing"), named(found, "sky")
    if len(things) + len(sky) < 2 or not things or len(things) > 3 or len(sky) > 2:
        return False
    if len(sky) == 2 and not any(set(SKY[sky[0]][2]) & set(SKY[sky[1]][2]) & {t} for t in TIMES) or {"圆月", "弯月"} <= set(sky):
        return False
    return bool(poem_scenery(found))


def poem_scenery(found):
    """(time, place) pairs that fit all that a line names."""
    places = [p for p in PLACES if p not in ("海底", "桌上") and all(fits(THINGS[n], p) for n in named(found, "thing"))]
    if asked := named(found, "place"):
        places = [p for p in places if p in asked]
    elif "weather:下雪" not in found and places != ["雪地"]:
        places = [p for p in places if p != "雪地"]
    times = [t for t in TIMES if all(t in SKY[s][2] for s in named(found, "sky"))]
    if asked := named(found, "time"):
        times = [t for t in times if t in asked]
    return [(t, p) for t in times for p in places]


def fits(thing, place):
    if thing.kind in ("table", "book", "food", "lantern"):  # indoor things of poetry stand outdoors
        return place in ("草地", "花园", "街道", "山间", "雪地", "田野")
    return place in thing.places or thing.stand == "ground" and thing.kind != "bug" and place == "雪地"


def poem_record(rng, line, aspect):
    found = meanings(line)
    style = rng.choice(list(STYLES))
    record = {"kind": "poem", "sky": [], "objects": [], "relations": [], "style": style, "line": line}
    weather = (named(found, "weather") or [None])[0]
    time, place = rng.choice(poem_scenery(found))
    set_scenery(rng, record, time, place, weather)
    fill_sky(rng, record, named(found, "sky"))
    record["objects"] = [new_object(rng, n, style) for n in named(found, "thing")]
    return finish(rng, record, aspect)


# ---------------------------------------------------------------- reading


def read_variants():
    """Variants that OpenCC leaves, and the standard characters for them."""
    lines = (HERE / "variants.tsv").read_text(encoding="utf-8").splitlines()
    return {ord(variant): standard for variant, standard in (line.split("\t") for line in lines if not line.startswith("#"))}


VARIANTS = read_variants()


def is_simplified(text):
    """Whether GB 2312 has all characters: then none is a traditional form, a variant or a rarity."""
    try:
        return len(text.encode("gb2312")) == 2 * len(text) and all("一" <= c <= "鿿" for c in text)
    except UnicodeEncodeError:
        return False


def couplets(path):
    """Pairs of lines of five or seven characters in simplified script."""
    import opencc

    simplify, pairs = opencc.OpenCC("t2s").convert, []
    for poem in json.loads(path.read_text(encoding="utf-8")):
        for text in poem.get("paragraphs") or []:
            for sentence in simplify(text).translate(VARIANTS).replace("！", "。").replace("？", "。").split("。"):
                lines = sentence.strip().split("，")
                if len(lines) == 2 and len(lines[0]) == len(lines[1]) and len(lines[0]) in (5, 7):
                    if is_simplified("".join(lines)) and any(map(is_named, [*lines, sentence])):
                        pairs.append(tuple(lines))
    return pairs


def is_named(text):
    return is_drawable(meanings(text))


def poem_lines(package, pool):
    """{line or couplet: whether it is held out}. A couplet and its lines are on one side."""
    folder = package / "dist"
    files = sorted((folder / "quantangshi").glob("poet*.json"))
    lines, side = {}, {}
    for found in pool.map(couplets, files, chunksize=4):
        for a, b in found:
            held = stable_hash(f"poem {a}{b}") % 20 == 0
            if side.get(a, held) != held or side.get(b, held) != held:
                continue
            side[a] = side[b] = held
            for text in (a, b, f"{a}，{b}"):
                if is_named(text):
                    lines[text] = held
    return lines
