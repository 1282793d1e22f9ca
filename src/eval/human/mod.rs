//! Evaluation by people (paper §4.2.3, §4.3, §4.4): studies as files, their inputs, the order of pages, and the report.
//!
//! Raters see what a study file contains, without names of systems and in an order of their own; `crate::serve` has the
//! pages.

pub mod agreement;
mod create;
mod database;
pub mod draft;
pub mod input;
pub mod kind;
pub mod order;
pub mod prompts;
pub mod statistics;
pub mod study;
pub mod summary;
#[cfg(test)]
mod tests;

pub use create::create;
