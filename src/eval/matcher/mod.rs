//! Evaluation of a matcher: retrieval in both directions, calibration of its scores, and zero-shot classification.
//!
//! Reading order: [`Samples`] embeds a data set once; [`retrieval`], [`calibration`] and [`classes`] measure.

pub mod calibration;
pub mod classes;
pub mod pairs;
pub mod reliability;
pub mod retrieval;
mod samples;

pub use samples::Samples;
