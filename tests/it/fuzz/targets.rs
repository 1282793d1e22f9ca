//! The targets: what is parsed, and what must be true of it.

use super::{Bounds, Target, seeds, write};
use std::{collections::HashSet, fs, path::Path};
use vilg::{
    bundle::{Bundle, import},
    config::{self, Config, Loaded},
    data::{
        self, CodesInfo, Dataset, IMAGE_EXTENSIONS, Kind, Record, Source,
        build::{self, Builder, Format, Keys, Request, Settings},
        image, inspect,
        table::{self, Table},
    },
    error::{Error, Result, hint_of},
    nn::{checkpoint_file::CheckpointFile, weights},
    report,
    text::WordPiece,
    train::{fit::Fit, memory::Cluster, sizes::Sizes},
};

const MB: usize = 1 << 20;
const SMALL: Bounds = Bounds { bytes: 4 * MB, per_byte: 200 };
/// The bound for what a pickle builds is 90 MB.
const PICKLE: Bounds = Bounds { bytes: 100 * MB, per_byte: 200 };

/// What is printed of an error has no control characters, and is no book.
fn check_text(text: &str) {
    let printed = report::escape_controls(text);
    let control = printed.chars().find(|c| c.is_control() && !['\n', '\t'].contains(c));
    assert!(control.is_none(), "{control:?} in {printed}");
}

fn check_error(error: &Error) {
    check_text(&format!("{error:#}"));
    hint_of(error).into_iter().for_each(check_text);
}

/// What a parser gave, if it gave anything.
fn parsed<T>(result: Result<T>) -> Option<T> {
    result.inspect_err(check_error).ok()
}

/// Opens a checkpoint and converts all of its tensors.
fn open_checkpoint(path: &Path) {
    let Some(file) = parsed(CheckpointFile::open(path)) else { return };
    for name in file.names() {
        let shape = file.shape(name).unwrap();
        let Some(tensor) = parsed(file.tensor(name)) else { continue };
        assert_eq!(tensor.dims(), shape);
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(values.len(), shape.iter().product::<usize>());
        assert!(values.iter().all(|value| value.is_finite()));
    }
}

#[test]
fn safetensors_header() {
    let check = |header: &[u8], folder: &Path| {
        let (bytes, path) = (seeds::safetensors(header), folder.join("a.safetensors"));
        write(&path, &bytes);
        open_checkpoint(&path);
        let Some(tensors) = parsed(weights::parse(&bytes, "a")) else { return };
        let file = CheckpointFile::open(&path).unwrap();
        for (name, tensor) in &tensors {
            assert_eq!(file.shape(name), Some(tensor.dims()), "{name}");
        }
    };
    let words: &[&[u8]] = &[
        b"\"dtype\":",
        b"\"shape\":",
        b"\"data_offsets\":",
        b"\"__metadata__\":",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"\\u0000",
        b"\\ud800",
        b"\"F8_E4M3\"",
        b"\"F4\"",
        b"\"BOOL\"",
        b"null",
        b"\"a\":",
        b"\xff",
        b"\x1b[2J",
    ];
    let (cases, seeds, repair) = (1500, seeds::safetensors_headers as _, seeds::no_repair as _);
    Target { name: "safetensors_header", cases, seeds, words, repair, bounds: SMALL, check }.run();
}

#[test]
fn checkpoint_file() {
    let check = |bytes: &[u8], folder: &Path| {
        let path = folder.join("a.pt");
        write(&path, bytes);
        open_checkpoint(&path);
    };
    let words: &[&[u8]] = &[
        b"PK\x01\x02",
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"PK\x06\x07",
        b"archive/data.pkl",
        b"/data/0",
        b"\x80\x02",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        b"../",
        b"/",
        b"\0\0\0\0\0\0\0\0",
        b"\xff\xff\xff\xff",
    ];
    let (cases, seeds, repair) = (1500, seeds::checkpoints as _, seeds::no_repair as _);
    Target { name: "checkpoint_file", cases, seeds, words, repair, bounds: PICKLE, check }.run();
}

