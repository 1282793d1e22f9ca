#!/usr/bin/env python3
"""Build Chinese text-image pairs from openly licensed emoji drawings.

Images  SVG and WebP emoji sets on npm (STYLES, with their licences)
Text      Unicode CLDR annotations, zh (PACKAGES)
Output    WebDataset shards as img2dataset writes them (00000.tar with 000000000.png, .txt, .json) in
          OUT/train/{toned,gendered,other}, OUT/heldout_{style,tone,gender,concept} and OUT/flags,
          beside OUT/ATTRIBUTION.md and OUT/dataset_stats.json

Needs `npm` (only `npm pack`: nothing is installed, no script of a package is run), Pillow and resvg_py;
scripts/build_emoji.sh provides them. Every choice hangs on a hash of the emoji, so that two builds give
the same bytes.
"""

import argparse
import collections
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import resvg_py
from PIL import Image

PACKAGES = {  # npm package: version
    "cldr-annotations-full": "48.2.0",
    "cldr-annotations-derived-full": "48.2.0",
    "emojibase-data": "17.0.0",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/openmoji": "1.2.29",
    "@lobehub/fluent-emoji-3d": "1.1.0",
}

Style = collections.namedtuple("Style", "package words license author")
GOOGLE = "Google Inc, noto-emoji"
MICROSOFT = "Microsoft Corporation, fluentui-emoji"
TWITTER = "Twitter, Inc and other contributors (jdecked/twemoji)"
OPENMOJI = "OpenMoji, HfG Schwaebisch Gmuend"
STYLES = {  # the first of the style words is the usual one
    "noto": Style("@iconify-json/noto", ["细腻风格", "谷歌风格"], "Apache-2.0", GOOGLE),
    "noto-v1": Style("@iconify-json/noto-v1", ["复古风格", "谷歌旧版风格"], "Apache-2.0", GOOGLE),
    "twemoji": Style("@iconify-json/twemoji", ["扁平风格", "推特风格"], "CC-BY-4.0", TWITTER),
    "fluent-color": Style("@iconify-json/fluent-emoji", ["现代风格", "微软现代风格"], "MIT", MICROSOFT),
    "fluent-flat": Style("@iconify-json/fluent-emoji-flat", ["简约风格", "微软扁平风格"], "MIT", MICROSOFT),
    "fluent-contrast": Style("@iconify-json/fluent-emoji-high-contrast", ["黑白剪影风格", "单色风格"], "MIT", MICROSOFT),
    "fluent-3d": Style("@lobehub/fluent-emoji-3d", ["立体风格", "三维风格"], "MIT", MICROSOFT),
    # Share-alike: only with --share-alike, and never in what this project publishes.
    "openmoji": Style("@iconify-json/openmoji", ["线条风格", "手绘线条风格"], "CC-BY-SA-4.0", OPENMOJI),
}
SHARE_ALIKE = {"openmoji"}
# These share one drawing, so they must be held out together.
FAMILY = {style: "fluent" for style in ("fluent-color", "fluent-3d", "fluent-flat")}

TONES = {
    "1f3fb": "较浅肤色",
    "1f3fc": "中等-浅肤色",
    "1f3fd": "中等肤色",
    "1f3fe": "中等-深肤色",
    "1f3ff": "较深肤色",
}
SPOKEN_TONES = {"中等-浅肤色": "中浅肤色", "中等-深肤色": "中深肤色"}
PEOPLE = ("男人", "女人", "成人", "男孩", "女孩")
MODIFIERS = sorted([*TONES.values(), *PEOPLE, "面向右边", "红发", "卷发", "白发", "秃顶"], key=len, reverse=True)


