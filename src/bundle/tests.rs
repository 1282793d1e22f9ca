//! Model folders: written, exported, opened, damaged and put together from different models.

use super::*;
use crate::train::task_tests::generator_config;
use safetensors::Dtype;
use std::fs;

fn message(error: &crate::error::Error) -> String {
    format!("{error:#}")
}

/// A generator's model folder with fresh weights.
fn model(folder: &Path) -> PathBuf {
    let config = generator_config(folder);
    let tokenizer = Bundle::open(&config.image_tokenizer.path).unwrap();
    let text = WordPiece::load(&config.text.vocab).unwrap();
    let scope = Scope::from_seed(1, DType::F32, &runtime::device().unwrap());
    let settings = &config.image_tokenizer;
    Generator::new(&scope, &config, text.vocab_size(), settings.codebook_size, settings.grid()).unwrap();
    let weights = weights::of_params(&scope.params()).unwrap();
    let parts = Parts {
        config: &config,
        weights,
        vocab: Some(text.vocab_text()),
        attribution: "Ours.".into(),
        image_tokenizer: Some(tokenizer),
    };
    let path = folder.join("model");
    write(&path, &parts, Dtype::F32).unwrap();
    // A second one replaces the first.
    write(&path, &parts, Dtype::F32).unwrap();
    path
}

fn open(path: &Path) -> Result<Bundle> {
    Bundle::open(path.to_str().unwrap())
}

/// Opens everything that a model folder holds.
fn open_all(path: &Path) -> Result<()> {
    let bundle = open(path)?;
    bundle.generator()?;
    bundle.image_tokenizer()?;
    Ok(())
}

#[test]
fn written_exported_and_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let text = fs::read_to_string(path.join(CONFIG)).unwrap();
    assert!(!text.contains(folder.path().to_str().unwrap()), "a path of this machine");
    open_all(&path).unwrap();
    let small = folder.path().join("small");
    open(&path).unwrap().export(&small, Dtype::BF16, &Changes::default(), false).unwrap();
    open_all(&small).unwrap();
    let size = |path: &Path| fs::metadata(path.join(WEIGHTS)).unwrap().len();
    assert!(size(&small) < size(&path) * 3 / 4);
    let (a, b) = (open(&path).unwrap().weights().unwrap(), open(&small).unwrap().weights().unwrap());
    for (name, a) in &a {
        let gap = (a - &b[name]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(gap < 4e-3, "{name}: {gap}");
    }
    assert_eq!(open(&small).unwrap().attribution(), "Ours.");
    let tokenizer = path.join(IMAGE_TOKENIZER);
    assert!(message(&open(&tokenizer).unwrap().generator().err().unwrap()).contains("not a generator"));
}

/// The ids of a text in both scripts.
fn ids(path: &Path) -> [Vec<u32>; 2] {
    let text = open(path).unwrap().text().unwrap();
    ["红苹果", "紅蘋果"].map(|prompt| text.encode(prompt, 8).unwrap())
}

#[test]
fn texts_are_normalized_as_the_configuration_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let [simplified, traditional] = ids(&path);
    assert_ne!(simplified, traditional);
    // As earlier versions wrote it.
    let config = fs::read_to_string(path.join(CONFIG)).unwrap();
    let earlier = config.replace("normalize = \"none\"\n", "");
    assert_ne!(config, earlier);
    fs::remove_file(path.join(MANIFEST)).unwrap();
    fs::write(path.join(CONFIG), earlier).unwrap();
    assert_eq!(ids(&path), [simplified.clone(), traditional]);
    fs::write(path.join(CONFIG), config.replace("normalize = \"none\"", "normalize = \"simplified\"")).unwrap();
    assert_eq!(ids(&path), [simplified.clone(), simplified.clone()]);
    let small = folder.path().join("small");
    open(&path).unwrap().export(&small, Dtype::BF16, &Changes::default(), false).unwrap();
    assert_eq!(ids(&small), [simplified.clone(), simplified]);
}

#[test]
fn missing_truncated_and_foreign_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    for with_manifest in [true, false] {
        if !with_manifest {
            // As earlier versions wrote it.
            fs::remove_file(path.join(MANIFEST)).unwrap();
            fs::remove_file(path.join(IMAGE_TOKENIZER).join(MANIFEST)).unwrap();
            open_all(&path).unwrap();
        }
        damage_each_file(&path);
    }
    fs::copy(path.join("image-tokenizer/model.safetensors"), path.join(WEIGHTS)).unwrap();
    assert!(message(&open_all(&path).unwrap_err()).contains("does not fit the config.toml"));
    assert!(message(&open(&folder.path().join("nowhere")).unwrap_err()).contains("no model folder"));
}

