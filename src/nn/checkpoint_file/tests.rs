use super::*;
use crate::error::hint_of;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn values(file: &CheckpointFile, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Files written with PyTorch and numpy by `scripts/golden_torch_files.py`.
#[test]
fn tensors_and_views_of_both_kinds_of_torch_files_are_read() {
    for name in ["torch_zip.pth", "torch_old.pth"] {
        let file = CheckpointFile::open(&golden(name)).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["inside", "plain", "turned", "wide"], "{name}");
        assert_eq!(values(&file, "plain"), (0..12).map(|i| i as f32 + 0.5).collect::<Vec<_>>());
        assert_eq!(file.shape("turned").unwrap(), [4, 3]);
        assert_eq!(values(&file, "turned"), [0., 4., 8., 1., 5., 9., 2., 6., 10., 3., 7., 11.]);
        assert_eq!(values(&file, "inside"), [5., 6., 9., 10.]);
        assert_eq!(values(&file, "wide"), [0., 1., 2., 3.]);
        assert!(file.tensor("count").is_err());
    }
}

#[test]
fn arrays_of_numpy_are_read_in_either_order() {
    let file = CheckpointFile::open(&golden("numpy.pkl")).unwrap();
    assert_eq!(values(&file, "net.kernel"), [0., 1., 2., 3., 4., 5.]);
    assert_eq!(file.shape("net.turned").unwrap(), [3, 2]);
    assert_eq!(values(&file, "net.turned"), [0., 3., 1., 4., 2., 5.]);
}

#[test]
fn truncated_flipped_and_unknown_files_are_errors_or_have_the_same_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pth");
    for name in ["torch_zip.pth", "torch_old.pth", "numpy.pkl", "taming_vqgan.safetensors"] {
        let whole = fs::read(golden(name)).unwrap();
        let step = (whole.len() / 150).max(1);
        for end in (0..whole.len()).step_by(step) {
            fs::write(&path, &whole[..end]).unwrap();
            assert!(CheckpointFile::open(&path).is_err() || name == "numpy.pkl", "{name} cut at {end}");
            let mut flipped = whole.clone();
            flipped[end] ^= 1 << (end % 8);
            fs::write(&path, &flipped).unwrap();
            if let Ok(file) = CheckpointFile::open(&path) {
                file.names().for_each(|name| drop(file.tensor(name)));
            }
        }
    }
    for foreign in [&b"\x89PNG\r\n\x1a\n and more"[..], b"", b"PK\x03\x04", b"\x80\x04."] {
        fs::write(&path, foreign).unwrap();
        assert!(CheckpointFile::open(&path).is_err());
    }
    assert!(CheckpointFile::open(&folder.path().join("nowhere.pth")).is_err());
}

/// A pickle that would run a command is refused, and the command has not run.
#[test]
fn a_malicious_file_is_refused_and_runs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (path, trace) = (folder.path().join("a.pth"), folder.path().join("trace"));
    let command = format!("touch {}", trace.display());
    let mut bytes = b"\x80\x02cposix\nsystem\nq\x00X".to_vec();
    bytes.extend((command.len() as u32).to_le_bytes());
    bytes.extend(command.bytes());
    bytes.extend(b"q\x01\x85q\x02Rq\x03.");
    fs::write(&path, bytes).unwrap();
    let error = CheckpointFile::open(&path).err().map(|error| format!("{error:#}")).unwrap();
    assert!(error.contains("would call `posix.system`"), "{error}");
    assert!(!trace.exists());
}

/// A view that repeats a few bytes many times would need unbounded memory.
#[test]
fn a_tensor_larger_than_its_bytes_is_refused() {
    let stored = |shape: Vec<usize>, strides: Vec<usize>, offset| {
        let mut left = MAX_REPEATED;
        Stored { file: 0, dtype: Dtype::F32, shape, strides, offset, bytes: 0..16 }.check(&mut left).is_ok()
    };
    assert!(stored(vec![1000, 4], vec![0, 1], 0), "a view as `expand` makes");
    assert!(stored(vec![2, 2], vec![1, 2], 0) && stored(vec![0, 9], vec![9, 1], 0) && stored(vec![], vec![], 3));
    assert!(!stored(vec![1 << 40], vec![0], 0), "one element repeated");
    assert!(!stored(vec![2, 2], vec![2, 1], 1), "beyond the end");
    assert!(
        !stored(vec![2], vec![usize::MAX], 1)
            && !stored(vec![usize::MAX, 2], vec![0, 0], 0)
            && !stored(vec![2], vec![], 0)
    );
}