def stable_hash(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def key_of(codepoints):
    """The join key of all sources: lower-case hex code points without the variation selector."""
    return "-".join(c for c in codepoints.lower().split("-") if c != "fe0f")


def key_of_text(text):
    return key_of("-".join(f"{ord(c):x}" for c in text))


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fetch(package, cache):
    """The unpacked folder of a package, downloaded once."""
    name = f"{package.lstrip('@').replace('/', '-')}-{PACKAGES[package]}"
    folder = cache / name
    if not folder.is_dir():
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package}@{PACKAGES[package]}"]
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
        part = cache / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(cache / f"{name}.tgz") as archive:
            archive.extractall(part, filter="data")
        (inner,) = part.iterdir()
        inner.rename(folder)
        part.rmdir()
    return folder


# ---------------------------------------------------------------- text


def load_text(cache):
    """Two maps by key: (short name, keywords) from CLDR, (group, subgroup) from emojibase."""
    derived = fetch("cldr-annotations-derived-full", cache) / "annotationsDerived/zh/annotations.json"
    plain = fetch("cldr-annotations-full", cache) / "annotations/zh/annotations.json"
    text = {}
    for path, root in ((derived, "annotationsDerived"), (plain, "annotations")):
        for emoji, entry in read_json(path)[root]["annotations"].items():
            if entry.get("tts"):
                text[key_of_text(emoji)] = (entry["tts"][0], entry.get("default", []))
    base = fetch("emojibase-data", cache)
    messages = read_json(base / "zh/messages.json")
    subgroup_names = {s["order"]: s["key"] for s in messages["subgroups"]}
    group_names = {g["order"]: g["key"] for g in messages["groups"]}
    groups = {}
    for emoji in read_json(base / "zh/data.json"):
        for one in [emoji, *emoji.get("skins", [])]:
            groups[key_of(one["hexcode"])] = (group_names.get(one.get("group")), subgroup_names.get(one.get("subgroup")))
    return text, groups


def noun_phrase(short_name):
    """CLDR's short name as one speaks: `女宇航员: 较深肤色` is `较深肤色的女宇航员`."""
    if ": " not in short_name:
        return short_name
    head, rest = short_name.split(": ", 1)
    if head == "旗":
        return rest + "旗帜"
    if head == "按键":
        return "按键" + rest
    modifiers, left = [], rest
    while left:
        modifier = next((m for m in MODIFIERS if left.startswith(m)), None)
        if modifier is None:
            return rest + "的" + head
        modifiers.append(SPOKEN_TONES.get(modifier, modifier))
        left = left[len(modifier) :]
    people = [m for m in modifiers if m in PEOPLE]
    if head == "家庭":
        return "、".join(people) + "组成的家庭"
    tones = [m for m in modifiers if m.endswith("肤色")]
    others = [m for m in modifiers if m not in people and m not in tones]
    facing = "".join(m for m in others if m.startswith("面向"))
    attributes = ["和".join(dict.fromkeys(tones))] if tones else []
    attributes += ["和".join(people)] if people else []
    attributes += [m for m in others if not m.startswith("面向")]
    return facing + "、".join(attributes) + ("的" if attributes or facing else "") + head


def caption_variants(key, style, short_name, keywords):
    """The noun phrase, and all captions made from it; the first is the plainest."""
    name = noun_phrase(short_name)
    words = STYLES[style].words
    look = words[stable_hash(key + style + "w") % len(words)]
    plain = [k for k in keywords if k not in TONES.values() and k not in short_name and k not in name and k != "旗"]
    plain.sort(key=lambda keyword: stable_hash(key + style + keyword))
    captions = [f"{look}的{name}", f"一个{look}的{name}图标", f"{name}，{look}", f"白色背景上的{name}，{look}"]
    if plain:
        captions += [f"{look}的{name}，{plain[0]}", f"{name}，{'，'.join(plain[:2])}，{look}"]
    return name, list(dict.fromkeys(captions))


# ---------------------------------------------------------------- images


def icon_keys(cache):
    """Key by icon name, from the sets that tell code points."""
    keys = {}
    for style in ("noto", "fluent-flat", "twemoji", "openmoji"):
        for codepoints, name in read_json(fetch(STYLES[style].package, cache) / "chars.json").items():
            keys.setdefault(name, key_of(codepoints))
    return keys


