//! Translates captions by a program or a service of the user's choice (ERNIE-ViLG, §3.2.1: the English captions of CC and
//! CC12M are translated into Chinese).
//!
//! Reading order: `protocol` is what is exchanged, `process` and `service` exchange it, [`Translator`] retries, `cache` keeps
//! what is translated, `write` replaces captions, [`Translation`] runs over the inputs, [`Report`] counts.

mod cache;
mod process;
mod protocol;
mod report;
mod run;
mod service;
mod translator;
mod write;

pub use report::Report;
pub use run::{Outcome, Translation};
pub use translator::{Address, Translator};

/// What is translated, and what happens to it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Column of a table that holds the caption.
    pub caption_column: String,
    /// New column or JSON field for the caption before its translation.
    pub original_column: String,
    /// Whether a row whose caption cannot be translated keeps it; otherwise the row is left out.
    pub keep_untranslated: bool,
    /// Texts sent to a translator at once.
    pub batch: usize,
}

impl Settings {
    /// A text that differs if any row could get another result.
    fn digest(&self) -> String {
        format!("{:?}", (&self.caption_column, &self.original_column, self.keep_untranslated))
    }
}
