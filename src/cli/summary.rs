//! What a configuration amounts to: parameters by part, sequence layout, the layers' attention.

use crate::{
    config::{Config, Task},
    nn::pattern::Pattern,
    report,
    train::sizes::Sizes,
};
use serde::Serialize;

#[derive(Serialize)]
pub struct Summary {
    /// Entries of the text vocabulary.
    vocabulary: usize,
    /// Whether they were counted in the file or are assumed.
    vocabulary_from: &'static str,
    codebook: usize,
    /// Height and width of the image in codes.
    grid: (usize, usize),
    parameters: Vec<(&'static str, u64)>,
    total: u64,
    /// Positions of the two directions as (part, positions); empty for an image tokenizer.
    text_to_image: Vec<(&'static str, usize)>,
    image_to_text: Vec<(&'static str, usize)>,
    /// What each layer's image queries see of the image.
    layers: Vec<&'static str>,
}

impl Summary {
    pub fn new(config: &Config, sizes: &Sizes) -> Self {
        let (tokenizer, grid) = (&sizes.tokenizer, sizes.tokenizer.grid());
        let (vocabulary, parameters) = (sizes.vocabulary, sizes.parts(config));
        let vocabulary_from = if sizes.vocabulary_found { "counted" } else { "assumed: the file is not there" };
        let (m, n) = (config.text.max_tokens, grid.0 * grid.1);
        let generator = config.task == Task::Generator;
        let only = |parts: Vec<(&'static str, usize)>| if generator { parts } else { Vec::new() };
        let layers = (1..=config.model.layers).filter(|_| generator);
        Self {
            vocabulary,
            vocabulary_from,
            codebook: tokenizer.codebook_size,
            grid,
            total: parameters.iter().map(|(_, count)| count).sum(),
            parameters,
            text_to_image: only(vec![("text", m), ("start of image", 1), ("codes but the last", n - 1)]),
            image_to_text: only(vec![("codes", n), ("text but its last position", m - 1)]),
            layers: layers.map(|layer| pattern_name(Pattern::of_layer(layer, &config.model))).collect(),
        }
    }

    /// Prints the summary as text.
    pub fn print(&self) {
        report::result("");
        let (height, width) = self.grid;
        let mut rows: Vec<Vec<String>> = self
            .parameters
            .iter()
            .map(|(part, count)| vec![format!("  {part}"), format!("{:>14}", grouped(*count))])
            .collect();
        rows.push(vec!["  total".into(), format!("{:>14} ({})", grouped(self.total), rounded(self.total))]);
        report::result(format_args!("parameters: codebook {}, grid {height} x {width}", self.codebook));
        report::table(&[], &rows);
        if self.layers.is_empty() {
            return;
        }
        report::result(format_args!("  with a vocabulary of {} ({})", self.vocabulary, self.vocabulary_from));
        report::result(
            "\nsequence: source | target inputs (source sees all of itself, a target the source and what is left of it)",
        );
        report::result(format_args!("  text to image: {}", self.layout(&self.text_to_image, height * width)));
        report::result(format_args!(
            "  image to text: {}",
            self.layout(&self.image_to_text, self.text_to_image[0].1 - 1)
        ));
        report::result("\nlayers:");
        for kind in ["row", "column", "conv", "dense"] {
            let numbers: Vec<String> =
                (1..).zip(&self.layers).filter(|(_, k)| **k == kind).map(|(i, _): (usize, _)| i.to_string()).collect();
            if !numbers.is_empty() {
                report::result(format_args!("  {kind} ({}): {}", numbers.len(), numbers.join(" ")));
            }
        }
    }

    fn layout(&self, parts: &[(&'static str, usize)], outputs: usize) -> String {
        let total: usize = parts.iter().map(|(_, n)| n).sum();
        let parts: Vec<String> = parts.iter().map(|(part, n)| format!("{n} {part}")).collect();
        format!("{} | {} = {total} positions, {outputs} predicted", parts[0], parts[1..].join(" + "))
    }
}

fn pattern_name(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Dense => "dense",
        Pattern::Row(_) => "row",
        Pattern::Column => "column",
        Pattern::Conv { .. } => "conv",
    }
}

/// 9906999944 as `9.91 billion`.
pub fn rounded(number: u64) -> String {
    match number as f64 {
        n if n >= 1e9 => format!("{:.2} billion", n / 1e9),
        n => format!("{:.2} million", n / 1e6),
    }
}

/// 1234567 as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}
