//! WordPiece over a BERT vocabulary: cleaned, lower-cased, each Chinese character a separate word.

use super::normalize::normalize;
use crate::{
    bounded_read,
    config::Normalization,
    error::{Context, Hint, Result, anyhow, ensure},
};
use std::{collections::HashSet, path::Path};
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    models::wordpiece::WordPiece as Pieces, normalizers::BertNormalizer, pre_tokenizers::bert::BertPreTokenizer,
};

pub(super) const PAD: &str = "[PAD]";
pub(super) const UNK: &str = "[UNK]";
pub(super) const CLS: &str = "[CLS]";
pub(super) const SEP: &str = "[SEP]";
pub(super) const MASK: &str = "[MASK]";

/// Number of characters read per requested token. Words longer than 100 characters become `[UNK]` anyway.
const CHARACTERS_A_TOKEN: usize = 128;

/// A WordPiece tokenizer with its vocabulary.
#[derive(Debug, Clone)]
pub struct WordPiece {
    pieces: Pieces,
    /// Tokens by id.
    tokens: Vec<String>,
    cls: u32,
    sep: u32,
    pad: u32,
    unk: u32,
    normalization: Normalization,
}

impl WordPiece {
    /// Reads a `vocab.txt` with one token per line; the id of a token is its line number, counted from 0.
    ///
    /// # Errors
    /// The file cannot be read, or its content is not a vocabulary.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let hint =
            "a WordPiece vocabulary has one token per line, in UTF-8, and contains [PAD], [UNK], [CLS] and [SEP]";
        // The error of a failed read already contains the path.
        let text = bounded_read::read_text(path, bounded_read::VOCABULARY).hint("cannot use the vocabulary", hint)?;
        Self::parse(&text).hint(format!("cannot use the vocabulary `{}`", path.display()), hint)
    }

    /// Parses the text of a `vocab.txt`. A byte order mark at its start is skipped.
    ///
    /// # Errors
    /// A line is empty or repeats a token, or one of `[PAD]`, `[UNK]`, `[CLS]` and `[SEP]` is missing.
    pub fn parse(vocab: &str) -> Result<Self> {
        // A byte order mark alone on its line is a token.
        let marked = vocab.strip_prefix('\u{feff}').filter(|rest| !rest.starts_with(['\r', '\n']));
        let vocab = marked.unwrap_or(vocab);
        // Not trimmed: the Chinese BERT vocabulary contains a line separator (U+2028) as a token.
        let tokens: Vec<String> = vocab.lines().map(str::to_owned).collect();
        let mut seen = HashSet::new();
        if let Some(line) = tokens.iter().position(|token| token.is_empty() || !seen.insert(token.as_str())) {
            return Err(anyhow!("line {} is empty or repeats a token", line + 1));
        }
        let id = |token: &str| {
            let found = tokens.iter().position(|t| t == token);
            found.map(|id| id as u32).with_context(|| format!("token `{token}` is missing"))
        };
        let (pad, unk, cls, sep) = (id(PAD)?, id(UNK)?, id(CLS)?, id(SEP)?);
        let vocab = Pieces::read_bytes(vocab.as_bytes()).map_err(|e| anyhow!(e))?;
        let pieces = Pieces::builder().vocab(vocab).build().map_err(|e| anyhow!(e))?;
        Ok(Self { pieces, tokens, cls, sep, pad, unk, normalization: Normalization::None })
    }

    /// The same tokenizer, which converts every text first (`text.normalize`).
    pub fn with_normalization(self, normalization: Normalization) -> Self {
        Self { normalization, ..self }
    }

    /// `[CLS]`, tokens, `[SEP]`, truncated to `max_tokens` (at least 2) in all. An empty text is `[CLS] [SEP]`.
    ///
    /// Of a very long text only the first 128 characters per token are read.
    pub fn encode(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>> {
        let (mut ids, _) = self.pieces_of(text, max_tokens)?;
        ids.truncate(max_tokens - 1);
        ids.push(self.sep);
        Ok(ids)
    }

    /// Encodes a text that the model learns to predict. A truncated text has no `[SEP]`, because it does not end there;
    /// its last token then has no successor.
    pub fn encode_target(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>> {
        let (mut ids, complete) = self.pieces_of(text, max_tokens)?;
        ids.extend(complete.then_some(self.sep));
        ids.truncate(max_tokens);
        Ok(ids)
    }

    /// `[CLS]` and at least the first `max_tokens - 1` tokens of a text, and whether these are all its tokens.
    fn pieces_of(&self, text: &str, max_tokens: usize) -> Result<(Vec<u32>, bool)> {
        ensure!(max_tokens >= 2, "{max_tokens} tokens are too few for [CLS] and [SEP]");
        let end =
            text.char_indices().nth(max_tokens.saturating_mul(CHARACTERS_A_TOKEN)).map_or(text.len(), |(end, _)| end);
        let mut ids = vec![self.cls];
        for word in words(&normalize(&text[..end], self.normalization)?)? {
            if ids.len() >= max_tokens {
                return Ok((ids, false));
            }
            ids.extend(self.pieces.tokenize(&word).map_err(|e| anyhow!(e))?.iter().map(|token| token.id));
        }
        Ok((ids, end == text.len()))
    }

    /// Decodes tokens to readable text: word pieces are joined, spaces only separate non-Chinese words, special tokens
    /// are dropped.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut text = String::new();
        for &id in ids {
            let Some(token) = self.tokens.get(id as usize) else { continue };
            if [PAD, UNK, CLS, SEP, MASK].contains(&token.as_str()) {
                continue;
            }
            match token.strip_prefix("##") {
                Some(rest) if !rest.is_empty() => text.push_str(rest),
                _ => {
                    if text.chars().last().is_some_and(spaced) && token.starts_with(spaced) {
                        text.push(' ');
                    }
                    text.push_str(token);
                }
            }
        }
        text
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The vocabulary as the text of a `vocab.txt`.
    pub fn vocab_text(&self) -> String {
        self.tokens.iter().flat_map(|token| [token.as_str(), "\n"]).collect()
    }

    /// `[CLS]`, the first token of every text.
    pub fn cls(&self) -> u32 {
        self.cls
    }

    /// `[SEP]`, the last token of every text.
    pub fn sep(&self) -> u32 {
        self.sep
    }

    /// `[PAD]`.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// `[UNK]`.
    pub fn unk(&self) -> u32 {
        self.unk
    }
}

/// The words of a text after BERT's cleaning: split at spaces and punctuation and around each Chinese character.
pub(super) fn words(text: &str) -> Result<Vec<String>> {
    let mut text = NormalizedString::from(text);
    BertNormalizer::default().normalize(&mut text).map_err(|e| anyhow!(e))?;
    let mut split = PreTokenizedString::from(text);
    BertPreTokenizer.pre_tokenize(&mut split).map_err(|e| anyhow!(e))?;
    let splits = split.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, ..)| word.to_owned()).collect())
}

