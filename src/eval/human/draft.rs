//! What a new study will contain.

use super::kind::Kind;
use crate::{
    error::{Result, ensure, failed, usage},
    eval::choose,
};
use std::{collections::BTreeSet, path::PathBuf};

/// Maximum number of items of a study.
pub const MAX_ITEMS: usize = 20_000;
/// Maximum number of systems of a study.
pub const MAX_SYSTEMS: usize = 8;
/// Maximum length of a prompt, caption, question, answer or name in characters.
const MAX_TEXT: usize = 2000;

/// A study that is not written yet.
#[derive(Debug, Clone)]
pub struct Draft {
    pub kind: Kind,
    /// Shown to raters; must not name the systems.
    pub title: String,
    pub seed: u64,
    pub raters: u32,
    pub systems: Vec<System>,
    pub items: Vec<Item>,
}

/// A model, or people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct System {
    pub name: String,
    pub is_human: bool,
}

/// A prompt, an image to be captioned, or a question about an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The item's name in the report, unique in the study.
    pub key: String,
    /// Empty if the prompts have none.
    pub aspect: String,
    /// The prompt or question; empty for captions.
    pub prompt: String,
    /// The image that a text belongs to.
    pub image: Option<PathBuf>,
    /// One for each system, in the order of the systems.
    pub outputs: Vec<Output>,
}

/// What a system made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    Text(String),
    Image(PathBuf),
}

impl Draft {
    /// Keeps `samples` items chosen by the seed, in their order; 0: all.
    pub fn choose(&mut self, samples: usize) {
        if samples > 0 {
            let mut chosen = choose(samples, self.items.len(), self.seed, "human samples", 0);
            chosen.sort_unstable();
            self.items = chosen.into_iter().filter_map(|index| self.items.get(index).cloned()).collect();
        }
    }

    /// Checks names and sizes.
    ///
    /// # Errors
    /// There are no items or too many, names occur twice, an item lacks the output of a system, or a text is too long.
    pub fn check(&self) -> Result<()> {
        let (items, systems) = (self.items.len(), self.systems.len());
        ensure!(items > 0, failed("there is nothing to rate", "name files with prompts, captions or answers in them"));
        let hint = "choose some of them with --samples";
        ensure!(items <= MAX_ITEMS, usage(format_args!("{items} items: a study has at most {MAX_ITEMS}"), hint));
        let message = format!("{systems} systems: a study has at most {MAX_SYSTEMS}");
        ensure!(systems <= MAX_SYSTEMS, usage(message, "make several studies"));
        let mut names = BTreeSet::new();
        for System { name, .. } in &self.systems {
            let message = format!("two systems are named `{name}`");
            ensure!(names.insert(name), usage(message, "give each its own name: NAME=PATH"));
        }
        let mut keys = BTreeSet::new();
        for item in &self.items {
            let hint = "each image or question may occur once in a file";
            ensure!(keys.insert(&item.key), failed(format_args!("`{}` occurs twice", item.key), hint));
            ensure!(item.outputs.len() == systems, "`{}` lacks the output of a system", item.key);
        }
        self.texts().try_for_each(check_text)
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        let of_items = self.items.iter().flat_map(|item| [item.key.as_str(), &item.aspect, &item.prompt]);
        let outputs = self.items.iter().flat_map(|item| &item.outputs).filter_map(|output| match output {
            Output::Text(text) => Some(text.as_str()),
            Output::Image(_) => None,
        });
        let names = self.systems.iter().map(|system| system.name.as_str());
        of_items.chain(outputs).chain(names).chain([self.title.as_str()])
    }
}

fn check_text(text: &str) -> Result<()> {
    let start: String = text.chars().take(20).collect();
    let message = format!("`{start}…` is longer than {MAX_TEXT} characters");
    ensure!(text.chars().nth(MAX_TEXT).is_none(), failed(message, "raters cannot read that much on a page"));
    Ok(())
}
