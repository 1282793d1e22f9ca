//! What may change when a run resumes.

use super::{ranks_tests::live, task_tests::generator_config};

/// Only the order of sums depends on the number of micro-batches.
#[test]
fn a_run_resumes_with_another_number_of_micro_batches() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = generator_config(folder.path());
    (config.train.decay_start, config.train.accumulation, config.train.steps) = (1.0, 1, 4);
    let whole = live(&folder.path().join("whole"), &config, 1).unwrap();
    let parent = folder.path().join("parts");
    config.train.steps = 2;
    live(&parent, &config, 1).unwrap();
    (config.train.accumulation, config.train.steps) = (3, 4);
    let parts = live(&parent, &config, 1).unwrap();
    assert_eq!((whole.len(), parts.len()), (4, 4));
    assert!(whole[..2] == parts[..2] && whole[2..] != parts[2..], "{whole:?} {parts:?}");
    for (a, b) in whole.iter().flatten().zip(parts.iter().flatten()) {
        assert!((a - b).abs() <= 1e-4 * a.abs().max(1.0), "{a} {b}");
    }
}