fn damage_each_file(path: &Path) {
    for file in [CONFIG, WEIGHTS, VOCAB, "image-tokenizer/config.toml", "image-tokenizer/model.safetensors"] {
        let whole = fs::read(path.join(file)).unwrap();
        fs::remove_file(path.join(file)).unwrap();
        let error = message(&open_all(path).unwrap_err());
        assert!(error.contains("lacks") && error.contains(file), "{error}");
        // Half a configuration is one with more defaults: nothing can tell.
        if !file.ends_with("toml") {
            fs::write(path.join(file), &whole[..whole.len() / 2]).unwrap();
            let error = message(&open_all(path).unwrap_err());
            assert!(error.contains(file), "{error}");
        }
        fs::write(path.join(file), b"\x89PNG\r\n\x1a\n and more that is no model").unwrap();
        assert!(message(&open_all(path).unwrap_err()).contains(file));
        fs::write(path.join(file), whole).unwrap();
    }
}

#[test]
fn another_folder_is_never_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let mine = folder.path().join("mine");
    fs::create_dir(&mine).unwrap();
    fs::write(mine.join("letter.txt"), "dear").unwrap();
    assert!(open(&path).unwrap().export(&mine, Dtype::F32, &Changes::default(), false).is_err());
    assert_eq!(fs::read_to_string(mine.join("letter.txt")).unwrap(), "dear");
}

/// Names in a folder, hidden ones included.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn export(path: &Path, to: &Path, force: bool) -> Result<()> {
    open(path)?.export(to, Dtype::F32, &Changes::default(), force)
}

#[test]
fn only_a_folder_of_known_files_is_replaced_and_nothing_beside_it_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let out = folder.path().join("out");
    for beside in ["out.old", "out.new"] {
        fs::create_dir(folder.path().join(beside)).unwrap();
        fs::write(folder.path().join(beside).join("letter.txt"), "dear").unwrap();
    }
    for foreign in ["letter.txt", "image-tokenizer/letter.txt"] {
        export(&path, &out, false).unwrap();
        // Of ours alone: replaced.
        export(&path, &out, false).unwrap();
        fs::write(out.join(foreign), "dear").unwrap();
        let before = names(folder.path());
        let error = export(&path, &out, false).unwrap_err();
        assert!(message(&error).contains(foreign), "{error:#}");
        assert_eq!(fs::read_to_string(out.join(foreign)).unwrap(), "dear");
        assert_eq!(names(folder.path()), before);
        export(&path, &out, true).unwrap();
        assert!(!out.join(foreign).exists());
    }
    // A configuration alone is somebody's.
    fs::remove_file(out.join(WEIGHTS)).unwrap();
    assert!(export(&path, &out, false).is_err());
    export(&path, &out, true).unwrap();
    open_all(&out).unwrap();
    for beside in ["out.old", "out.new"] {
        assert_eq!(fs::read_to_string(folder.path().join(beside).join("letter.txt")).unwrap(), "dear");
    }
}

#[cfg(unix)]
#[test]
fn links_and_devices_are_never_replaced() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let (path, link) = (model(folder.path()), folder.path().join("link"));
    for to in [path.as_path(), Path::new("/dev/full"), Path::new("nowhere")] {
        symlink(to, &link).unwrap();
        for name in [link.clone(), link.join("")] {
            for force in [false, true] {
                let error = export(&path, &name, force).unwrap_err();
                assert!(message(&error).contains("symbolic link"), "{error:#}");
                let error = open(&path).unwrap().export_llamagen(&name, Dtype::F32, force).unwrap_err();
                assert!(message(&error).contains("symbolic link"), "{error:#}");
            }
        }
        fs::remove_file(&link).unwrap();
    }
    for force in [false, true] {
        assert!(message(&export(&path, Path::new("/dev/null"), force).unwrap_err()).contains("not a folder"));
        let error = open(&path).unwrap().export_llamagen(Path::new("/dev/null"), Dtype::F32, force).unwrap_err();
        assert!(message(&error).contains("not a regular file"), "{error:#}");
    }
}

#[test]
fn a_file_is_replaced_if_it_is_a_safetensors_file() {
    let folder = tempfile::tempdir().unwrap();
    let (demo, out) = (Bundle::open(DEMO_NAME).unwrap(), folder.path().join("out.safetensors"));
    demo.export_llamagen(&out, Dtype::F32, false).unwrap();
    demo.export_llamagen(&out, Dtype::BF16, false).unwrap();
    fs::write(&out, "dear").unwrap();
    assert!(message(&demo.export_llamagen(&out, Dtype::F32, false).unwrap_err()).contains("not a safetensors file"));
    assert_eq!(fs::read_to_string(&out).unwrap(), "dear");
    demo.export_llamagen(&out, Dtype::F32, true).unwrap();
    assert!(weights::map(&out).is_ok());
    assert_eq!(names(folder.path()), ["out.safetensors"]);
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let fail = |new: &Path| {
        fs::write(new.join("half"), "x").unwrap();
        crate::error::bail!("the disk is full")
    };
    assert!(message(&publish::folder(&out, false, fail).unwrap_err()).contains("the disk is full"));
    assert!(publish::file(&out, false, |_| crate::error::bail!("the disk is full")).is_err());
    assert!(names(folder.path()).is_empty());
    // With a trailing slash, and folders on the way made.
    let inner = folder.path().join("a/b/");
    Bundle::open(DEMO_NAME).unwrap().export(&inner, Dtype::F32, &Changes::default(), false).unwrap();
    open_all(&inner).unwrap();
    assert_eq!(names(&folder.path().join("a")), ["b"]);
}