#[test]
fn pickle_in_archive() {
    let check = |pickle: &[u8], folder: &Path| {
        let (path, alone) = (folder.join("a.pt"), folder.join("a.pkl"));
        write(&path, seeds::torch_file(pickle));
        open_checkpoint(&path);
        write(&alone, pickle);
        open_checkpoint(&alone);
    };
    let words: &[&[u8]] = &[
        b"(",
        b")",
        b"]",
        b"}",
        b"0",
        b"1",
        b"2",
        b"N",
        b"t",
        b"l",
        b"d",
        b"R",
        b"b",
        b"Q",
        b"u",
        b"e",
        b"a",
        b"s",
        b".",
        b"\x81",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"\x93",
        b"\x94",
        b"h\0",
        b"h\x01",
        b"q\0",
        b"q\x01",
        b"K\xff",
        b"J\xff\xff\xff\xff",
        b"J\0\0\0\x80",
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x8a\x01\x80",
        b"\x8c\x05model",
        b"X\x03\0\0\0ema",
        b"\x8c\x0astate_dict",
        b"\x8c\x07storage",
        b"cbuiltins\nset\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch\nFloatStorage\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy\ndtype\n",
        b"cargparse\nNamespace\n",
        b"cos\nsystem\n",
        b"C\x04\0\0\0\0",
    ];
    let (cases, seeds, repair) = (2000, seeds::pickles as _, seeds::no_repair as _);
    Target { name: "pickle_in_archive", cases, seeds, words, repair, bounds: PICKLE, check }.run();
}

/// The properties of every record.
fn check_record(record: &Record, kind: Kind, info: &CodesInfo) {
    for caption in &record.captions {
        let long = caption.chars().count() > 4096;
        assert!(!caption.is_empty() && !long && !caption.contains(char::is_control), "{caption:?}");
    }
    let without = matches!(kind, Kind::Images(_) | Kind::ResizedImages(_) | Kind::WholeImages);
    assert!(without || record.captions.contains(&record.caption));
    match kind {
        Kind::Images(size) | Kind::Pairs(size) | Kind::Resized(size) | Kind::ResizedImages(size) => {
            assert_eq!(record.image.as_ref().unwrap().dimensions(), (size, size));
        }
        Kind::Codes => check_codes(record, info),
        Kind::CodesAndImages(size) => {
            assert_eq!(record.image.as_ref().unwrap().dimensions(), (size, size));
            check_codes(record, info);
        }
        Kind::WholeImages => assert!(!record.image.as_ref().unwrap().is_empty()),
        Kind::Captions => {}
    }
}

fn check_codes(record: &Record, info: &CodesInfo) {
    let codes = record.codes.as_ref().unwrap();
    assert_eq!(codes.len(), info.grid.iter().product::<usize>());
    assert!(codes.iter().all(|code| usize::from(*code) < info.codebook_size));
}

