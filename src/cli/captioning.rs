//! Options shared by the commands that measure captions and answers.

use super::sampling::length_penalty;
use crate::generate::{Decoding, Sampling};

/// How captions and answers are decoded.
#[derive(clap::Args)]
pub struct CaptioningOptions {
    /// Use beam search of width B [default: greedy decoding]
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub beam: Option<u32>,
    /// Length penalty A of beam search, from 0 to 10: captions are ranked by ln p(caption) / tokens^A
    #[arg(long, value_name = "A", default_value_t = 1.0, value_parser = length_penalty, requires = "beam",
        allow_negative_numbers = true)]
    length_penalty: f64,
}

impl CaptioningOptions {
    pub fn decoding(&self) -> Decoding {
        match self.beam {
            Some(width) => Decoding::Beam { width: width as usize, length_penalty: self.length_penalty },
            None => Decoding::Sample { sampling: Sampling::GREEDY, seed: 0 },
        }
    }

    /// The length penalty, where it matters.
    pub fn length_penalty(&self) -> Option<f64> {
        self.beam.map(|_| self.length_penalty)
    }
}
