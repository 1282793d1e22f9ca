//! Encodes shards of images with a tiny random tokenizer, inspects them, and encodes them again.

use super::{inspect::inspect, *};
use crate::{config, nn::params::Scope, tokenizer::ImageTokenizer};
use candle_core::{DType, Device};
use std::{collections::BTreeMap, fs, path::Path};

pub(super) fn tokenizer() -> ImageTokenizer {
    let config = config::ImageTokenizer {
        image_size: 8,
        channels: 32,
        channel_multipliers: vec![1, 1],
        residual_blocks: 1,
        attention_sides: vec![],
        latent_channels: 4,
        codebook_size: 16,
        code_dim: 4,
        ..Default::default()
    };
    ImageTokenizer::new(&Scope::from_seed(1, DType::F32, &Device::Cpu), &config).unwrap()
}

/// Two shards of 7 samples, one of them bad, in a subfolder.
fn images(folder: &Path) {
    fs::create_dir_all(folder.join("deep")).unwrap();
    for name in ["0.tar", "deep/0.tar"] {
        let mut tar = ::tar::Builder::new(fs::File::create(folder.join(name)).unwrap());
        for i in 0..7u8 {
            let image = ::image::RgbImage::from_fn(9, 8, |x, y| ::image::Rgb([x as u8 * 20, y as u8 * 20, i * 30]));
            let png = if i == 3 { b"bad".to_vec() } else { image_file::png(&image).unwrap() };
            let json = format!(r#"{{"captions":["第{i}张"]}}"#);
            for (extension, content) in [("png", png), ("txt", b"x".to_vec()), ("json", json.into_bytes())] {
                let mut header = ::tar::Header::new_gnu();
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, format!("{i}.{extension}"), content.as_slice()).unwrap();
            }
        }
        tar.finish().unwrap();
    }
}

pub(super) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else if path.file_name().unwrap() != index::INDEX_FILE {
            files.insert(path.display().to_string(), fs::read(&path).unwrap());
        }
    }
    files
}

#[test]
fn encoding_keeps_order_and_text_and_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    images(&input);
    let tokenizer = tokenizer();
    let info = CodesInfo { tokenizer: "x".into(), grid: [4, 4], codebook_size: 16 };
    let encoder = |info: &CodesInfo| Encoder {
        tokenizer: &tokenizer,
        info: info.clone(),
        output: output.clone(),
        keep_images: false,
        batch_size: 4,
        max_bad_ratio: 0.5,
        rank: 0,
        world_size: 1,
    };
    let sources = [Source::open(input.to_str().unwrap(), 1.0).unwrap()];
    let report = encoder(&info).run(&sources, |_| ()).unwrap();
    assert_eq!((report.shards, report.samples, report.bad.total()), (2, 12, 2));

    // The stored codes are those that the tokenizer gives for each image.
    let open = |path: &Path, kind| {
        let source = config::Source { path: path.display().to_string(), weight: 1.0 };
        Dataset::open(&config::Data { sources: vec![source], ..Default::default() }, kind).unwrap()
    };
    let codes: Vec<Record> = open(&output, Kind::Codes).records(1).collect::<Result<_, _>>().unwrap();
    let pairs: Vec<Record> = open(&input, Kind::Pairs(8)).records(1).flatten().collect();
    assert_eq!(codes.len(), 12);
    for (codes, pair) in codes.iter().zip(&pairs) {
        assert_eq!((&codes.key, &codes.captions), (&pair.key, &pair.captions));
        let expected = tokenizer.encode(&image::to_pixels(&pair.image).unwrap()).unwrap();
        let expected: Vec<u16> =
            expected.flatten_all().unwrap().to_vec1::<u32>().unwrap().iter().map(|c| *c as u16).collect();
        assert_eq!(codes.codes.as_ref(), Some(&expected));
    }

    // Images beside the codes want all shards again.
    let with_images = Encoder { keep_images: true, ..encoder(&info) };
    assert_eq!(with_images.run(&sources, |_| ()).unwrap().shards, 2);
    let both: Vec<Record> = open(&output, Kind::CodesAndImages(8)).records(1).collect::<Result<_, _>>().unwrap();
    assert_eq!(both.len(), 12);
    for ((both, codes), pair) in both.iter().zip(&codes).zip(&pairs) {
        assert_eq!((&both.codes, &both.image), (&codes.codes, &pair.image));
    }
    assert_eq!(encoder(&info).run(&sources, |_| ()).unwrap().shards, 2);

    // A missing shard and a truncated shard are encoded again; the other shard is kept.
    let before = files(&output);
    fs::rename(output.join("deep/0.tar"), output.join("deep/0.tar.tmp")).unwrap();
    let report = encoder(&info).run(&sources, |_| ()).unwrap();
    assert_eq!((report.shards, report.skipped_shards), (1, 1));
    assert_eq!(files(&output), before);

    // Codes of different tokenizers are not mixed.
    let other = CodesInfo { tokenizer: "y".into(), ..info.clone() };
    assert!(encoder(&other).run(&sources, |_| ()).unwrap_err().to_string().contains("another tokenizer"));

    let found = inspect(&Source::open(output.to_str().unwrap(), 1.0).unwrap(), |_| ()).unwrap().found;
    assert_eq!((found.samples, found.codes, found.images, found.bad.total()), (12, 12, 0, 0));
}