def load_style(style, cache, keys_by_name):
    """Yields (key, drawing) of a style; a drawing is SVG text or the path of an image file."""
    folder = fetch(STYLES[style].package, cache)
    if style == "fluent-3d":
        yield from load_files(folder / "assets", cache)
        return
    icons = read_json(folder / "icons.json")
    names = {}
    if (folder / "chars.json").exists():
        for codepoints, name in read_json(folder / "chars.json").items():
            names.setdefault(key_of(codepoints), name)
    if not names:
        for name in icons["icons"]:
            if name in keys_by_name:
                names.setdefault(keys_by_name[name], name)
    for key, name in sorted(names.items()):
        alias = icons.get("aliases", {}).get(name)
        if name not in icons["icons"] and alias and set(alias) <= {"parent"}:
            name = alias["parent"]
        if icon := icons["icons"].get(name):
            yield key, svg(icon, icons)


def load_files(assets, cache):
    """Microsoft's own drawings; some come twice, with and without the variation selector in the name."""
    known = read_json(fetch(STYLES["fluent-flat"].package, cache) / "chars.json")
    known = {key_of(codepoints) for codepoints in known}  # the rest (flags and more) is of unknown origin
    files = {}
    for path in sorted(assets.iterdir()):
        files.setdefault(key_of(path.stem), path)
    for key, path in sorted(files.items()):
        if key in known:
            yield key, path


def svg(icon, icons):
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return (
        f'<svg {names} width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def render(job):
    """(PNG, None), or (None, error): one bad drawing must not stop the build."""
    drawing, size = job
    try:
        image = rasterise(drawing, size).convert("RGBA")
        image.thumbnail((size, size), Image.LANCZOS)
        if image.getchannel("A").getbbox() is None:
            return None, "empty"
        canvas = Image.new("RGB", (size, size), "white")
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2), image)
        png = io.BytesIO()
        canvas.save(png, "PNG", optimize=False)
        return png.getvalue(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def rasterise(drawing, size):
    if isinstance(drawing, Path):
        return Image.open(drawing)
    width, height = map(float, re.search(r'width="([\d.]+)" height="([\d.]+)"', drawing).groups())
    longer = {"width": size} if width >= height else {"height": size}
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=drawing, skip_system_fonts=True, **longer))))


# ---------------------------------------------------------------- splits


def parse_person(key):
    """(role, gender, tones): the role is the key without tone and gender."""
    codepoints = key.split("-")
    tones = tuple(c for c in codepoints if c in TONES)
    rest = [c for c in codepoints if c not in TONES]
    gender = None
    if rest[0] in ("1f468", "1f469", "1f9d1") and len(rest) > 1:
        gender = {"1f468": "m", "1f469": "f", "1f9d1": "n"}[rest[0]]
        rest[0] = "P"
    elif rest[-1] in ("2640", "2642") and len(rest) > 1:
        gender = "f" if rest[-1] == "2640" else "m"
        rest = rest[:-2]
    elif "2640" in rest[1:] or "2642" in rest[1:]:  # running, facing right
        gender = "f" if "2640" in rest else "m"
        rest = [c for c in rest if c not in ("2640", "2642")]
    return "-".join(rest), gender, tones


def split_of(key, style, group, subgroup, genders):
    if group == "flags" and subgroup in ("country-flag", "subdivision-flag"):
        return "flags"  # nobody can guess a flag from its name
    role, gender, tones = parse_person(key)
    if gender and len(genders.get(role, ())) > 1 and stable_hash("g" + role) % 8 == 0:
        if gender == ("f" if stable_hash("gf" + role) % 2 else "m"):
            return "heldout_gender"  # this role is never seen with this gender
    person = role + str(gender)
    if len(tones) == 1 and stable_hash("t" + person) % 3 == 0:
        if tones[0] == sorted(TONES)[stable_hash("tt" + person) % 5]:
            return "heldout_tone"  # this person is never seen in this skin tone
    is_thing = not tones and not gender and group not in ("people-body", "component")
    if is_thing and stable_hash("c" + key) % 20 == 0:
        return "heldout_concept"  # never seen at all
    if stable_hash("s" + key + FAMILY.get(style, style)) % 25 == 0:
        return "heldout_style"  # seen, but never in this style
    return "train"


