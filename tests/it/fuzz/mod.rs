//! Fuzz targets for everything that reads files of strangers: weights, shards, images, side files, vocabularies,
//! configurations, model folders. They run on stable Rust as ordinary tests.
//!
//! Random bytes do not get past the first check of a format. A case is therefore a small valid input with up to eight
//! edits (see [`edits`]), after which lengths and checksums are made right again in half of the cases. No case may
//! panic, overflow the stack, or take more memory or processor time than its target's [`Bounds`]; what was parsed must
//! have the properties that the target states. Errors are welcome.
//!
//! ```sh
//! cargo test --test it -- fuzz::                                   # the cases of CI: the same ones each time
//! VILG_FUZZ_SECONDS=300 cargo test --test it -- fuzz::             # others, five minutes for each target
//! VILG_FUZZ_INPUT=FILE cargo test --test it -- fuzz::targets::tar_shards    # one input again
//! ```
//!
//! A failure prints the smallest input that proptest finds, and writes it to `target/tmp/fuzz/TARGET/failed`. An input
//! that ends the process is in `target/tmp/fuzz/TARGET/input`. `VILG_FUZZ_SEED=N` repeats a long run.
//!
//! Why proptest: it is a dependency already, shrinks the list of edits, and needs no other compiler. A coverage-guided
//! fuzzer (cargo-fuzz, bolero) gets deeper into unknown formats, but here the seeds and the words of each format do.

mod edits;
mod seeds;
mod targets;

use crate::counting::{LIVE, PEAK};
use edits::{Edit, edit};
use proptest::{
    collection::vec,
    prelude::any,
    sample::Index,
    test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner},
};
use std::{
    env, fs, panic,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::Ordering::Relaxed,
    thread,
    time::{Duration, Instant},
};

const CHILD: &str = "VILG_TEST_FUZZ_CHILD";
const SECONDS: &str = "VILG_FUZZ_SECONDS";
const SEED: &str = "VILG_FUZZ_SEED";
const INPUT: &str = "VILG_FUZZ_INPUT";
/// Processor time of one case, in an unoptimised build.
const CASE: Duration = Duration::from_secs(10);

/// What a target may allocate.
struct Bounds {
    bytes: usize,
    /// And for each byte of the input.
    per_byte: usize,
}

struct Target {
    name: &'static str,
    /// Cases in CI.
    cases: u32,
    seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the format, for edits.
    words: &'static [&'static [u8]],
    /// Makes lengths and checksums right.
    repair: fn(&mut Vec<u8>),
    bounds: Bounds,
    /// Parses an input, in a folder that is its own and keeps what earlier cases left there. Panics at a fault.
    check: fn(&[u8], &Path),
}

impl Target {
    fn folder(&self) -> PathBuf {
        Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz").join(self.name)
    }

    /// Runs the target in a process of its own, which a fault may end and whose memory is counted.
    fn run(&self) {
        let folder = self.folder();
        if let Some(input) = env::var_os(INPUT) {
            return self.check_input(&fs::read(input).unwrap(), &folder.join("replay"));
        }
        if env::var_os(CHILD).is_some() {
            return self.run_cases();
        }
        drop(fs::remove_dir_all(&folder));
        fs::create_dir_all(&folder).unwrap();
        let log = folder.join("log");
        let file = fs::File::create(&log).unwrap();
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", &format!("fuzz::targets::{}", self.name), "--nocapture", "--test-threads=1"]);
        command.env(CHILD, "1").env("RAYON_NUM_THREADS", "2").stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let mut child = command.spawn().unwrap();
        let patience = Duration::from_secs(300 + 2 * seconds());
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if begun.elapsed() > patience {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            thread::sleep(Duration::from_millis(20));
        };
        if status.is_some_and(|status| status.success()) {
            drop(fs::remove_dir_all(&folder));
            return;
        }
        let log = fs::read(&log).unwrap();
        let end = String::from_utf8_lossy(&log[log.len().saturating_sub(6000)..]).into_owned();
        let status = status.map_or("killed after too long".to_owned(), |status| status.to_string());
        panic!("{}: {status}; the last input is {}\n{end}", self.name, folder.join("input").display());
    }

    /// The cases of CI, or as many as fit into the time that was asked for.
    fn run_cases(&self) {
        let (seeds, folder) = ((self.seeds)(), self.folder());
        // Seeds are cases as well.
        seeds.iter().for_each(|seed| self.check_input(seed, &folder));
        let first = env::var(SEED).map_or(0, |seed| seed.parse().expect("a number"));
        let begun = Instant::now();
        for round in first.. {
            self.round(round, &seeds, &folder);
            if begun.elapsed().as_secs() >= seconds() {
                println!("{}: rounds {first} to {round} of {} cases", self.name, self.cases);
                return;
            }
        }
    }

    fn round(&self, round: u64, seeds: &[Vec<u8>], folder: &Path) {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&round.to_le_bytes());
        let name = &self.name.as_bytes()[..self.name.len().min(24)];
        key[8..8 + name.len()].copy_from_slice(name);
        let config = Config {
            cases: self.cases,
            failure_persistence: None,
            max_shrink_time: 30_000,
            max_shrink_iters: 10_000,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &key));
        let strategy = (any::<Index>(), vec(edit(), 1..=8), any::<bool>());
        let input = |(seed, edits, repair): &(Index, Vec<Edit>, bool)| {
            let mut input = seed.get(seeds).clone();
            edits.iter().for_each(|edit| edit.apply(&mut input, seeds, self.words));
            if *repair {
                (self.repair)(&mut input);
            }
            input
        };
        // Each panic of the search for the smallest input would be printed.
        panic::set_hook(Box::new(|_| {}));
        let result = runner.run(&strategy, |case| {
            self.check_input(&input(&case), folder);
            Ok(())
        });
        drop(panic::take_hook());
        if let Err(TestError::Fail(reason, case)) = result {
            let (input, failed) = (input(&case), folder.join("failed"));
            fs::write(&failed, &input).unwrap();
            let shown = String::from_utf8_lossy(&input[..input.len().min(2000)]).escape_debug().to_string();
            panic!(
                "round {round}: {reason}\n{case:?}\ninput, {} bytes: {shown}\nagain: {INPUT}={} cargo test --test it -- fuzz::targets::{}",
                input.len(),
                failed.display(),
                self.name
            );
        }
        result.unwrap();
    }

    /// Checks one input and what it took.
    fn check_input(&self, input: &[u8], folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        // Should the process end here, the input is known.
        write(folder.join("input"), input);
        let (before, begun) = (LIVE.load(Relaxed), processor_time());
        PEAK.store(before, Relaxed);
        (self.check)(input, folder);
        let (peak, time) = (PEAK.load(Relaxed).saturating_sub(before), processor_time() - begun);
        let bound = self.bounds.bytes + self.bounds.per_byte * input.len();
        assert!(peak <= bound, "{peak} bytes allocated for an input of {}, bound {bound}", input.len());
        assert!(time <= CASE, "{time:?} for an input of {} bytes", input.len());
    }
}

/// Writes a file anew: one that is there is removed first, since ext4 flushes a file that is cut and written again.
fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
    drop(fs::remove_file(&path));
    fs::write(&path, bytes).unwrap();
}

fn seconds() -> u64 {
    env::var(SECONDS).map_or(0, |seconds| seconds.parse().expect("a number of seconds"))
}

/// Of the whole process.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes into `time` and nothing else.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