/// Whether spaces separate words that start or end with this character.
fn spaced(c: char) -> bool {
    let unspaced_script = matches!(c as u32, 0x2E80..=0x9FFF | 0xF900..=0xFAFF | 0xFF00..=0xFFEF | 0x20000..=0x3FFFF);
    c.is_alphanumeric() && !unspaced_script
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n一\n弯\n月\n，\n3\n##d\nblue\nmoon\n##s\n,\n";

    fn round(text: &str) -> (Vec<u32>, String) {
        let wordpiece = WordPiece::parse(VOCAB).unwrap();
        let ids = wordpiece.encode(text, 8).unwrap();
        let decoded = wordpiece.decode(&ids);
        (ids, decoded)
    }

    #[test]
    fn chinese_characters_are_words_and_come_back_without_spaces() {
        assert_eq!(round("一弯月，3D"), (vec![2, 5, 6, 7, 8, 9, 10, 3], "一弯月，3d".into()));
        assert_eq!(round("Blue  moons，一"), (vec![2, 11, 12, 13, 8, 5, 3], "blue moons，一".into()));
        assert_eq!(round("blue一moon"), (vec![2, 11, 5, 12, 3], "blue一moon".into()));
    }

    #[test]
    fn unusual_texts() {
        assert_eq!(round(""), (vec![2, 3], String::new()));
        assert_eq!(round(" \t\n\0\u{fffd}\u{200b}"), (vec![2, 3], String::new()));
        assert_eq!(round("🌙 [SEP] ไทย").0[..2], [2, 1]);
        assert!(
            !round("[SEP][CLS][PAD]").0[1..5].iter().any(|id| [0, 2, 3].contains(id)),
            "written by hand, not special"
        );
        assert_eq!(round("一弯月一弯月一弯月").0, [2, 5, 6, 7, 5, 6, 7, 3]);
        assert_eq!(round(&"x".repeat(1 << 20)).0, [2, 1, 3]);
        assert_eq!(round(&"月 ".repeat(1 << 19)).0, [2, 7, 7, 7, 7, 7, 7, 3]);
        let wordpiece = WordPiece::parse(VOCAB).unwrap();
        assert_eq!(wordpiece.encode("月", 2).unwrap(), [2, 3]);
        assert!(wordpiece.encode("月", 1).is_err());
        assert_eq!(wordpiece.decode(&[7, 4_000_000_000, 7]), "月月");
    }

    /// The tokens of the Chinese BERT vocabulary by transformers 5.24 (`BertTokenizer`), and by Google's tokenizer as
    /// cn-clip 1.6 ships it: full-width forms are lower-cased, but stay full-width (no NFKC).
    #[test]
    fn full_width_forms_are_split_as_by_bert() {
        let tokens = [
            "[PAD]", "[UNK]", "[CLS]", "[SEP]", "ａ", "##ｂ", "##b", "##ｃ", "１２", "##１", "##＋", "##＝", "##２",
            "3",
        ];
        let more =
            ["##ｄ", "你", "红", "苹", "全", "角", "，", "！", "（", "）", "［", "～", "ｔ", "恤", "①", "１", "头"];
        let vocab: Vec<&str> = tokens.into_iter().chain(more).collect();
        let wordpiece = WordPiece::parse(&vocab.join("\n")).unwrap();
        for (text, expected) in [
            ("ＡＢＣ", "ａ ##ｂ ##ｃ"),
            ("ＡBｃ", "ａ ##b ##ｃ"),
            ("你，ＡＢＣ！１２", "你 ， ａ ##ｂ ##ｃ ！ １２"),
            ("Ｔ恤", "ｔ 恤"),
            ("3Ｄ红", "3 ##ｄ 红"),
            ("红\u{3000}\u{3000}苹！", "红 苹 ！"),
            ("“全角”（）［～", "[UNK] 全 角 [UNK] （ ） ［ ～"),
            ("１＋１＝２", "１ ##＋ ##１ ##＝ ##２"),
            ("\u{a0}全\u{2003}角\u{feff}头\u{200b}", "全 角 头"),
            ("㎏ ① ㈱", "[UNK] ① [UNK]"),
        ] {
            for normalization in [Normalization::None, Normalization::Simplified] {
                let ids = wordpiece.clone().with_normalization(normalization).encode(text, 32).unwrap();
                let inner: Vec<&str> = ids[1..ids.len() - 1].iter().map(|&id| vocab[id as usize]).collect();
                assert_eq!(inner.join(" "), expected, "{text}");
            }
        }
    }

    #[test]
    fn a_truncated_target_has_no_sep() {
        let wordpiece = WordPiece::parse(VOCAB).unwrap();
        let target = |text: &str, max| wordpiece.encode_target(text, max).unwrap();
        assert_eq!(target("一弯月", 5), [2, 5, 6, 7, 3], "as long as it fits");
        assert_eq!(target("一弯月", 8), wordpiece.encode("一弯月", 8).unwrap());
        assert_eq!(target("一弯月", 4), [2, 5, 6, 7], "its end does not fit");
        assert_eq!(target("一弯月一弯月一弯月", 5), [2, 5, 6, 7, 5]);
        assert_eq!(target("", 2), [2, 3]);
        assert_eq!(target(&"x".repeat(1 << 20), 8), [2, 1], "what follows was not read");
    }

    #[test]
    fn a_byte_order_mark_is_not_part_of_the_first_token() {
        let marked = WordPiece::parse(&format!("\u{feff}{VOCAB}")).unwrap();
        assert_eq!(marked.pad(), 0);
        assert_eq!(marked.vocab_text(), VOCAB);
        assert_eq!(marked.encode("一弯月", 8).unwrap(), round("一弯月").0);
    }

    #[test]
    fn broken_vocabularies_are_refused() {
        let error = |text: &str| format!("{:#}", WordPiece::parse(text).unwrap_err());
        assert!(error("").contains("[PAD]"));
        assert!(error("[PAD]\n[UNK]\n[CLS]\n").contains("[SEP]"));
        assert!(error("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na\n").contains("line 6"));
        assert!(error("[PAD]\n\n").contains("line 2"));
        assert!(WordPiece::parse("[PAD]\r\n[UNK]\r\n[CLS]\n[SEP]\n\u{2028}\n##\u{2028}\n").is_ok());
        assert_eq!(WordPiece::parse(VOCAB).unwrap().vocab_text(), VOCAB);
    }
}
