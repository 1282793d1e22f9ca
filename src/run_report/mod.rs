//! One self-contained HTML page about training runs and evaluations (`vilg report`): curves, samples, configuration, versions
//! and tables. It needs no network and no scripts.
//!
//! Read [`page`](mod@page) first: the sections from top to bottom. [`metrics`] reads a metrics.jsonl of any length through [`lines`]
//! into [`curve`]s of bounded size; [`plot`] draws them. [`evaluation`] reads the results of `vilg eval`; [`tables`] shows
//! them beside the figures of the [`paper`].

mod axis;
mod columns;
mod configuration;
mod curve;
mod evaluation;
mod html;
mod lines;
mod metrics;
mod page;
mod paper;
mod plot;
mod run;
mod samples;
mod tables;
mod versions;

pub use evaluation::Evaluation;
pub use html::PAGE_START;
pub use page::page;
pub use plot::COLORS;
pub use run::Run;

use crate::error::{Hint, Result, ensure, failed, usage};
use std::path::PathBuf;

/// Maximum size of all sample images of a page in bytes.
const SAMPLES: u64 = 24 << 20;

/// What a page shows.
#[derive(Default)]
pub struct Contents {
    pub runs: Vec<Run>,
    pub evaluations: Vec<Evaluation>,
}

/// Reads runs (folders with a metrics.jsonl) and evaluations (JSON files), in the order in which they are named; shows at
/// most `samples` sample images of each run.
///
/// # Errors
/// A path is neither, cannot be read, or there are more runs than a plot can tell apart.
pub fn read(paths: &[PathBuf], samples: usize) -> Result<Contents> {
    let folders = paths.iter().filter(|path| path.is_dir()).count();
    let most = COLORS.len();
    let hint = "make several reports";
    ensure!(folders <= most, usage(format_args!("{folders} runs are more than the {most} that fit in a plot"), hint));
    let mut contents = Contents::default();
    for path in paths {
        let shown = path.display();
        let hint = "name a run folder such as runs/NAME, or a JSON file that `vilg eval ... --json` wrote";
        ensure!(path.exists(), failed(format_args!("there is no {shown}"), hint));
        if !path.is_dir() {
            contents.evaluations.extend(evaluation::read(path)?);
            continue;
        }
        let what = format!("{shown} is not a run folder: it has no {}", run::METRICS);
        ensure!(path.join(run::METRICS).exists(), failed(what, hint));
        let run = Run::read(path, samples, SAMPLES / folders as u64);
        contents.runs.push(run.hint(format_args!("cannot read the run {shown}"), hint)?);
    }
    Ok(contents)
}