#[test]
fn tar_shards() {
    let check = |tar: &[u8], folder: &Path| {
        let path = folder.join("a.tar");
        write(&path, tar);
        let info: CodesInfo = serde_json::from_str(seeds::CODES_JSON).unwrap();
        let source = Source::open(path.to_str().unwrap(), 1.0).unwrap();
        let damage = source.damage();
        check_text(&damage.to_string());
        // A sample, a member or a gap has a header at least.
        assert!(source.len() + damage.total() <= tar.len() as u64 / 512 + 2);
        let mut keys = HashSet::new();
        let mut bytes = 0;
        for shard in &source.shards {
            for i in 0..shard.len() as usize {
                let Ok((key, members)) = shard.members(i, None) else { continue };
                let outside = key.starts_with('/') || key.split('/').any(|part| ["..", ".", ""].contains(&part));
                assert!(!outside && !key.contains(char::is_control), "{key:?}");
                let extensions = IMAGE_EXTENSIONS.iter().chain(&["txt", "json", "npy"]);
                bytes += extensions.filter_map(|extension| members.get(extension)).map(<[u8]>::len).sum::<usize>();
                assert!(keys.insert(key));
                for kind in [Kind::Images(8), Kind::Pairs(8), Kind::Captions, Kind::Codes] {
                    match shard.read(i, kind, Some(&info)) {
                        Ok(record) => check_record(&record, kind, &info),
                        Err(bad) => assert!(!bad.place.contains(char::is_control), "{bad:?}"),
                    }
                }
            }
        }
        assert!(bytes <= tar.len(), "members of {bytes} bytes");
        let inspection = inspect::inspect(&source, |_| {}).unwrap();
        check_text(&serde_json::to_string(&inspection).unwrap());
    };
    let words: &[&[u8]] = &[
        b"ustar\0",
        b"ustar  \0",
        b"././@LongLink",
        b"77777777777",
        b"00000000000",
        b"\x80\0\0\0\0\0\0\0\0\0\0",
        b"\xff\xff\xff\xff",
        b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"L",
        b"K",
        b"x",
        b"g",
        b"S",
        b"5",
        b"2",
        b"../",
        b"./",
        b"/",
        b".tar.png",
        b"\0",
        b"30 path=../../etc/passwd.png\n",
        b"9 size=0\n",
        b"99999999999999999999 path=a\n",
        &[0; 512],
        &[0; 1024],
    ];
    let (cases, seeds, repair) = (700, seeds::shards as _, seeds::repair_tar as _);
    // Images are decoded as well, but only those of a few bytes.
    let bounds = Bounds { bytes: 300 * MB, per_byte: 200 };
    Target { name: "tar_shards", cases, seeds, words, repair, bounds, check }.run();
}

#[test]
fn images() {
    let check = |bytes: &[u8], _: &Path| match image::decode(bytes) {
        Ok(decoded) => {
            let pixels = u64::from(decoded.width()) * u64::from(decoded.height());
            assert!((1..=1 << 26).contains(&pixels));
            assert_eq!(image::square(decoded, 8).dimensions(), (8, 8));
        }
        Err(bad) => {
            // It is caught, but printed: the decoder is to be told of it.
            assert!(!bad.place.contains("panicked"), "{bad:?}");
            assert!(!bad.place.contains(char::is_control), "{bad:?}");
        }
    };
    let words: &[&[u8]] = &[
        b"IHDR",
        b"IDAT",
        b"PLTE",
        b"tRNS",
        b"acTL",
        b"fcTL",
        b"eXIf",
        b"iCCP",
        b"IEND",
        b"\xff\xd8",
        b"\xff\xc0",
        b"\xff\xc2",
        b"\xff\xc4",
        b"\xff\xda",
        b"\xff\xd9",
        b"\xff\xdd\0\x04\0\x01",
        b"\xff\xe1",
        b"Exif\0\0",
        b"VP8 ",
        b"VP8L",
        b"VP8X",
        b"ANIM",
        b"ANMF",
        b"ALPH",
        b"ICCP",
        b"RIFF",
        b"GIF89a",
        b",\0\0\0\0",
        b"!\xf9\x04",
        b"!\xff\x0b",
        b";",
        b"II*\0",
        b"MM\0*",
        b"BM",
        b"\x00\x01\x03\x00",
        b"\x11\x01",
        b"\x17\x01",
    ];
    let (cases, seeds, repair) = (1500, seeds::images as _, seeds::repair_image as _);
    // Decoders may take 256 MB, and so may what they give; then come alpha, turning and 8 bits.
    let bounds = Bounds { bytes: 900 * MB, per_byte: 200 };
    Target { name: "images", cases, seeds, words, repair, bounds, check }.run();
}

