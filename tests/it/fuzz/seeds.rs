//! Small valid inputs, and what makes lengths and checksums right again after an edit.

use image::{DynamicImage, ImageFormat, RgbImage, Rgba, RgbaImage};
use std::{
    fs,
    io::{Cursor, Read, Write},
    path::{Path, PathBuf},
};
use tar::{Builder, EntryType, Header};
use zip::{CompressionMethod, ZipArchive, ZipWriter, write::SimpleFileOptions};

pub fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(path)
}

fn read(path: &str) -> Vec<u8> {
    fs::read(file(path)).unwrap()
}

/// A safetensors file with this header.
pub fn safetensors(header: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, &[0; 64]].concat()
}

pub fn safetensors_headers() -> Vec<Vec<u8>> {
    [
        r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b.weight":{"dtype":"BF16","shape":[4,5],"data_offsets":[24,64]}}"#,
        r#"{"__metadata__":{"format":"pt"},"x":{"dtype":"F64","shape":[],"data_offsets":[0,8]},"y":{"dtype":"I64","shape":[7],"data_offsets":[8,64]}}"#,
        r#"{"empty":{"dtype":"F16","shape":[0,9],"data_offsets":[0,0]},"u":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}   "#,
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

/// Checkpoints of each format.
pub fn checkpoints() -> Vec<Vec<u8>> {
    let mut all = vec![read("golden/torch_zip.pth"), read("golden/torch_old.pth"), read("golden/numpy.pkl")];
    all.push(safetensors(&safetensors_headers()[0]));
    all.push(read("cases/safetensors_header_len_128.safetensors"));
    all
}

/// The members of PyTorch's archive by name.
fn torch_archive() -> Vec<(String, Vec<u8>)> {
    let mut archive = ZipArchive::new(Cursor::new(read("golden/torch_zip.pth"))).unwrap();
    let count = archive.len();
    let member = |i| {
        let mut entry = archive.by_index(i).unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (entry.name().unwrap().into_owned(), bytes)
    };
    (0..count).map(member).collect()
}

/// The pickles of PyTorch's and numpy's files.
pub fn pickles() -> Vec<Vec<u8>> {
    let of_torch = torch_archive().into_iter().find(|(name, _)| name.ends_with("data.pkl")).unwrap().1;
    vec![of_torch, read("golden/numpy.pkl"), read("cases/pickle_dag_4k_to_3.4GB.pkl")]
}

/// PyTorch's archive with another pickle.
pub fn torch_file(pickle: &[u8]) -> Vec<u8> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in torch_archive() {
        archive.start_file(name.as_str(), options).unwrap();
        archive.write_all(if name.ends_with("data.pkl") { pickle } else { &bytes }).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn rgb(width: u32, height: u32) -> DynamicImage {
    RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 37) as u8, (y * 91) as u8, (x * y) as u8])).into()
}

/// Images of all formats, with and without alpha, of 8 and 16 bits.
pub fn images() -> Vec<Vec<u8>> {
    let alpha: DynamicImage = RgbaImage::from_fn(5, 6, |x, y| Rgba([x as u8, y as u8, 9, (x * 50) as u8])).into();
    let mut all = vec![
        encoded(&rgb(12, 9), ImageFormat::Png),
        encoded(&alpha, ImageFormat::Png),
        encoded(&DynamicImage::from(rgb(4, 4).to_luma16()), ImageFormat::Png),
        encoded(&rgb(12, 9), ImageFormat::Jpeg),
        encoded(&rgb(12, 9), ImageFormat::WebP),
        encoded(&alpha, ImageFormat::WebP),
        encoded(&rgb(12, 9), ImageFormat::Gif),
        encoded(&rgb(12, 9), ImageFormat::Bmp),
        encoded(&alpha, ImageFormat::Bmp),
        encoded(&rgb(12, 9), ImageFormat::Tiff),
        read("golden/cmyk.jpg"),
        read("cases/jpeg_scan_cut_with_eoi.jpg"),
    ];
    // A JPEG with an orientation in its EXIF segment.
    let jpeg = encoded(&rgb(12, 9), ImageFormat::Jpeg);
    let exif = b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    all.push([&jpeg[..2], exif, &jpeg[2..]].concat());
    all
}

/// Gives the chunks of a PNG the right checksums.
#[expect(clippy::ptr_arg, reason = "all repair functions have one type")]
pub fn repair_image(bytes: &mut Vec<u8>) {
    if !bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        return;
    }
    let mut at = 8;
    while let Some(length) = bytes.get(at..).and_then(<[u8]>::first_chunk) {
        let end = at + 8 + u32::from_be_bytes(*length) as usize;
        if bytes.len() < end + 4 {
            return;
        }
        let sum = crc(&bytes[at + 4..end]);
        bytes[end..end + 4].copy_from_slice(&sum.to_be_bytes());
        at = end + 4;
    }
}

/// CRC-32 of PNG.
fn crc(bytes: &[u8]) -> u32 {
    let bit = |sum: u32, _| (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg());
    !bytes.iter().fold(u32::MAX, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), bit))
}

fn append(tar: &mut Builder<Vec<u8>>, name: &str, content: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, content).unwrap();
}

/// A shard of these members.
pub fn shard(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    members.iter().for_each(|(name, content)| append(&mut tar, name, content));
    tar.into_inner().unwrap()
}

/// Codes of a grid of 2 x 3, as `data encode` writes them.
pub fn npy() -> Vec<u8> {
    vilg::data::npy([2, 3], &[0, 1, 2, 3, 4, 5])
}

/// The description beside shards of these codes.
pub const CODES_JSON: &str = r#"{"tokenizer":"0123456789abcdef","grid":[2,3],"codebook_size":6}"#;

