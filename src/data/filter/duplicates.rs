//! Duplicates over all inputs: captions that occur too often, equal captions, equal and nearly equal images.
//!
//! Near images are found exactly, not approximately: cut 64 bits into d + 3 blocks; hashes that differ in at most d bits
//! agree in three of the blocks. For each choice of three blocks the hashes are sorted by them, and those with equal
//! blocks are compared.

use super::{
    feature::Feature,
    image_hash::{mirrored_colors, similar_colors},
    rule::Rule,
};
use crate::error::Result;
use rayon::prelude::*;

/// Rules that compare all rows.
#[derive(Debug, Clone, Copy)]
pub struct DuplicateRules {
    /// Maximum number of rows with the same caption; if there are more, none is kept.
    pub max_caption_repeats: Option<usize>,
    /// Keeps only the first row of each caption.
    pub unique_captions: bool,
    /// Maximum number of different bits of near images; `None` keeps all duplicates.
    pub image_distance: Option<u32>,
    /// Whether a mirrored image is a duplicate.
    pub mirrored: bool,
}

/// A caption or an image of a row: 16 bytes, so that 145 million take 2.3 GB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    hash: u64,
    colors: u32,
    row: u32,
}

impl DuplicateRules {
    /// Bytes that a row occupies while rows are compared.
    pub fn bytes(&self) -> usize {
        let captions = usize::from(self.compares_captions());
        let images = self.image_distance.map_or(0, |_| 1 + usize::from(self.mirrored));
        captions.max(images) * size_of::<Entry>()
    }

    fn compares_captions(&self) -> bool {
        self.max_caption_repeats.is_some() || self.unique_captions
    }
}

/// Calls a function with the number and the feature of each row, in order.
pub type EachRow<'a> = dyn Fn(&mut dyn FnMut(u32, &Feature)) -> Result<()> + 'a;

/// Applies the rules to rows that broke no other rule. `broken` has an item for each row. The first of several duplicates
/// is kept.
///
/// # Errors
/// The features can no longer be read.
pub fn mark(broken: &mut [Option<Rule>], rules: &DuplicateRules, each_row: &EachRow<'_>) -> Result<()> {
    mark_captions(broken, rules, each_row)?;
    match rules.image_distance {
        Some(distance) => mark_images(broken, distance, rules.mirrored, each_row),
        None => Ok(()),
    }
}

fn is_kept(broken: &[Option<Rule>], row: u32) -> bool {
    broken.get(row as usize).is_some_and(Option::is_none)
}

fn count_kept(broken: &[Option<Rule>]) -> usize {
    broken.iter().filter(|broken| broken.is_none()).count()
}

fn leave_out(broken: &mut [Option<Rule>], row: u32, rule: Rule) {
    if let Some(broken) = broken.get_mut(row as usize) {
        *broken = broken.or(Some(rule));
    }
}

fn mark_captions(broken: &mut [Option<Rule>], rules: &DuplicateRules, each_row: &EachRow<'_>) -> Result<()> {
    if !rules.compares_captions() {
        return Ok(());
    }
    let mut entries = Vec::with_capacity(count_kept(broken));
    each_row(&mut |row, feature| {
        if is_kept(broken, row) {
            entries.push(Entry { hash: feature.caption, colors: 0, row });
        }
    })?;
    entries.par_sort_unstable();
    for group in entries.chunk_by(|a, b| a.hash == b.hash) {
        if rules.max_caption_repeats.is_some_and(|max| group.len() > max) {
            group.iter().for_each(|entry| leave_out(broken, entry.row, Rule::FrequentCaption));
        } else if rules.unique_captions {
            group.iter().skip(1).for_each(|entry| leave_out(broken, entry.row, Rule::DuplicateCaption));
        }
    }
    Ok(())
}

fn mark_images(broken: &mut [Option<Rule>], distance: u32, mirrored: bool, each_row: &EachRow<'_>) -> Result<()> {
    // Exactly as many as there can be: a growing list would take up to three times as much.
    let mut entries = Vec::with_capacity(count_kept(broken) * if mirrored { 2 } else { 1 });
    each_row(&mut |row, feature| {
        if let Some(image) = feature.image.filter(|_| is_kept(broken, row)) {
            entries.push(Entry { hash: image.bits, colors: image.colors, row });
            if mirrored {
                entries.push(Entry { hash: image.mirrored, colors: mirrored_colors(image.colors), row });
            }
        }
    })?;
    // Equal hashes first: a thousand copies of one image would otherwise be compared with each other.
    entries.par_sort_unstable();
    entries.dedup_by(|later, first| {
        let equal = (later.hash, later.colors) == (first.hash, first.colors);
        if equal && later.row != first.row {
            leave_out(broken, later.row, Rule::DuplicateImage);
        }
        equal
    });
    for mask in masks(distance) {
        entries.par_sort_unstable_by_key(|entry| (entry.hash & mask, entry.row));
        let near: Vec<u32> =
            parts(&entries, mask).into_par_iter().flat_map_iter(|part| later_rows(part, mask, distance)).collect();
        near.into_iter().for_each(|row| leave_out(broken, row, Rule::DuplicateImage));
    }
    Ok(())
}

/// Splits sorted entries into parts of about equal length; entries with equal blocks stay together.
fn parts(entries: &[Entry], mask: u64) -> Vec<&[Entry]> {
    let length = entries.len() / (4 * rayon::current_num_threads()) + 1;
    let mut parts = Vec::new();
    let mut rest = entries;
    while let Some(last) = rest.get(length - 1) {
        let end = length + rest.iter().skip(length).take_while(|entry| entry.hash & mask == last.hash & mask).count();
        let (part, after) = rest.split_at(end);
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    parts
}

/// The rows of a part that are near to an earlier one with equal blocks.
fn later_rows(part: &[Entry], mask: u64, distance: u32) -> Vec<u32> {
    let is_near = |a: &Entry, b: &Entry| {
        a.row != b.row && (a.hash ^ b.hash).count_ones() <= distance && similar_colors(a.colors, b.colors)
    };
    let mut rows = Vec::new();
    for group in part.chunk_by(|a, b| a.hash & mask == b.hash & mask) {
        let later = group.iter().enumerate();
        let later = later.filter(|(at, entry)| group.iter().take(*at).any(|first| is_near(first, entry)));
        rows.extend(later.map(|(_, entry)| entry.row));
    }
    rows
}

/// The bits of each choice of three blocks.
fn masks(distance: u32) -> Vec<u64> {
    let blocks = distance + 3;
    let block = |index: u32| {
        let (start, end) = (64 * index / blocks, 64 * (index + 1) / blocks);
        (u64::MAX >> (64 - (end - start))) << start
    };
    let mut masks = Vec::new();
    for a in 0..blocks {
        for b in 0..a {
            masks.extend((0..b).map(|c| block(a) | block(b) | block(c)));
        }
    }
    masks
}