#[test]
fn side_json() {
    let check = |json: &[u8], folder: &Path| {
        let folder = folder.join("pairs");
        if !folder.exists() {
            fs::create_dir(&folder).unwrap();
            write(folder.join("a.png"), &seeds::images()[0]);
            write(folder.join("a.txt"), "a moon\n");
        }
        write(folder.join("a.json"), json);
        let source = Source::open(folder.to_str().unwrap(), 1.0).unwrap();
        // Image and text are good, so any JSON beside them is accepted.
        let record = source.shards[0].read(0, Kind::Pairs(8), None).unwrap();
        let info: CodesInfo = serde_json::from_str(seeds::CODES_JSON).unwrap();
        check_record(&record, Kind::Pairs(8), &info);
        assert!(record.ignored.is_none_or(|bad| !bad.place.contains(char::is_control)));
    };
    let words: &[&[u8]] = &[
        b"\"caption\":",
        b"\"captions\":",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"\\u0000",
        b"\\ud800",
        b"\\u001b",
        b"\\",
        b"NaN",
        b"-Infinity",
        b"null",
        b"true",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xff",
        b"\n",
        b"\xe2\x80\xae",
    ];
    let (cases, seeds, repair) = (1000, seeds::side_files as _, seeds::no_repair as _);
    Target { name: "side_json", cases, seeds, words, repair, bounds: SMALL, check }.run();
}

#[test]
fn codes_of_a_shard() {
    let check = |npy: &[u8], folder: &Path| {
        let folder = folder.join("codes");
        fs::create_dir_all(&folder).unwrap();
        write(folder.join("codes.json"), seeds::CODES_JSON);
        write(folder.join("a.tar"), seeds::shard(&[("a.npy", npy), ("a.txt", b"a moon")]));
        let path = folder.to_str().unwrap().to_owned();
        let config = config::Data { sources: vec![config::Source { path, weight: 1.0 }], ..config::Data::default() };
        let dataset = Dataset::open(&config, Kind::Codes).unwrap();
        match dataset.read(0, 0) {
            Ok(record) => check_record(&record, Kind::Codes, dataset.codes().unwrap()),
            Err(bad) => assert!(!bad.place.contains(char::is_control), "{bad:?}"),
        }
    };
    let words: &[&[u8]] =
        &[b"'shape':(", b")", b",", b"'descr':'<u2'", b"'>u2'", b"True", b"\x93NUMPY\x01\0", b"\x02\0", b"-1", b"\xff"];
    let (cases, seeds, repair) = (1000, (|| vec![seeds::npy()]) as _, seeds::no_repair as _);
    Target { name: "codes_of_a_shard", cases, seeds, words, repair, bounds: SMALL, check }.run();
}

#[test]
fn codes_json() {
    let check = |json: &[u8], folder: &Path| {
        write(folder.join(data::CODES_FILE), json);
        let Some(info) = parsed(CodesInfo::read(folder)) else { return };
        assert!(info.grid.iter().all(|side| (1..=4096).contains(side)));
    };
    let words: &[&[u8]] = &[
        b"\"grid\":",
        b"\"codebook_size\":",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"\"",
        b"\\ud800",
        b"\x1b",
        b"\xff",
        b"null",
    ];
    let (cases, seeds, repair) = (1000, (|| vec![seeds::CODES_JSON.into()]) as _, seeds::no_repair as _);
    Target { name: "codes_json", cases, seeds, words, repair, bounds: SMALL, check }.run();
}

#[test]
fn vocabulary() {
    let check = |bytes: &[u8], folder: &Path| {
        let path = folder.join("vocab.txt");
        write(&path, bytes);
        let text = String::from_utf8_lossy(bytes);
        let wordpiece = match WordPiece::load(&path) {
            Ok(wordpiece) => wordpiece,
            Err(error) => return check_error(&error),
        };
        let again = WordPiece::parse(&wordpiece.vocab_text()).unwrap();
        assert_eq!(again.vocab_text(), wordpiece.vocab_text());
        for ids in [wordpiece.encode(&text, 64).unwrap(), wordpiece.encode_target(&text, 64).unwrap()] {
            assert!(ids.len() <= 64 && ids.iter().all(|id| (*id as usize) < wordpiece.vocab_size()));
            wordpiece.decode(&ids);
        }
        let all: Vec<u32> = (0..wordpiece.vocab_size() as u32).collect();
        wordpiece.decode(&all);
    };
    let words: &[&[u8]] = &[
        b"[PAD]\n",
        b"[UNK]\n",
        b"[CLS]\n",
        b"[SEP]\n",
        b"##",
        b"\n",
        b"\r\n",
        b"\r",
        b" ",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"\xcc\x81",
        b"\xf0\x9f\x8c\x99",
        b"\xc2\x85",
        b"\xe1\x9a\x80",
        b"\xff",
        b"\0",
        b"\x1b[2J",
    ];
    let (cases, seeds, repair) = (1000, seeds::vocabularies as _, seeds::no_repair as _);
    // A normaliser keeps several numbers for each byte.
    let bounds = Bounds { bytes: 4 * MB, per_byte: 2000 };
    Target { name: "vocabulary", cases, seeds, words, repair, bounds, check }.run();
}

