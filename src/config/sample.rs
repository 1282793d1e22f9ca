//! The section `[sample]` of a configuration.

use super::check::Check;
use serde::{Deserialize, Serialize};

/// Section `[sample]`: sampling defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sample {
    /// Prompts of the sample images. Default: none.
    pub prompts: Vec<String>,
    /// Sampling temperature: divides the logits. Lower values give more typical images. Default 1.
    pub temperature: f64,
    /// How the temperature changes from the first code of an image to the last, where it is `temperature`: `constant`
    /// (default), `linear` or `cosine`.
    pub temperature_schedule: Schedule,
    /// Temperature of the first code with a schedule. Default 1.
    pub temperature_start: f64,
    /// Top-k sampling: sample only from the K most likely codes. 0 (default): from all.
    pub top_k: usize,
    /// Nucleus sampling: sample only from the most likely codes whose probabilities add up to this. 1 (default): from
    /// all.
    pub top_p: f64,
    /// Classifier-free guidance scale. 1 (default): no guidance.
    pub guidance: f64,
    /// How the guidance scale changes from the first code of an image to the last, where it is `guidance`: `constant`
    /// (default), `linear` or `cosine`.
    pub guidance_schedule: Schedule,
    /// Guidance scale of the first code with a schedule. Default 1.
    pub guidance_start: f64,
}

/// How a setting changes from the first code of an image to the last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// It is the same for all codes
    #[default]
    Constant,
    /// In equal steps, as in Muse
    Linear,
    /// Along half a period of the cosine: slowly near the first and the last code
    Cosine,
}

impl Schedule {
    /// The value after a share `progress` in `0..=1` of the codes, from `start` to `end`. Both ends are exact.
    pub fn value(self, start: f64, end: f64, progress: f64) -> f64 {
        let share = match self {
            Self::Constant => 1.0,
            Self::Linear => progress,
            Self::Cosine => (1.0 - (std::f64::consts::PI * progress).cos()) / 2.0,
        };
        start * (1.0 - share) + end * share
    }
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            temperature: 1.0,
            temperature_schedule: Schedule::Constant,
            temperature_start: 1.0,
            top_k: 0,
            top_p: 1.0,
            guidance: 1.0,
            guidance_schedule: Schedule::Constant,
            guidance_start: 1.0,
        }
    }
}

impl Sample {
    /// Checks every value.
    pub(super) fn check(&self, check: &mut Check) {
        let keys = [
            ("temperature", self.temperature),
            ("temperature_start", self.temperature_start),
            ("guidance", self.guidance),
            ("guidance_start", self.guidance_start),
        ];
        check.within("sample", &keys, 0.0, 100.0, "1 leaves the model's distribution unchanged");
        let ok = self.top_p > 0.0 && self.top_p <= 1.0;
        check.that(ok, "sample.top_p", "be above 0, at most 1", "1 turns it off");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_go_from_start_to_end() {
        let values = |schedule: Schedule| [0.0, 0.25, 0.5, 1.0].map(|progress| schedule.value(1.0, 3.0, progress));
        assert_eq!(values(Schedule::Constant), [3.0; 4]);
        assert_eq!(values(Schedule::Linear), [1.0, 1.5, 2.0, 3.0]);
        let [first, early, middle, last] = values(Schedule::Cosine);
        assert_eq!((first, last), (1.0, 3.0));
        // (1 - cos 45°) / 2 of the way, and half of it.
        assert!((early - (2.0 - 0.5f64.sqrt())).abs() < 1e-12 && (middle - 2.0).abs() < 1e-12);
    }
}
