//! METEOR's alignment of two texts: each token is linked with at most one equal token; most links, then fewest chunks, win.
//!
//! METEOR searches with a beam of 40, so that its alignment of texts with many repeated tokens depends on the order of its
//! search. This is the same search, step for step.

use std::cmp::Reverse;

/// Number of partial alignments that are continued.
const BEAM: usize = 40;

/// A partial alignment.
#[derive(Clone)]
struct Path {
    /// The caption's token that is linked with each token of the reference.
    links: Vec<Option<usize>>,
    /// Whether each token of the caption has a link.
    used: Vec<bool>,
    matches: usize,
    chunks: usize,
    /// The caption's token after the last link, while a chunk is open.
    next: Option<usize>,
    distance: usize,
}

/// The caption's token that is linked with each token of the reference.
pub fn align(caption: &[char], reference: &[char]) -> Vec<Option<usize>> {
    let equal = |token: &char| (0..caption.len()).filter(|&i| caption[i] == *token).collect();
    let candidates: Vec<Vec<usize>> = reference.iter().map(equal).collect();
    let start = start(&candidates, caption.len());
    let fixed = start.links.clone();
    let mut paths = vec![start];
    for (at, candidates) in candidates.iter().enumerate() {
        let mut next = Vec::new();
        for path in best(paths) {
            match fixed[at] {
                Some(token) => next.push(path.fixed(at, token)),
                None => path.branch(at, candidates, &mut next),
            }
        }
        paths = next;
    }
    let closed = best(paths).into_iter().map(|mut path| {
        path.close();
        path
    });
    best(closed.collect()).into_iter().next().map(|path| path.links).unwrap_or_default()
}

/// Tokens that occur once in both texts are linked in every alignment.
fn start(candidates: &[Vec<usize>], length: usize) -> Path {
    let mut count = vec![0; length];
    candidates.iter().flatten().for_each(|&token| count[token] += 1);
    let only = |candidates: &Vec<usize>| match candidates[..] {
        [token] if count[token] == 1 => Some(token),
        _ => None,
    };
    let links: Vec<Option<usize>> = candidates.iter().map(only).collect();
    let mut used = vec![false; length];
    links.iter().flatten().for_each(|&token| used[token] = true);
    Path { links, used, matches: 0, chunks: 0, next: None, distance: 0 }
}

/// The best paths, best first; those that are as good stay in their order.
fn best(mut paths: Vec<Path>) -> Vec<Path> {
    paths.sort_by_key(|path| (Reverse(path.matches), path.chunks, path.distance));
    paths.truncate(BEAM);
    paths
}

impl Path {
    fn close(&mut self) {
        if self.next.take().is_some() {
            self.chunks += 1;
        }
    }

    fn link(&mut self, token: usize) {
        self.matches += 1;
        if self.next.is_some_and(|next| next != token) {
            self.chunks += 1;
        }
        self.next = Some(token + 1);
    }

    fn fixed(mut self, at: usize, token: usize) -> Self {
        self.link(token);
        self.distance += at.abs_diff(token);
        self
    }

    /// Adds a path for each free candidate, then the one that leaves the token without a link.
    fn branch(mut self, at: usize, candidates: &[usize], next: &mut Vec<Self>) {
        for &token in candidates {
            if self.used[token] {
                continue;
            }
            let mut linked = self.clone();
            linked.used[token] = true;
            linked.links[at] = Some(token);
            linked.link(token);
            next.push(linked);
            // METEOR adds the distance to the path that goes on without the link, and ties depend on it.
            self.distance += at.abs_diff(token);
        }
        self.close();
        next.push(self);
    }
}

#[cfg(test)]
mod tests {
    use super::align;

    #[test]
    fn most_links_then_fewest_chunks() {
        let links = |caption: &str, reference: &str| {
            let [caption, reference] = [caption, reference].map(|text| text.chars().collect::<Vec<_>>());
            align(&caption, &reference)
        };
        assert_eq!(links("红花绿草", "绿草红花"), [Some(2), Some(3), Some(0), Some(1)]);
        assert_eq!(links("的猫的狗", "的狗"), [Some(2), Some(3)], "one chunk instead of two");
        assert_eq!(links("猫", "猫猫").iter().flatten().count(), 1, "a token has one link");
        assert_eq!((links("", "猫"), links("猫", "")), (vec![None], vec![]));
    }
}
