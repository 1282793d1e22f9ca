//! Training a WordPiece vocabulary.

use super::wordpiece::{CLS, MASK, PAD, SEP, UNK, words};
use crate::error::{Result, anyhow, ensure};
use std::collections::BTreeMap;
use tokenizers::{
    AddedToken, Model, Trainer,
    models::wordpiece::{WordPiece as Pieces, WordPieceTrainerBuilder},
};

/// Trains a vocabulary with at most `size` tokens: special tokens, then characters by frequency, then word pieces of
/// non-Chinese words. Returns the text of a `vocab.txt`. The same captions give the same vocabulary.
///
/// # Errors
/// The trainer fails.
pub fn train<'a>(captions: impl IntoIterator<Item = &'a str>, size: usize) -> Result<String> {
    let special = [PAD, UNK, CLS, SEP, MASK];
    ensure!(size > special.len(), "a vocabulary of {size} has no workspace beside {} special tokens", special.len());
    let mut counts = BTreeMap::<String, usize>::new();
    for caption in captions {
        for word in words(caption)? {
            *counts.entry(word).or_default() += 1;
        }
    }
    // The trainer numbers characters in the order of a hash map and breaks ties by number. Passed as special tokens,
    // with no space for other characters, they keep the order given here.
    let mut tokens: Vec<String> = special.map(str::to_owned).into();
    tokens.extend(alphabet(&counts, size - special.len()));
    let mut trainer = WordPieceTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(size)
        .min_frequency(2)
        .limit_alphabet(0)
        .special_tokens(tokens.iter().map(|token| AddedToken::from(token.as_str(), true)).collect())
        .build();
    let occurrences = counts.iter().flat_map(|(word, &count)| std::iter::repeat_n(word, count));
    trainer.feed(occurrences, |word| Ok(vec![word.to_owned()])).map_err(|e| anyhow!(e))?;
    let mut pieces = Pieces::default();
    trainer.train(&mut pieces).map_err(|e| anyhow!(e))?;
    let mut vocab: Vec<(String, u32)> = pieces.get_vocab().into_iter().collect();
    vocab.sort_by_key(|&(_, id)| id);
    Ok(vocab.into_iter().flat_map(|(token, _)| [token, "\n".into()]).collect())
}

/// The most frequent characters, each as the start and, if it occurs there, as a continuation (`##c`) of a word. The
/// trainer only accepts a continuation whose start it knows.
fn alphabet(words: &BTreeMap<String, usize>, size: usize) -> Vec<String> {
    let mut counts = BTreeMap::<char, (usize, bool)>::new();
    for (word, count) in words {
        for (i, c) in word.chars().enumerate() {
            let (total, continues) = counts.entry(c).or_default();
            *total += count;
            *continues |= i > 0;
        }
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|&(_, (total, _))| std::cmp::Reverse(total));
    let mut tokens = Vec::new();
    for (c, (_, continues)) in counts {
        if tokens.len() + 1 + usize::from(continues) > size {
            break;
        }
        tokens.push(c.to_string());
        tokens.extend(continues.then(|| format!("##{c}")));
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::WordPiece;

    const CAPTIONS: [&str; 5] = ["一轮弯月，扁平风格", "弯月", "3D 风格的 banana", "a banana cabana", "黑白风格"];

    #[test]
    fn a_trained_vocabulary_encodes_its_captions() {
        let wordpiece = WordPiece::parse(&train(CAPTIONS, 100).unwrap()).unwrap();
        assert!(wordpiece.vocab_size() <= 100);
        for caption in CAPTIONS {
            let ids = wordpiece.encode(caption, 64).unwrap();
            assert!(!ids.contains(&wordpiece.unk()), "{caption}");
        }
        let banana = wordpiece.encode("banana", 64).unwrap();
        assert_eq!(banana.len(), 3, "learned as one token");
    }

    #[test]
    fn the_most_frequent_characters_are_kept_and_runs_are_reproducible() {
        let small = train(CAPTIONS, 16).unwrap();
        assert!(small.lines().count() <= 16);
        assert!(small.contains("风") && !small.contains("轮"), "{small}");
        for size in [16, 30, 60, 100] {
            assert!((0..3).all(|_| train(CAPTIONS, size).unwrap() == train(CAPTIONS, size).unwrap()), "{size}");
        }
        assert!(train(CAPTIONS, 5).is_err());
        assert_eq!(train([], 9).unwrap().lines().count(), 5);
    }
}