def folder_of(split, key):
    """Train pairs are in three folders: people in skin tones and genders are many and similar, so that
    a configuration can sample them less often."""
    if split != "train":
        return split
    _, gender, tones = parse_person(key)
    return "train/" + ("toned" if tones else "gendered" if gender else "other")


# ---------------------------------------------------------------- build


class Shards:
    def __init__(self, folder, shard_size):
        self.folder, self.shard_size, self.count, self.tar = folder, shard_size, 0, None

    def add(self, png, caption, meta):
        shard, index = divmod(self.count, self.shard_size)
        if index == 0:
            self.close()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tar = tarfile.open(self.folder / f"{shard:05d}.tar", "w")
        key = f"{shard:05d}{index:04d}"
        text = json.dumps({**meta, "key": key}, ensure_ascii=False, indent=1)
        for extension, content in (("png", png), ("txt", caption.encode()), ("json", text.encode())):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.count += 1

    def close(self):
        if self.tar:
            self.tar.close()


def collect(styles, text, cache, limit, statistics):
    """All (key, style, drawing) that have a caption, shuffled in a fixed way."""
    keys_by_name = icon_keys(cache)
    rows = []
    for style in styles:
        for key, drawing in load_style(style, cache, keys_by_name):
            statistics[style]["images"] += 1
            if key in text:
                rows.append((key, style, drawing))
            else:
                statistics[style]["no_caption"] += 1
    if limit:
        rows = sorted(rows, key=lambda row: stable_hash(row[0] + row[1]))[:limit]
    rows.sort(key=lambda row: stable_hash("order" + row[0] + row[1]))
    return rows


def labels_of(key, style, split, names, digest, size):
    """(caption, the sample's JSON)."""
    (short_name, keywords), (group, subgroup) = names
    name, variants = caption_variants(key, style, short_name, keywords)
    caption = variants[stable_hash("pick" + key + style) % len(variants)]
    _, gender, tones = parse_person(key)
    package, words, license, author = STYLES[style]
    return caption, {
        "url": f"npm:{package}@{PACKAGES[package]}#{key}",
        "caption": caption,
        "status": "success",
        "error_message": None,
        "width": size,
        "height": size,
        "original_width": size,
        "original_height": size,
        "exif": "{}",
        "sha256": digest,
        "emoji": "".join(chr(int(c, 16)) for c in key.split("-")),
        "codepoints": key,
        "style": style,
        "style_zh": words[0],
        "name_zh": name,
        "cldr_tts": short_name,
        "keywords": keywords,
        "captions": variants,
        "group": group,
        "subgroup": subgroup,
        "gender": gender,
        "skin_tones": [TONES[tone] for tone in tones],
        "split": split,
        "license": license,
        "author": author,
    }


