//! How well a step uses its hardware: TFLOP/s, model FLOPs utilization (MFU, arXiv 2204.02311), shares of the step spent
//! waiting, and the memory of the device.

use crate::{
    config::{Precision, Train},
    runtime::{self, DeviceMemory, Gpu},
};
use serde_json::{Value, json};
use std::time::Duration;

/// Shares below this are not on the line of a step, which is long enough.
const SHOWN: f64 = 0.01;

/// Where the time of a step went.
#[derive(Debug, Clone, Copy)]
pub struct StepTimes {
    /// From the samples to the update.
    pub spent: Duration,
    /// Waiting for samples, on the rank that waited longest.
    pub data_wait: Duration,
    /// Waiting for other ranks, on this rank.
    pub communication_wait: Duration,
}

/// The hardware of a run.
#[derive(Debug, Clone, Copy)]
pub struct Utilization {
    ranks: usize,
    /// Peak of a rank's device in TFLOP/s; `None`: not known.
    peak: Option<f64>,
}

impl Utilization {
    /// The device of this rank among `ranks` with one of its kind each.
    pub fn of(settings: &Train, ranks: usize) -> Self {
        let gpu = runtime::device_model().and_then(|name| Gpu::named(&name));
        Self { ranks, peak: peak(settings, gpu) }
    }

    /// TFLOP/s of a rank, and its share of the peak if that is known.
    fn speed(&self, flops: f64, spent: Duration) -> (f64, Option<f64>) {
        let tflops = flops / spent.as_secs_f64() / self.ranks.max(1) as f64 / 1e12;
        (tflops, self.peak.map(|peak| tflops / peak))
    }

    /// The part of a step's line on stderr: `41.2 TFLOP/s  MFU 13.2 %  waits: data 3 %`.
    pub fn shown(&self, flops: f64, times: StepTimes) -> String {
        let (tflops, mfu) = self.speed(flops, times.spent);
        let mut shown = format!("{} TFLOP/s", digits(tflops));
        if let Some(mfu) = mfu {
            shown += &format!("  MFU {:.1} %", 100.0 * mfu);
        }
        let all = [("data", times.data_wait), ("communication", times.communication_wait)];
        let all =
            all.map(|(name, wait)| (name, share(wait, times.spent))).into_iter().filter(|(_, part)| *part >= SHOWN);
        let waits: Vec<_> = all.map(|(name, part)| format!("{name} {:.0} %", 100.0 * part)).collect();
        if !waits.is_empty() {
            shown += &format!("  waits: {}", waits.join(", "));
        }
        if let Some(DeviceMemory { allocated, peak, .. }) = runtime::device_memory() {
            shown += &format!("  device {:.2} GB, peak {:.2} GB", allocated as f64 / 1e9, peak as f64 / 1e9);
        }
        shown
    }

    /// Adds the same to a line of metrics.jsonl.
    pub fn log(&self, line: &mut Value, flops: f64, times: StepTimes) {
        let (tflops, mfu) = self.speed(flops, times.spent);
        line["tflops"] = json!(tflops);
        if let Some(mfu) = mfu {
            line["mfu"] = json!(mfu);
        }
        line["data_wait"] = json!(share(times.data_wait, times.spent));
        if self.ranks > 1 {
            line["communication_wait"] = json!(share(times.communication_wait, times.spent));
        }
        if let Some(DeviceMemory { allocated, peak, reserved }) = runtime::device_memory() {
            line["device_memory_bytes"] = json!(allocated);
            line["device_peak_memory_bytes"] = json!(peak);
            line["device_reserved_bytes"] = json!(reserved);
        }
    }
}

/// The peak in TFLOP/s that the configuration names, or that of the GPU in the precision of matrix products.
fn peak(settings: &Train, gpu: Option<Gpu>) -> Option<f64> {
    let of_gpu = |gpu: Gpu| match settings.precision {
        Precision::Bf16 | Precision::F16 => gpu.bf16_tflops,
        Precision::F32 => gpu.f32_tflops,
    };
    if settings.peak_tflops > 0.0 { Some(settings.peak_tflops) } else { gpu.map(of_gpu) }
}

fn share(part: Duration, whole: Duration) -> f64 {
    part.as_secs_f64() / whole.as_secs_f64()
}

/// A number with three digits: 412, 41.2, 4.12, 0.0412.
fn digits(number: f64) -> String {
    match number {
        n if n >= 100.0 => format!("{n:.0}"),
        n if n >= 10.0 => format!("{n:.1}"),
        n if n >= 0.1 => format!("{n:.2}"),
        n => format!("{n:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(data: u64, communication: u64) -> StepTimes {
        let [spent, data_wait, communication_wait] = [2000, data, communication].map(Duration::from_millis);
        StepTimes { spent, data_wait, communication_wait }
    }

    #[test]
    fn a_step_is_measured_by_its_flops_and_its_waits() {
        let run = Utilization { ranks: 4, peak: Some(312.0) };
        let mut line = json!({});
        // 8e14 in 2 s on 4 ranks: 1e14 a second and rank.
        run.log(&mut line, 8e14, times(60, 500));
        assert_eq!(line["tflops"], 100.0);
        assert!((line["mfu"].as_f64().unwrap() - 100.0 / 312.0).abs() < 1e-12);
        assert_eq!((&line["data_wait"], &line["communication_wait"]), (&json!(0.03), &json!(0.25)));
        assert_eq!(run.shown(8e14, times(60, 500)), "100 TFLOP/s  MFU 32.1 %  waits: data 3 %, communication 25 %");
        assert_eq!(run.shown(8e14, times(10, 600)), "100 TFLOP/s  MFU 32.1 %  waits: communication 30 %");
        let alone = Utilization { ranks: 1, peak: None };
        assert_eq!(alone.shown(1e11, times(1, 0)), "0.0500 TFLOP/s");
        let mut line = json!({});
        alone.log(&mut line, 1e11, times(1, 0));
        assert_eq!(line, json!({ "tflops": 0.05, "data_wait": 0.0005 }));
    }

    #[test]
    fn the_peak_is_that_of_the_precision_unless_the_configuration_names_one() {
        let gpu = Gpu::named("NVIDIA A100-SXM4-80GB");
        let peak = |precision, peak_tflops| peak(&Train { precision, peak_tflops, ..Train::default() }, gpu);
        assert_eq!(peak(Precision::Bf16, 0.0), Some(312.0));
        assert_eq!(peak(Precision::F32, 0.0), Some(19.5));
        assert_eq!(peak(Precision::F32, 156.0), Some(156.0));
        assert_eq!(super::peak(&Train::default(), None), None);
    }
}
