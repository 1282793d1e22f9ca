//! Options shared by the commands that sample tokens.

use crate::{
    config::{self, Schedule},
    error::{Result, ensure, usage},
    generate::Sampling,
};

/// How image codes are sampled. Options that are not given come from the model's configuration.
#[derive(clap::Args)]
pub struct Options {
    /// Sampling temperature, from 0 to 100: divides the logits. Lower values give more typical images; 0 always takes
    /// the most likely code [default: the model's]
    #[arg(long, value_name = "T", value_parser = from_0_to_100, allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// How the temperature changes from the first code of an image (in its upper left corner) to the last, where it is
    /// that of --temperature [default: the model's]
    #[arg(long, value_enum, value_name = "WHICH")]
    pub temperature_schedule: Option<Schedule>,
    /// With a temperature schedule: temperature of the first code, from 0 to 100 [default: the model's, usually 1]
    #[arg(long, value_name = "T", value_parser = from_0_to_100, allow_negative_numbers = true)]
    pub temperature_start: Option<f64>,
    /// Top-k sampling: sample only from the K most likely codes; 0: from all [default: the model's]
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Nucleus sampling: sample only from the most likely codes whose probabilities add up to P, above 0; 1: from all
    /// [default: the model's]
    #[arg(long, value_name = "P", value_parser = probability, allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Classifier-free guidance scale, from 0 to 100: 1 turns guidance off, higher values follow the prompt more
    /// closely. Any value but 1 doubles the cost [default: the model's]
    #[arg(long, value_name = "S", value_parser = from_0_to_100, allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// How the guidance scale changes from the first code of an image (in its upper left corner) to the last, where it is
    /// that of --guidance [default: the model's]
    #[arg(long, value_enum, value_name = "WHICH")]
    pub guidance_schedule: Option<Schedule>,
    /// With a guidance schedule: guidance scale of the first code, from 0 to 100 [default: the model's, usually 1]
    #[arg(long, value_name = "S", value_parser = from_0_to_100, allow_negative_numbers = true)]
    pub guidance_start: Option<f64>,
}

impl Options {
    /// The sampling settings: these options where given, else `defaults`.
    ///
    /// # Errors
    /// A start is given for a setting that is constant.
    pub fn over(&self, defaults: &config::Sample) -> Result<Sampling> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            temperature_schedule: self.temperature_schedule.unwrap_or(defaults.temperature_schedule),
            temperature_start: self.temperature_start.unwrap_or(defaults.temperature_start),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            guidance: self.guidance.unwrap_or(defaults.guidance),
            guidance_schedule: self.guidance_schedule.unwrap_or(defaults.guidance_schedule),
            guidance_start: self.guidance_start.unwrap_or(defaults.guidance_start),
        };
        for (name, start, schedule) in [
            ("temperature", self.temperature_start, sampling.temperature_schedule),
            ("guidance", self.guidance_start, sampling.guidance_schedule),
        ] {
            let what = format!("--{name}-start has no effect on a constant {name}");
            let hint = format!("add a schedule, such as --{name}-schedule linear");
            ensure!(start.is_none() || schedule != Schedule::Constant, usage(what, hint));
        }
        Ok(sampling)
    }
}

/// Parses a number from 0 to 100.
pub fn from_0_to_100(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=100.0).contains(&number) { Ok(number) } else { Err("must be from 0 to 100".to_owned()) }
}

/// Parses a length penalty, from 0 to 10.
pub fn length_penalty(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=10.0).contains(&number) { Ok(number) } else { Err("must be from 0 to 10".to_owned()) }
}

/// Parses a number above 0, at most 1.
pub fn probability(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if number > 0.0 && number <= 1.0 { Ok(number) } else { Err("must be above 0, at most 1".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!((from_0_to_100("0.5"), from_0_to_100("100")), (Ok(0.5), Ok(100.0)));
        assert!(["-0.1", "100.1", "NaN", "inf", "", "1,5"].iter().all(|text| from_0_to_100(text).is_err()));
        assert_eq!((probability("1"), probability("1e-3")), (Ok(1.0), Ok(1e-3)));
        assert!(["0", "1.1", "NaN", "-1", "x"].iter().all(|text| probability(text).is_err()));
    }
}
