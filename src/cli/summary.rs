//! What a configuration amounts to: parameters by part, sequence layout, the layers' attention.

use crate::{
    config::Config,
    model::Modality,
    nn::pattern::Pattern,
    report,
    train::{
        sizes::{Part, Sizes},
        tasks::Sequences,
    },
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
    parameters: Vec<Part>,
    total: u64,
    sequences: Vec<Sequence>,
    /// What each layer's image queries see of the image.
    layers: Vec<&'static str>,
}

/// A kind of sequence that the model learns.
#[derive(Serialize)]
struct Sequence {
    name: &'static str,
    source: Vec<(&'static str, usize)>,
    target_inputs: Vec<(&'static str, usize)>,
    positions: usize,
    predicted: usize,
}

impl Sequence {
    fn new(Sequences { name, layout, .. }: &Sequences) -> Self {
        let what = |modality| match modality {
            Modality::Text => "text",
            Modality::Image => "codes",
        };
        let target = layout.target();
        Self {
            name,
            source: layout.sources().iter().map(|span| (what(span.modality), span.length)).collect(),
            target_inputs: match target.modality {
                Modality::Text => vec![("text but its last position", target.positions())],
                Modality::Image => {
                    let codes = if target.reads_last { "codes" } else { "codes but the last" };
                    vec![("start of image", 1), (codes, target.positions() - 1)]
                }
            },
            positions: layout.positions(),
            predicted: layout.predicted(),
        }
    }

    fn text(&self) -> String {
        let list = |parts: &[(&str, usize)]| {
            parts.iter().map(|(part, n)| format!("{n} {part}")).collect::<Vec<_>>().join(" + ")
        };
        let (source, inputs) = (list(&self.source), list(&self.target_inputs));
        format!("{}: {source} | {inputs} = {} positions, {} predicted", self.name, self.positions, self.predicted)
    }
}

impl Summary {
    pub fn new(config: &Config, sizes: &Sizes) -> Self {
        let (tokenizer, grid) = (&sizes.inputs.tokenizer, sizes.inputs.tokenizer.grid());
        let (vocabulary, parameters) = (sizes.inputs.vocabulary, sizes.parts());
        let vocabulary_from = if sizes.inputs.vocabulary_found { "counted" } else { "assumed: the file is not there" };
        let sequences: Vec<Sequence> = sizes.spec.sequences(config, &sizes.inputs).iter().map(Sequence::new).collect();
        let layers = if sequences.is_empty() { 0 } else { config.model.layers };
        Self {
            vocabulary,
            vocabulary_from,
            codebook: tokenizer.codebook_size,
            grid,
            total: parameters.iter().map(|(_, count)| count).sum(),
            parameters,
            sequences,
            layers: (1..=layers).map(|layer| pattern_name(Pattern::of_layer(layer, &config.model))).collect(),
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
        self.sequences.iter().for_each(|sequence| report::result(format_args!("  {}", sequence.text())));
        report::result("\nlayers:");
        for kind in ["row", "column", "conv", "dense"] {
            let numbers: Vec<String> =
                (1..).zip(&self.layers).filter(|(_, k)| **k == kind).map(|(i, _): (usize, _)| i.to_string()).collect();
            if !numbers.is_empty() {
                report::result(format_args!("  {kind} ({}): {}", numbers.len(), numbers.join(" ")));
            }
        }
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
