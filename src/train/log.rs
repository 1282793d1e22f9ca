//! The metrics of each step: a line on stderr every `train.log_every` steps, and a line in metrics.jsonl. Between the lines
//! on stderr, a terminal shows a progress bar.

use super::{
    StepMetrics,
    clock::rfc3339,
    run_folder::RunFolder,
    state::RunState,
    utilization::{StepTimes, Utilization},
};
use crate::{config::Train, error::Result, report, runtime};
use indicatif::ProgressBar;
use serde_json::json;
use std::time::{Duration, Instant, SystemTime};

/// Reports the steps of this process.
pub struct StepLog {
    /// Steps of the run, and how often a line is printed.
    steps: u64,
    every: u64,
    started: Instant,
    /// The step that this process started after.
    first: u64,
    /// Where not every step has a line.
    bar: Option<ProgressBar>,
    utilization: Utilization,
}

impl StepLog {
    /// Starts the clock after `step` of a run on this many ranks.
    pub fn start(settings: &Train, step: u64, ranks: usize) -> Self {
        let (steps, every, utilization) = (settings.steps, settings.log_every, Utilization::of(settings, ranks));
        Self { steps, every, started: Instant::now(), first: step, bar: None, utilization }
    }

    /// Reports a step, with the metrics of validation data where they were measured; `learning_rate` is AdamW's.
    pub fn step(
        &mut self,
        folder: &mut RunFolder,
        run: &RunState,
        (measured, validation): (&StepMetrics, &[(String, f64)]),
        norm: f64,
        learning_rate: f64,
        times: StepTimes,
    ) -> Result<()> {
        let (step, seconds) = (run.step, times.spent.as_secs_f64());
        let speed = measured.amount as f64 / seconds;
        let peak = runtime::peak_bytes().unwrap_or_else(runtime::resident_bytes);
        self.progress(step, measured.loss());
        let numbers = || measured.losses.iter().chain(&measured.figures);
        if step.is_multiple_of(self.every.max(1)) || step == self.steps || step == self.first + 1 {
            let shown: Vec<_> = numbers().map(|(name, number)| format!("{name} {number:.4}")).collect();
            let elapsed = self.started.elapsed();
            report::note(format_args!(
                "step {step}/{}  {}  grad_norm {norm:.3}  lr {learning_rate:.2e}  memory {:.2} GB  {speed:.0} {}/s  {}  \
                elapsed {}  eta {}",
                self.steps,
                shown.join("  "),
                peak as f64 / 1e9,
                measured.unit,
                self.utilization.shown(measured.flops, times),
                clock(elapsed),
                clock(remaining(elapsed, step.saturating_sub(self.first), self.steps.saturating_sub(step))),
            ));
        }
        let mut line = json!({
            "step": step, "time": rfc3339(SystemTime::now()), "gradient_norm": norm, "learning_rate": learning_rate,
            "seconds": seconds, "per_second": speed, "unit": measured.unit, "peak_memory_bytes": peak,
        });
        self.utilization.log(&mut line, measured.flops, times);
        if let Some(scale) = run.loss_scale {
            line["loss_scale"] = json!(scale.factor());
        }
        for (name, number) in numbers() {
            line[*name] = json!(number);
        }
        for (name, number) in validation {
            line[name] = json!(number);
        }
        if !validation.is_empty() {
            let shown: Vec<_> = validation.iter().map(|(name, number)| format!("{name} {number:.4}")).collect();
            report::note(format_args!("step {step}/{}  {}", self.steps, shown.join("  ")));
        }
        folder.log(&line)
    }

    /// Moves the progress bar to `step`.
    fn progress(&mut self, step: u64, loss: f64) {
        if self.every <= 1 {
            return;
        }
        let steps = self.steps;
        let bar = self.bar.get_or_insert_with(|| {
            let bar = report::bar(steps, "");
            bar.set_position(step);
            bar.reset_eta();
            bar
        });
        bar.set_message(format!("loss {loss:.4}"));
        bar.set_position(step);
        if step == steps {
            bar.finish_and_clear();
        }
    }
}

/// The time that `left` steps take if `done` took `elapsed`.
fn remaining(elapsed: Duration, done: u64, left: u64) -> Duration {
    Duration::try_from_secs_f64(elapsed.as_secs_f64() * left as f64 / done.max(1) as f64).unwrap_or(Duration::MAX)
}

/// Hours, minutes and seconds: `1:02:03`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_people_read_them() {
        assert_eq!(clock(Duration::from_secs(3723)), "1:02:03");
        assert_eq!(remaining(Duration::from_secs(10), 5, 20), Duration::from_secs(40));
        assert_eq!(remaining(Duration::from_secs(10), 0, u64::MAX), Duration::MAX);
    }
}