/// What a configuration that was read must stand: every check, and the plan of a run where nothing is wrong with it.
fn check_config(loaded: &Loaded) {
    let Some(problems) = parsed(loaded.problems()) else { return };
    problems.iter().for_each(|problem| check_text(&format!("{} {}", problem.message, problem.hint)));
    let config = &loaded.config;
    let text = config.to_toml().unwrap();
    let again = Config::parse(&text, "again").unwrap();
    // NaN does not equal itself.
    assert_eq!(again.to_toml().unwrap(), text);
    if !problems.is_empty() {
        return;
    }
    let Some(sizes) = parsed(Sizes::of(config)) else { return };
    for gpus in [1, 64] {
        let fit = Fit::of(config, &sizes, Cluster { gpus, memory_bytes: 80_000_000_000, tflops: 312.0, mfu: 0.4 });
        assert!(fit.flops.is_finite() && fit.seconds >= 0.0);
    }
}

/// Those of reading and planning a configuration.
const CONFIG: Bounds = Bounds { bytes: 64 * MB, per_byte: 2000 };

const TOML_WORDS: &[&[u8]] = &[
    b"[model]\n",
    b"[train]\n",
    b"[[data.sources]]\n",
    b"layers = ",
    b"train.steps = ",
    b"{",
    b"}",
    b"[",
    b"]",
    b"=",
    b",",
    b"\"",
    b"'''",
    b"\"\"\"",
    b"\n",
    b"#",
    b".",
    b"nan",
    b"-inf",
    b"0x7fffffffffffffff",
    b"1979-05-27T07:32:00Z",
    b"true",
    b"\\u0000",
    b"\\U0010ffff",
    b"\xff",
    b"\x1b[2J",
    b"_",
    b"inf",
    b"\"demo\"",
    b"recompute = 1\n",
    b"path = \"/\"",
];

#[test]
fn config_file() {
    let check = |bytes: &[u8], folder: &Path| {
        let path = folder.join("a.toml");
        write(&path, bytes);
        match Loaded::read(Some(&path), &[]) {
            Ok(loaded) => check_config(&loaded),
            Err(error) => {
                check_error(&error);
                assert!(error.to_string().contains("a.toml") && hint_of(&error).is_some(), "{error:#}");
            }
        }
    };
    let (cases, seeds, repair) = (300, seeds::configurations as _, seeds::no_repair as _);
    Target { name: "config_file", cases, seeds, words: TOML_WORDS, repair, bounds: CONFIG, check }.run();
}

#[test]
fn config_set() {
    let check = |bytes: &[u8], _: &Path| {
        let text = String::from_utf8_lossy(bytes);
        let sets: Vec<String> = text.split('\n').map(str::to_owned).collect();
        match Loaded::read(None, &sets) {
            Ok(loaded) => check_config(&loaded),
            Err(error) => {
                check_error(&error);
                assert!(error.to_string().contains("--set ") && hint_of(&error).is_some(), "{error:#}");
            }
        }
    };
    let (cases, seeds, repair) = (300, seeds::assignments as _, seeds::no_repair as _);
    Target { name: "config_set", cases, seeds, words: TOML_WORDS, repair, bounds: CONFIG, check }.run();
}

