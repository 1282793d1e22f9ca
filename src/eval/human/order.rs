//! Which outputs stand on which page: a shuffled order for each rater, keyed by (seed, rater, item), so that a rater who
//! comes back finds the same pages.

use super::kind::Kind;
use crate::random::Random;
use std::collections::BTreeMap;

/// An output by the rows of the study: its item and its own number. The system is left out, since pages must not depend on
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub item: i64,
    pub output: i64,
}

/// A page: outputs of one item, from left to right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub item: i64,
    pub outputs: Vec<i64>,
}

/// The pages of a rater in their order.
///
/// Images: a page for each item with the images of all systems. Captions and answers: a page for each output, in rounds;
/// each round has one output of each item, so that a rater sees the same image again only after all others.
pub fn pages(kind: Kind, seed: u64, rater: i64, places: &[Place]) -> Vec<Page> {
    let mut items: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    places.iter().for_each(|place| items.entry(place.item).or_default().push(place.output));
    let mut keyed: Vec<((usize, u64), Page)> = Vec::new();
    for (item, mut outputs) in items {
        shuffle(&mut outputs, &mut Random::keyed(seed, "human sides", rater as u64, item as u64));
        let mut random = Random::keyed(seed, "human pages", rater as u64, item as u64);
        match kind {
            Kind::Images => keyed.push(((0, random.bits()), Page { item, outputs })),
            Kind::Captions | Kind::Answers => {
                let page = |(round, output)| ((round, random.bits()), Page { item, outputs: vec![output] });
                keyed.extend(outputs.into_iter().enumerate().map(page));
            }
        }
    }
    keyed.sort_by_key(|(key, page)| (*key, page.item));
    keyed.into_iter().map(|(_, page)| page).collect()
}

fn shuffle(outputs: &mut [i64], random: &mut Random) {
    for last in (1..outputs.len()).rev() {
        outputs.swap(last, random.below(last as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Items 1 to `items` with the outputs 10 · item + system.
    fn places(items: i64, systems: i64) -> Vec<Place> {
        (1..=items)
            .flat_map(|item| (0..systems).map(move |system| Place { item, output: 10 * item + system }))
            .collect()
    }

    #[test]
    fn both_sides_are_as_frequent_and_orders_differ_by_rater() {
        let places = places(2000, 2);
        let (one, two) = (pages(Kind::Images, 7, 1, &places), pages(Kind::Images, 7, 2, &places));
        assert_eq!(one, pages(Kind::Images, 7, 1, &places));
        let left = |pages: &[Page]| pages.iter().filter(|page| page.outputs[0] % 10 == 0).count();
        assert!(
            (900..1100).contains(&left(&one)) && (900..1100).contains(&left(&two)),
            "{} {}",
            left(&one),
            left(&two)
        );
        let items = |pages: &[Page]| pages.iter().map(|page| page.item).collect::<Vec<_>>();
        assert!(items(&one) != items(&two) && !items(&one).is_sorted());
        let sides = |pages: &[Page]| pages.iter().map(|p| (p.item, p.outputs[0])).collect::<BTreeSet<_>>();
        assert!((800..1200).contains(&sides(&one).intersection(&sides(&two)).count()), "sides depend on the rater");
    }

    #[test]
    fn each_round_has_every_item_once() {
        let places = places(50, 3);
        let pages = pages(Kind::Answers, 1, 1, &places);
        assert_eq!(pages.len(), 150);
        for round in pages.chunks(50) {
            assert_eq!(round.iter().map(|page| page.item).collect::<BTreeSet<_>>().len(), 50);
            let first = round.iter().filter(|page| page.outputs[0] % 10 == 0).count();
            assert!((5..30).contains(&first), "{first} of one system");
        }
        let all: BTreeSet<i64> = pages.iter().flat_map(|page| page.outputs.clone()).collect();
        assert_eq!(all.len(), 150);
    }
}