/// Shards of pairs and of codes, with long names, folders, links and two archives behind each other.
pub fn shards() -> Vec<Vec<u8>> {
    let png = encoded(&rgb(5, 4), ImageFormat::Png);
    let json = br#"{"caption": "a moon", "captions": ["one", "two"], "width": 5}"#;
    let pairs = shard(&[("a.png", &png), ("a.txt", b"a moon\nthe moon"), ("b.json", json), ("b.png", &png)]);
    let codes = shard(&[("0.npy", &npy()), ("0.txt", b"a moon"), ("1.npy", &npy()), ("1.json", json)]);
    let mut odd = Builder::new(Vec::new());
    append(&mut odd, &format!("{}/x.png", "folder".repeat(30)), &png);
    append(&mut odd, &format!("{}/x.txt", "folder".repeat(30)), b"far below");
    odd.append_pax_extensions([("path", &b"sub/y.png"[..]), ("mtime", b"1.5")]).unwrap();
    append(&mut odd, "short.png", &png);
    append(&mut odd, "sub/y.txt", b"extended");
    for (kind, name) in [(EntryType::Directory, "sub/"), (EntryType::Symlink, "sub/z.png")] {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(0);
        odd.append_data(&mut header, name, &[][..]).unwrap();
    }
    let odd = odd.into_inner().unwrap();
    let both = [&pairs[..], &odd].concat();
    vec![pairs, codes, odd, both]
}

/// Corrects the checksums of the headers that the sizes lead to.
#[expect(clippy::ptr_arg, reason = "all repair functions have one type")]
pub fn repair_tar(bytes: &mut Vec<u8>) {
    let mut at = 0;
    while let Some(block) = bytes.get_mut(at..at + 512) {
        at += 512;
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits = block[124..135].iter().take_while(|byte| (b'0'..b'8').contains(*byte));
        let size = digits.fold(0, |size, digit| size * 8 + usize::from(digit - b'0'));
        at += size.next_multiple_of(512);
    }
}

pub fn side_files() -> Vec<Vec<u8>> {
    [
        r#"{"caption": "一轮弯月 \ud83c\udf19", "captions": ["one", "two", 3], "width": 5, "url": null}"#,
        r#"{"caption": "x", "nested": [[[{"a": [1.5e3, true, false]}]]], "caption": "twice"}"#,
        "\u{feff}{\"captions\": [\"  spaces\\tand\\u0007bells \", \"\"]}",
        "[]",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

pub fn vocabularies() -> Vec<Vec<u8>> {
    [
        "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n一\n弯\n月\n，\n3\n##d\nblue\nmoon\n##s\n,\n",
        "\u{feff}[PAD]\r\n[UNK]\r\n[CLS]\n[SEP]\n\u{2028}\n##\u{2028}\n##\n## \nA\u{301}\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

/// The configurations that we ship, and one of few lines.
pub fn configurations() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| end == "toml"));
    paths.sort();
    assert!(paths.len() > 2);
    let mut all: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    all.push(b"[model]\nlayers = 2\nhidden = 64\n[data]\nsources = [{ path = \"x\", weight = 2.0 }]\n[train]\nshard_stage = 3\n".to_vec());
    // Every key, with its default.
    all.push(vilg::config::Config::default().to_toml().unwrap().into_bytes());
    all
}

/// Arguments of `--set`, one a line.
pub fn assignments() -> Vec<Vec<u8>> {
    [
        "train.steps=100\nmodel.layers=2\nname=first try",
        "data.sources=[{path=\"x\", weight=2.0}]\nmodel.attention=\"dense\"",
        "train = { betas = [0.5, 0.6] }\ntrain.recompute=1\nname=2024",
        "image_tokenizer.channel_multipliers=[1, 2]\nimage_tokenizer.attention_sides=[16]\ntext.max_tokens=64",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

pub fn yamls() -> Vec<Vec<u8>> {
    let right = "model:\n  target: taming.models.vqgan.VQModel\n  params:\n    embed_dim: 6\n    n_embed: 64\n    ddconfig:\n      \
        double_z: false\n      ch: 32\n      ch_mult: [2, 1]\n      num_res_blocks: 1\n      attn_resolutions: [8]\n      \
        z_channels: 16\n      resolution: 16\n";
    let anchors = right.replace("params:\n", "params: &p\n").replace("ch: 32", "ch: !!int \"32\"");
    let anchors = format!("{anchors}other: *p\n? complex\n: {{a: [b, c]}}\nfolded: >\n  x\n  y\n");
    vec![right.into(), anchors.into_bytes()]
}

/// Tables of each format.
pub fn tables() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> =
        ["pairs.csv", "pairs.parquet", "train_imgs.tsv", "train_texts.jsonl", "img2dataset/00000.parquet"]
            .map(|name| read(&format!("golden/build/{name}")))
            .into();
    all.push("key,caption\r\n1,\"两行\n一格\"\r\n2,\"引号\"\"\"\r\n".into());
    all.push("\u{feff}{\"caption\": [\"甲\", null, 3]}\n{\"caption\": {\"a\": 1}}\n".into());
    all
}

/// Annotations of each format of `data build`.
pub fn annotations() -> Vec<Vec<u8>> {
    [
        "captions_val2014.json",
        "caption_train_annotations_20170902.json",
        "FM-CH-QA.json",
        "imageid.human-written-caption.txt",
        "flickr-form.txt",
        "train_imgs.tsv",
        "pairs.csv",
    ]
    .map(|name| read(&format!("golden/build/{name}")))
    .into()
}

pub fn no_repair(_: &mut Vec<u8>) {}