#[test]
fn taming_yaml() {
    let check = |bytes: &[u8], folder: &Path| {
        let (yaml, model) = (folder.join("model.yaml"), folder.join("model"));
        write(&yaml, bytes);
        let golden = seeds::file("golden/taming_vqgan.safetensors");
        match import::vqgan(&golden, import::Family::TamingVq, Some(&yaml), &model, true) {
            Ok(()) => assert!(model.join("config.toml").exists()),
            Err(error) => {
                check_error(&error);
                assert!(error.to_string().contains("model.yaml"), "{error:#}");
            }
        }
    };
    let words: &[&[u8]] = &[
        b"model:",
        b"  params:\n",
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"!!int ",
        b"!!binary ",
        b"!x ",
        b"- ",
        b"? ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"|\n",
        b">\n",
        b"---\n",
        b"...\n",
        b"\"",
        b"'",
        b"#",
        b"\t",
        b"\n",
        b"  ",
        b"~",
        b".inf",
        b".nan",
        b"0x10",
        b"%YAML 1.2\n",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\x1b",
        b"*p",
    ];
    let (cases, seeds, repair) = (400, seeds::yamls as _, seeds::no_repair as _);
    let bounds = Bounds { bytes: 32 * MB, per_byte: 4000 };
    Target { name: "taming_yaml", cases, seeds, words, repair, bounds, check }.run();
}

/// A model folder, made once.
fn model_folder(folder: &Path) -> std::path::PathBuf {
    let model = folder.join("model");
    if !model.exists() {
        let golden = seeds::file("golden/taming_vqgan.safetensors");
        import::vqgan(&golden, import::Family::TamingVq, None, &model, false).unwrap();
    }
    model
}

/// A file of the model folder that [`model_folder`] makes.
fn model_file(name: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    fs::read(model_folder(folder.path()).join(name)).unwrap()
}

#[test]
fn model_manifest() {
    let check = |bytes: &[u8], folder: &Path| {
        let model = model_folder(folder);
        write(model.join("manifest.json"), bytes);
        parsed(Bundle::open(model.to_str().unwrap()));
    };
    let words: &[&[u8]] = &[
        b"\"files\":",
        b"\"format\":",
        b"\"bytes\":",
        b"\"blake3\":",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"\\u001b",
        b"\\ud800",
        b"\"../x\":",
        b"\"/dev/zero\":",
        b"null",
        b"\xff",
        b"\"vocab.txt\":",
    ];
    let (cases, seeds, repair) = (600, (|| vec![model_file("manifest.json")]) as _, seeds::no_repair as _);
    Target { name: "model_manifest", cases, seeds, words, repair, bounds: SMALL, check }.run();
}

/// Sizes of the configuration that the weights do not have must be refused before anything of that size is allocated.
#[test]
fn model_config() {
    let check = |bytes: &[u8], folder: &Path| {
        let model = model_folder(folder);
        drop(fs::remove_file(model.join("manifest.json")));
        write(model.join("config.toml"), bytes);
        if let Some(bundle) = parsed(Bundle::open(model.to_str().unwrap())) {
            parsed(bundle.image_tokenizer());
        }
    };
    let (cases, seeds, repair) = (300, (|| vec![model_file("config.toml")]) as _, seeds::no_repair as _);
    let bounds = Bounds { bytes: 32 * MB, per_byte: 2000 };
    Target { name: "model_config", cases, seeds, words: TOML_WORDS, repair, bounds, check }.run();
}

/// Words of CSV, TSV and JSON lines, and of parquet's metadata.
const TABLE_WORDS: &[&[u8]] = &[
    b"\"caption\":",
    b"\"",
    b"\"\"",
    b",",
    b"\t",
    b"\r\n",
    b"\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"1e999",
    b"NaN",
    b"\\u0000",
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xc4\xe3",
    b"\x1b[2J",
    b"PAR1",
    b"\x15\x00",
    b"\x15\xff\xff\xff\xff\x0f",
    b"\x19\xfc\xff\xff\xff\x0f",
    b"\x18\x07caption",
    b"\0\0\0\0",
];

