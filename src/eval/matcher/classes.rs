//! Zero-shot classification (CLIP, arXiv 2103.00020, §3.1): the class whose texts are closest to the image.

use super::{super::Rate, Samples};
use crate::{
    bounded_read,
    error::{Hint, Result, ensure, failed, usage},
    generate::Matching,
    report,
};
use candle_core::{D, Tensor};
use serde::Serialize;
use serde_json::Value;
use std::{collections::HashMap, path::Path};

/// The text of a class where no templates are given.
pub const TEMPLATE: &str = "一张{}的图片";

/// The result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Classification {
    pub classes: usize,
    pub templates: usize,
    /// The right class is the closest.
    pub top1: Rate,
    /// The right class is among the five closest.
    pub top5: Rate,
    pub chance_top1: f64,
    /// Samples left out because their label is not the name or number of a class.
    pub unlabeled: usize,
}

/// The classes and their embeddings.
pub struct Classes {
    names: Vec<String>,
    templates: usize,
    /// (classes, embedding) of length 1
    embeddings: Tensor,
}

impl Classes {
    /// Reads the names of the classes, one on each line, and the templates of their texts, and embeds the texts. The
    /// embedding of a class is the mean over the templates, normalized.
    ///
    /// # Errors
    /// A file cannot be read, there are fewer than two classes, a class is named twice, or a template has no `{}`.
    pub fn open(matching: &Matching, classes: &Path, templates: Option<&Path>) -> Result<Self> {
        let names = lines(classes, "--classes")?;
        let few = format!("{} has fewer than two classes", classes.display());
        ensure!(names.len() > 1, usage(few, "write one class on each line"));
        let mut sorted = names.clone();
        sorted.sort();
        if let Some(pair) = sorted.windows(2).find(|pair| pair.first() == pair.last()) {
            let name = pair.first().map_or("", String::as_str);
            return Err(usage(format_args!("{} names `{name}` twice", classes.display()), "remove one of them"));
        }
        let templates = templates.map_or(Ok(vec![TEMPLATE.to_owned()]), |path| lines(path, "--templates"))?;
        for template in &templates {
            let hint = format!("a template has the name of the class at `{{}}`, as in {TEMPLATE}");
            ensure!(template.contains("{}"), usage(format_args!("the template `{template}` has no `{{}}`"), hint));
        }
        let texts = |name: &String| templates.iter().map(|text| text.replace("{}", name)).collect::<Vec<_>>();
        let texts: Vec<String> = names.iter().flat_map(texts).collect();
        let embeddings = matching.embed_texts(&texts)?.reshape((names.len(), templates.len(), ()))?.mean(1)?;
        let length = embeddings.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(1e-12)?;
        Ok(Self { names, templates: templates.len(), embeddings: embeddings.broadcast_div(&length)? })
    }

    /// Classifies the samples whose label is the name of a class or its number, counted from 0.
    ///
    /// # Errors
    /// No sample has such a label.
    pub fn classify(&self, samples: &Samples) -> Result<Classification> {
        let numbers: HashMap<&str, usize> = self.names.iter().enumerate().map(|(i, name)| (name.as_str(), i)).collect();
        let number_of = |label: &Option<Value>| match label.as_ref()? {
            Value::String(name) => numbers.get(name.trim()).copied(),
            number => usize::try_from(number.as_u64()?).ok().filter(|number| *number < self.names.len()),
        };
        let cosines = Matching::cosines(&samples.images, &self.embeddings)?.to_vec2::<f32>()?;
        let mut ranks = Vec::new();
        for (label, cosines) in samples.labels.iter().zip(&cosines) {
            let Some(own) = number_of(label) else { continue };
            let best = cosines.get(own).copied().unwrap_or(f32::NEG_INFINITY);
            ranks.push(cosines.iter().filter(|cosine| **cosine >= best).count());
        }
        let unlabeled = samples.labels.len() - ranks.len();
        let hint =
            "name the JSON field of the class with --label, or put the images into folders with the names of classes";
        ensure!(!ranks.is_empty(), failed("no sample has the name or number of a class as its label", hint));
        if unlabeled > 0 {
            report::warn(format_args!("{unlabeled} samples left out: their label is not a class"));
        }
        let among = |first: usize| Rate::new(ranks.iter().filter(|rank| **rank <= first).count(), ranks.len());
        Ok(Classification {
            classes: self.names.len(),
            templates: self.templates,
            top1: among(1),
            top5: among(5),
            chance_top1: 1.0 / self.names.len() as f64,
            unlabeled,
        })
    }
}

/// The lines of a text file that are not empty.
fn lines(path: &Path, option: &str) -> Result<Vec<String>> {
    let hint = format!("{option} takes a text file in UTF-8");
    let text =
        bounded_read::read_text(path, bounded_read::TEXT).hint(format_args!("cannot read {}", path.display()), hint)?;
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines.map(str::to_owned).collect();
    ensure!(!lines.is_empty(), usage(format_args!("{} has no lines", path.display()), "write one on each line"));
    Ok(lines)
}