def build(out, cache, args, styles):
    statistics = {style: collections.Counter() for style in styles}
    text, groups = load_text(cache)
    rows = collect(styles, text, cache, args.limit, statistics)
    genders = collections.defaultdict(set)
    for key, *_ in rows:
        role, gender, _ = parse_person(key)
        if gender:
            genders[role].add(gender)
    with ProcessPoolExecutor(args.jobs) as pool:
        images = list(pool.map(render, [(drawing, args.size) for _, _, drawing in rows], chunksize=32))

    made, errors = [], []
    for (key, style, _), (png, error) in zip(rows, images):
        if error:
            errors.append((style, key, error))
            statistics[style]["render_failed"] += 1
            continue
        group = groups.get(key, (None, None))
        split = split_of(key, style, *group, genders)
        made.append((key, style, group, png, hashlib.sha256(png).hexdigest(), split))
    in_train = {digest for *_, digest, split in made if split == "train"}

    shards, captions, splits, digests = {}, collections.defaultdict(set), collections.Counter(), set()
    for key, style, group, png, digest, split in made:
        if split != "train" and digest in in_train:
            statistics[style]["dropped_leak"] += 1  # the same pixels under another name in train
            continue
        caption, meta = labels_of(key, style, split, (text[key], group), digest, args.size)
        folder = folder_of(split, key)
        if folder not in shards:
            shards[folder] = Shards(out / folder, args.shard_size)
        shards[folder].add(png, caption, meta)
        statistics[style]["written"] += 1
        splits[split] += 1
        digests.add(digest)
        captions[split].add(caption)
        captions["all"].add(caption)
        captions["names"].add(meta["name_zh"])
    for shard in shards.values():
        shard.close()
    return {
        "pairs": sum(splits.values()),
        "splits": dict(splits),
        "train": {folder: s.count for folder, s in sorted(shards.items()) if folder.startswith("train/")},
        "styles": {style: dict(count) for style, count in statistics.items()},
        "unique_captions": {name: len(found) for name, found in captions.items()},
        "unique_images": len(digests),
        "caption_chars": dict(sorted(collections.Counter(map(len, captions["all"])).items())),
        "charset": len({character for caption in captions["all"] for character in caption}),
        "errors": errors[:50],
    }


def attribution(styles, size):
    lines = ["# Sources", "", f"Images were rasterised to {size}x{size} on white; captions come from CLDR.", ""]
    for style in styles:
        package, _, license, author = STYLES[style]
        lines.append(f"- {style}: {author} — {license} — npm {package}@{PACKAGES[package]}")
    annotations = "npm cldr-annotations-full, cldr-annotations-derived-full"
    lines.append(f"- captions: Unicode CLDR zh annotations 48.2.0, (c) Unicode, Inc. — Unicode-3.0 — {annotations}")
    lines.append("- emoji groups: emojibase-data 17.0.0, (c) Miles Johnson — MIT")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="folder to create (default: data/emoji)")
    parser.add_argument("--cache", type=Path, help="folder for downloaded packages (default: OUT.npm)")
    parser.add_argument("--size", type=int, default=64, help="side length of the images in pixels (default: 64)")
    parser.add_argument("--shard-size", type=int, default=1000, help="pairs per shard (default: 1000)")
    parser.add_argument("--styles", help=f"some of: {','.join(STYLES)}")
    parser.add_argument("--share-alike", action="store_true", help="include OpenMoji (CC-BY-SA)")
    parser.add_argument("--limit", type=int, default=0, help="maximum number of pairs, 0: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of rendering processes (default: one per CPU)")
    args = parser.parse_args()
    styles = args.styles.split(",") if args.styles else [s for s in STYLES if args.share_alike or s not in SHARE_ALIKE]
    if unknown := [style for style in styles if style not in STYLES]:
        parser.error(f"--styles: there is no {unknown[0]}")
    if not 0 < args.shard_size <= 10000:
        parser.error("--shard-size: 1 to 10000 (a key has 4 digits for it)")
    if args.out.exists():
        parser.error(f"{args.out} exists; remove it to build it again")
    cache = (args.cache or args.out.with_name(args.out.name + ".npm")).resolve()
    cache.mkdir(parents=True, exist_ok=True)

    # The folder is renamed to its final name when it is complete.
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    summary = build(part, cache, args, styles)
    (part / "dataset_stats.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8")
    (part / "ATTRIBUTION.md").write_text(attribution(styles, args.size), encoding="utf-8")
    part.rename(args.out)
    print(json.dumps({"out": str(args.out), "pairs": summary["pairs"], "splits": summary["splits"]}))


if __name__ == "__main__":
    main()