/// The same bytes as a table of each format.
#[test]
fn tables() {
    let check = |bytes: &[u8], folder: &Path| {
        for extension in table::EXTENSIONS {
            let path = folder.join(format!("a.{extension}"));
            write(&path, bytes);
            let Some(mut table) = parsed(Table::open(&path)) else { continue };
            let columns = table.columns().unwrap_or_else(|| vec!["caption".to_owned(), "key".to_owned()]);
            let mut seen = 0;
            while let Some(Some(rows)) = parsed(table.next_batch()) {
                assert!(!rows.is_empty() && rows.first_row == seen, "{extension}");
                seen += rows.len() as u64;
                for index in 0..rows.len().min(100) {
                    let row = match rows.get(index) {
                        Ok(row) => row,
                        Err(bad) => {
                            assert!(!bad.place.contains(char::is_control), "{bad:?}");
                            continue;
                        }
                    };
                    for column in &columns {
                        if let Err(bad) = row.texts(column) {
                            assert!(!bad.place.contains(char::is_control), "{bad:?}");
                        }
                    }
                }
            }
            // A row of text takes a byte at least. Those of parquet may be run-length encoded.
            assert!(extension == "parquet" || seen <= bytes.len() as u64, "{seen} rows of {extension}");
        }
    };
    let (cases, seeds, repair) = (600, seeds::tables as _, seeds::no_repair as _);
    let bounds = Bounds { bytes: 300 * MB, per_byte: 2000 };
    Target { name: "tables", cases, seeds, words: TABLE_WORDS, repair, bounds, check }.run();
}

/// The same bytes as the annotations of each data set that `data build` reads.
#[test]
fn annotations() {
    let check = |bytes: &[u8], folder: &Path| {
        let output = folder.join("shards");
        let formats = [Format::Coco, Format::AicIcc, Format::Fmiqa, Format::CocoCn, Format::ChineseClip, Format::Table];
        for (format, name) in formats.into_iter().zip(["a.json", "a.json", "a.json", "a.txt", "a_imgs.tsv", "a.csv"]) {
            let path = folder.join(name);
            write(&path, bytes);
            write(folder.join("a_texts.jsonl"), "{\"text_id\": 1, \"text\": \"一只小猫\", \"image_ids\": [7]}\n");
            let source = path.to_str().unwrap().to_owned();
            let images = Some(seeds::file("golden/build/images"));
            let request = Request { source: source.clone(), images, ..Request::default() };
            let Some(reader) = parsed(build::open(&request, format)) else { continue };
            let (split, columns) = (None, request.columns.clone());
            let keys = Keys::Id;
            let settings = Settings { format, samples: 1000, keys, split, columns, images: String::new() };
            drop(fs::remove_dir_all(&output));
            let builder = Builder { reader, source: path, output: output.clone(), settings };
            let Some(report) = parsed(builder.run(|_| {})) else { continue };
            check_text(&report.bad.to_string());
            check_text(&report.ignored.to_string());
            assert!(report.samples <= report.rows && report.rows <= bytes.len() as u64, "{format}: {report:?}");
            if report.samples > 0 {
                let source = Source::open(output.to_str().unwrap(), 1.0).unwrap();
                assert_eq!((source.len(), source.damage().total()), (report.samples, 0), "{format}");
            }
        }
    };
    let words: &[&[u8]] = &[
        b"\"images\":",
        b"\"annotations\":",
        b"\"image_id\":",
        b"\"file_name\":",
        b"\"caption\":",
        b"\"Question\":",
        b"\"Answer\":",
        b"\"id\":",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"\"",
        b"#0\t",
        b"\t",
        b"\r\n",
        b"\n",
        b"../../etc/passwd",
        b"/dev/zero",
        b"COCO_val2014_000000000042.jpg",
        b"1e999",
        b"-1",
        b"null",
        b"\\u0000",
        b"\\ud800",
        b"\xef\xbb\xbf",
        b"\xff",
        b"\xc4\xe3",
        b"\x1b[2J",
        b"====",
    ];
    let (cases, seeds, repair) = (150, seeds::annotations as _, seeds::no_repair as _);
    let bounds = Bounds { bytes: 300 * MB, per_byte: 2000 };
    Target { name: "annotations", cases, seeds, words, repair, bounds, check }.run();
}