#[test]
fn too_many_bad_images_stop_encoding_and_leave_no_shard() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    fs::create_dir(&input).unwrap();
    (0..150).for_each(|i| fs::write(input.join(format!("{i}.png")), "bad").unwrap());
    let info = CodesInfo { tokenizer: "x".into(), grid: [4, 4], codebook_size: 16 };
    let tokenizer = tokenizer();
    let encoder = Encoder {
        tokenizer: &tokenizer,
        info,
        output: output.clone(),
        keep_images: false,
        batch_size: 4,
        max_bad_ratio: 0.05,
        rank: 0,
        world_size: 1,
    };
    let sources = [Source::open(input.to_str().unwrap(), 1.0).unwrap()];
    let error = format!("{:#}", encoder.run(&sources, |_| ()).unwrap_err());
    assert!(error.contains("bad-image"), "{error}");
    assert_eq!(files(&output).len(), 1, "codes.json only");
}

#[test]
fn inspection_counts_and_measures() {
    let dir = tempfile::tempdir().unwrap();
    images(dir.path());
    let found = inspect(&Source::open(dir.path().to_str().unwrap(), 1.0).unwrap(), |_| ()).unwrap();
    assert_eq!(found.shards.iter().map(|s| (s.samples, s.bad)).collect::<Vec<_>>(), [(7, 1), (7, 1)]);
    let value = serde_json::to_value(&found).unwrap();
    assert_eq!(value["widths"], serde_json::json!({"min": 9, "median": 9, "mean": 9.0, "max": 9}));
    assert_eq!(value["caption_lengths"]["max"], 3);
    assert_eq!(value["bad"]["bad-image"]["count"], 2);
    assert_eq!(value["example"], serde_json::json!(["0", "第0张"]));
}

#[test]
fn ranks_encode_what_one_process_encodes() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in");
    images(&input);
    let tokenizer = tokenizer();
    let sources = [Source::open(input.to_str().unwrap(), 1.0).unwrap()];
    let encode = |name: &str, rank, world_size| {
        let info = CodesInfo { tokenizer: "x".into(), grid: [4, 4], codebook_size: 16 };
        let output = dir.path().join(name);
        let encoder = Encoder {
            tokenizer: &tokenizer,
            info,
            output,
            keep_images: false,
            batch_size: 4,
            max_bad_ratio: 0.5,
            rank,
            world_size,
        };
        encoder.run(&sources, |_| ()).unwrap().samples
    };
    assert_eq!(encode("one", 0, 1), 12);
    // Rank 1 is the first to finish, and rank 2 has no shard.
    assert_eq!([1, 0, 2].map(|rank| encode("three", rank, 3)), [6, 6, 0]);
    let shards = |name: &str| {
        let folder = dir.path().join(name);
        let found = crate::data::paths::files(&folder).unwrap().into_iter();
        found
            .map(|path| (path.strip_prefix(&folder).unwrap().to_owned(), fs::read(&path).unwrap()))
            .collect::<BTreeMap<_, _>>()
    };
    assert_eq!(shards("one"), shards("three"));
    let indexed = |name: &str| index::Index::open(&dir.path().join("three").join(name)).is_some();
    assert!(indexed("") && indexed("deep"));
}
