use super::*;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn values(file: &CheckpointFile, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Files that `scripts/golden_torch_files.py` had PyTorch and numpy write.
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
fn cut_flipped_and_foreign_files_are_errors_or_the_same_shapes() {
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

/// What would run a command is refused, and the command has not run.
#[test]
fn a_hostile_file_is_refused_and_runs_nothing() {
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

/// A view that repeats a few bytes many times over would need memory without end.
#[test]
fn a_tensor_larger_than_its_bytes_is_refused() {
    let stored = |shape: Vec<usize>, strides: Vec<usize>, offset| {
        Stored { file: 0, dtype: Dtype::F32, shape, strides, offset, bytes: 0..16 }.check().is_ok()
    };
    assert!(stored(vec![2, 2], vec![1, 2], 0) && stored(vec![0, 9], vec![9, 1], 0) && stored(vec![], vec![], 3));
    assert!(!stored(vec![1 << 40], vec![0], 0), "one element repeated");
    assert!(!stored(vec![2, 2], vec![2, 1], 1), "beyond the end");
    assert!(
        !stored(vec![2], vec![usize::MAX], 1)
            && !stored(vec![usize::MAX, 2], vec![0, 0], 0)
            && !stored(vec![2], vec![], 0)
    );
}