#[test]
fn parts_of_another_model_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let named = |file: &str| {
        let error = message(&open(&path).unwrap_err());
        assert!(error.contains(file) && error.contains("do not belong together"), "{error}");
    };
    // Shapes fit in each case.
    for (file, from, to) in [(VOCAB, "红\n", "\u{1}"), (CONFIG, "heads = 2", "heads = 4")] {
        let whole = fs::read_to_string(path.join(file)).unwrap();
        let mut other = whole.replacen(from, to, 1);
        if file == VOCAB {
            other = format!("{}{from}", whole.replacen(from, "", 1));
        }
        assert_ne!(other, whole);
        fs::write(path.join(file), other).unwrap();
        named(file);
        fs::write(path.join(file), whole).unwrap();
    }
    let weights = path.join(WEIGHTS);
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, &bytes).unwrap();
    named(WEIGHTS);
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, &bytes).unwrap();
    open_all(&path).unwrap();

    // Another image tokenizer, with its own manifest or without.
    let tokenizer = path.join(IMAGE_TOKENIZER);
    let mut other = open(&tokenizer).unwrap().weights().unwrap();
    let codebook = (&other["quantize.embedding.weight"] + 0.25).unwrap();
    other.insert("quantize.embedding.weight".into(), codebook);
    let config = open(&tokenizer).unwrap().config;
    let weights = other.iter().map(|(name, tensor)| (name.clone(), weights::of_tensor(tensor).unwrap())).collect();
    let parts = Parts { config: &config, weights, vocab: None, attribution: String::new(), image_tokenizer: None };
    write(&tokenizer, &parts, Dtype::F32).unwrap();
    named(IMAGE_TOKENIZER);
    fs::remove_file(tokenizer.join(MANIFEST)).unwrap();
    named(IMAGE_TOKENIZER);
}

#[test]
fn precision_and_decoder_keep_the_codes_fingerprint() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path()).join(IMAGE_TOKENIZER);
    let (whole, digest) = (open(&path).unwrap(), open(&path).unwrap().digest().unwrap());
    for (name, dtype) in [("bf16", Dtype::BF16), ("f16", Dtype::F16)] {
        let (small, again) = (folder.path().join(name), folder.path().join("again"));
        whole.export(&small, dtype, &Changes::default(), false).unwrap();
        open(&small).unwrap().export(&again, Dtype::F32, &Changes::default(), false).unwrap();
        assert_eq!(
            [open(&small), open(&again)].map(|bundle| bundle.unwrap().digest().unwrap()),
            [digest.clone(), digest.clone()]
        );
    }
    // The demo is stored in bf16: f32 holds the same numbers.
    let demo = Bundle::open(DEMO_NAME).unwrap();
    let wide = folder.path().join("wide");
    demo.export(&wide, Dtype::F32, &Changes::default(), false).unwrap();
    fs::remove_file(wide.join(MANIFEST)).unwrap();
    fs::remove_file(wide.join(IMAGE_TOKENIZER).join(MANIFEST)).unwrap();
    assert_eq!(open(&wide).unwrap().digest().unwrap(), demo.digest().unwrap());

    let mut weights = whole.weights().unwrap();
    for (name, same) in [("decoder.conv_out.bias", true), ("quantize.embedding.weight", false)] {
        let changed = (&weights[name] + 0.25).unwrap();
        weights.insert(name.into(), changed);
        let values = weights.iter().map(|(name, tensor)| (name.clone(), weights::of_tensor(tensor).unwrap())).collect();
        let attribution = String::new();
        let parts = Parts { config: &whole.config, weights: values, vocab: None, attribution, image_tokenizer: None };
        let other = folder.path().join("other");
        write(&other, &parts, Dtype::F32).unwrap();
        assert_eq!(open(&other).unwrap().digest().unwrap() == digest, same, "{name}");
        assert_eq!(open(&other).unwrap().makes_codes_of(&digest).unwrap(), same, "{name}");
    }
}

/// The digest of the demo's image tokenizer as earlier versions wrote it into codes.json and checkpoints.
#[test]
fn digests_of_earlier_versions_are_recognized() {
    let demo = Bundle::open(DEMO_NAME).unwrap();
    assert!(demo.makes_codes_of(EARLY_DEMO_DIGEST).unwrap());
    assert_ne!(demo.digest().unwrap(), EARLY_DEMO_DIGEST);
    assert!(!demo.makes_codes_of("").unwrap());
}

const EARLY_DEMO_DIGEST: &str = "a094ae991ae745130f96c724a3944d23e10330e4ba009d6f9ae38a28d4e5e6f7";

#[test]
fn the_folder_of_a_run_stands_for_its_model() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    open_all(folder.path()).unwrap();
    let run = folder.path().join("run");
    fs::create_dir_all(run.join("checkpoints")).unwrap();
    assert!(message(&open(&run).unwrap_err()).contains("has no model yet"));
}