#[test]
fn a_view_that_repeats_elements_is_read() {
    let stored =
        |shape: Vec<usize>, strides| Stored { file: 0, dtype: Dtype::F32, shape, strides, offset: 0, bytes: 0..16 };
    assert_eq!(stored(vec![2, 3], vec![0, 1]).contiguous(&[1., 2., 3.]), [1., 2., 3., 1., 2., 3.]);
    assert_eq!(stored(vec![2, 3], vec![1, 0]).contiguous(&[1., 2.]), [1., 1., 1., 2., 2., 2.]);
    // The number of repeated elements is bounded per file.
    let mut left = 10;
    assert!(stored(vec![3, 4], vec![0, 1]).check(&mut left).is_ok() && left == 2);
    assert!(stored(vec![3, 4], vec![0, 1]).check(&mut left).is_err());
}

fn case(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

fn complaint(path: &Path) -> (String, String) {
    let error = CheckpointFile::open(path).err().unwrap();
    (format!("{error:#}"), hint_of(&error).unwrap_or_default().to_owned())
}

/// A header of 128 or 0x4b50 bytes starts like a pickle or a zip archive.
#[test]
fn the_length_of_a_safetensors_header_may_begin_with_any_byte() {
    assert!(CheckpointFile::open(&case("safetensors_header_len_128.safetensors")).unwrap().names().next().is_some());
    let mut header = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#.to_vec();
    header.resize(usize::from(u16::from_le_bytes(*b"PK")), b' ');
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header, &1f32.to_le_bytes()].concat()).unwrap();
    assert_eq!(values(&CheckpointFile::open(&path).unwrap(), "a"), [1.0]);
    assert!(complaint(&case("duplicate_key_same_offsets.safetensors")).0.contains("twice"));
}

/// Dictionaries that contain the previous one twice (2^k entries in all), and names that are copied many times.
#[test]
fn pickles_that_grow_exponentially_are_refused() {
    assert!(complaint(&case("pickle_dag_4k_to_3.4GB.pkl")).0.contains("without end"));
    // A text of 10,000 characters as module and name, copied into 10,000 functions.
    let text = "x".repeat(10_000);
    let once = [&b"\x80\x04X\x10\x27\x00\x00"[..], text.as_bytes(), b"q\x000"].concat();
    let bytes = [once, b"h\x00h\x00\x930".repeat(10_000), b"N.".to_vec()].concat();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pkl");
    fs::write(&path, bytes).unwrap();
    let (error, hint) = complaint(&path);
    assert!(error.contains("more than 90 MB") && hint.contains("safetensors"), "{error} {hint}");
    fs::write(&path, [&b"\x80\x04"[..], &b"N0".repeat(10 << 20), b"N."].concat()).unwrap();
    assert!(complaint(&path).0.contains("more than 90 MB"));
}

#[test]
fn a_refused_call_is_explained_by_its_own_hint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pt");
    fs::write(&path, b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.").unwrap();
    assert!(complaint(&path).1.contains("do not trust the file"));
    fs::write(&path, b"\x89PNG\r\n\x1a\n and more").unwrap();
    assert!(complaint(&path).1.contains("damaged or has another format"));
}

#[cfg(unix)]
#[test]
fn devices_and_fifos_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("a.pt");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [fifo.as_path(), Path::new("/dev/zero")] {
        let (error, hint) = complaint(path);
        assert!(error.contains("not a regular file") && hint.contains("copy it again"), "{error} {hint}");
    }
}

/// `{"model": {NAME: x}, "ema": {NAME: x + 1}, "args": Namespace(lr=1)}` as numpy arrays; `ema` is optional.
fn training_checkpoint(name: &str, ema: bool) -> Vec<u8> {
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let array = |value: f32| {
        let made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\n";
        [&made[..], &text("f4"), b"\x89\x88\x87R\x89C\x04", &value.to_le_bytes(), b"tb"].concat()
    };
    let dict = |value: f32| [&b"}"[..], &text(name), &array(value), b"s"].concat();
    let mut all = [&b"\x80\x03}"[..], &text("model"), &dict(1.0), b"s"].concat();
    if ema {
        all.extend([&text("ema")[..], &dict(2.0), b"s"].concat());
    }
    all.extend([&text("args")[..], b"cargparse\nNamespace\n)\x81}", &text("lr"), b"K\x01sbs."].concat());
    all
}

#[test]
fn training_checkpoints_give_their_ema_without_the_prefixes_of_wrappers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pt");
    let names = ["encoder.w", "module.encoder.w", "_orig_mod.module.encoder.w", "first_stage_model.encoder.w"];
    for (name, ema) in names.into_iter().flat_map(|name| [(name, false), (name, true)]) {
        fs::write(&path, training_checkpoint(name, ema)).unwrap();
        let file = CheckpointFile::open(&path).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["encoder.w"], "{name}");
        assert_eq!(values(&file, "encoder.w"), [if ema { 2.0 } else { 1.0 }]);
    }
}
