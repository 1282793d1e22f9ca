//! Which rank owns which elements: a pure function of the parameters' names and sizes and the number of ranks.
//!
//! A parameter group (FSDP's unit) is the parameters of one segment of the engine's chain. They are communicated together:
//! concatenated and cut into equal parts, so that every rank has the same work. A parameter that cannot be cut (Muon
//! needs whole matrices) goes to the rank that has the fewest such elements so far.

use crate::dist;
use std::ops::Range;

/// A parameter as the layout sees it.
#[derive(Debug, Clone)]
pub struct Entry {
    pub name: String,
    /// Elements.
    pub len: usize,
    /// Whether one rank must own all of it.
    pub whole: bool,
}

/// Elements of a parameter in row-major order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub name: String,
    pub range: Range<usize>,
}

/// The pieces of each parameter group by rank: `layout(..)[group][rank]`. No piece is empty.
pub fn layout(parameter_groups: &[Vec<Entry>], world_size: usize) -> Vec<Vec<Vec<Piece>>> {
    let mut loads = vec![0; world_size];
    parameter_groups.iter().map(|unit| share_out(unit, &mut loads)).collect()
}

fn share_out(unit: &[Entry], loads: &mut [usize]) -> Vec<Vec<Piece>> {
    let world_size = loads.len();
    let mut pieces = vec![Vec::new(); world_size];
    let (whole, cut): (Vec<&Entry>, Vec<&Entry>) =
        unit.iter().filter(|entry| entry.len > 0).partition(|entry| entry.whole);
    for entry in whole {
        let Some((rank, load)) = loads.iter_mut().enumerate().min_by_key(|(_, load)| **load) else { continue };
        *load += entry.len;
        pieces[rank].push(Piece { name: entry.name.clone(), range: 0..entry.len });
    }
    let len = cut.iter().map(|entry| entry.len).sum();
    for (rank, pieces) in pieces.iter_mut().enumerate() {
        let mine = dist::part(len, rank, world_size);
        let mut start = 0;
        for entry in &cut {
            let of_entry = |at: usize| at.clamp(start, start + entry.len) - start;
            let range = of_entry(mine.start)..of_entry(mine.end);
            start += entry.len;
            if !range.is_empty() {
                pieces.push(Piece { name: entry.name.clone(), range });
            }
        }
    }
    pieces
}

/// The number of elements in these pieces.
pub fn length<'a>(pieces: impl IntoIterator<Item = &'a Piece>) -> usize {
    pieces.into_iter().map(|piece| piece.range.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_element_has_one_owner(
            parameter_groups in proptest::collection::vec(proptest::collection::vec((0usize..40, any::<bool>()), 0..6), 1..5),
            world_size in 1usize..9,
        ) {
            let entry = |u: usize, i: usize, (len, whole)| Entry { name: format!("{u}.{i}"), len, whole };
            let entries = |(u, unit): (usize, &Vec<(usize, bool)>)| {
                unit.iter().enumerate().map(|(i, e)| entry(u, i, *e)).collect::<Vec<_>>()
            };
            let parameter_groups: Vec<Vec<Entry>> = parameter_groups.iter().enumerate().map(entries).collect();
            for (unit, ranks) in parameter_groups.iter().zip(layout(&parameter_groups, world_size)) {
                prop_assert_eq!(ranks.len(), world_size);
                for entry in unit {
                    let mut pieces: Vec<&Piece> = ranks.iter().flatten().filter(|p| p.name == entry.name).collect();
                    pieces.sort_by_key(|piece| piece.range.start);
                    let mut end = 0;
                    for piece in &pieces {
                        prop_assert!(piece.range.start == end && !piece.range.is_empty());
                        end = piece.range.end;
                    }
                    prop_assert_eq!(end, entry.len);
                    prop_assert!(!entry.whole || pieces.len() <= 1);
                }
                let cut = |r: &Vec<Piece>| -> usize {
                    let divisible = r.iter().filter(|p| unit.iter().any(|e| e.name == p.name && !e.whole));
                    divisible.map(|p| p.range.len()).sum()
                };
                let (least, most) = (ranks.iter().map(cut).min().unwrap(), ranks.iter().map(cut).max().unwrap());
                prop_assert!(most - least <= 1, "{least} {most}");
            }
        }
    }

    #[test]
    fn whole_matrices_are_spread_over_the_ranks() {
        let matrix = |name: &str, len| Entry { name: name.into(), len, whole: true };
        let block =
            |i: usize| vec![matrix(&format!("{i}.a"), 3), matrix(&format!("{i}.b"), 1), matrix(&format!("{i}.c"), 4)];
        let parameter_groups: Vec<_> = (0..8).map(block).collect();
        let loads: Vec<usize> = (0..4)
            .map(|rank| {
                layout(&parameter_groups, 4).iter().flat_map(|unit| &unit[rank]).map(|piece| piece.range.len()).sum()
            })
            .collect();
        assert!(loads.iter().all(|load| (14..=18).contains(load)), "{loads:?}");
    }
}
