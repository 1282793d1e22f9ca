//! Conversion of texts to one script before they are split into tokens.

use crate::{
    config::Normalization,
    error::{Result, failed},
};
use ferrous_opencc::{OpenCC, config::BuiltinConfig};
use std::{borrow::Cow, sync::LazyLock};
use tokenizers::NormalizedString;

/// OpenCC's dictionaries of characters and phrases, loaded at the first text that needs them.
static TO_SIMPLIFIED: LazyLock<Result<OpenCC, String>> =
    LazyLock::new(|| OpenCC::from_config(BuiltinConfig::T2s).map_err(|e| e.to_string()));

/// Converts a text as `text.normalize` says. A text in simplified script is not changed, except that characters are
/// decomposed (NFD), which BERT's cleaning does to every text anyway.
///
/// # Errors
/// The dictionaries of the program cannot be loaded.
pub fn normalize(text: &str, normalization: Normalization) -> Result<Cow<'_, str>> {
    match normalization {
        Normalization::Simplified if !text.is_ascii() => {}
        Normalization::Simplified | Normalization::None => return Ok(Cow::Borrowed(text)),
    }
    let to_simplified = TO_SIMPLIFIED
        .as_ref()
        .map_err(|e| failed(format_args!("cannot convert to simplified script: {e}"), "install vilg again"))?;
    // Compatibility ideographs are decomposed into characters that the dictionaries have.
    let mut text = NormalizedString::from(text);
    Ok(Cow::Owned(to_simplified.convert(text.nfd().get())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::WordPiece;

    fn simplified(text: &str) -> String {
        normalize(text, Normalization::Simplified).unwrap().into_owned()
    }

    /// A tokenizer of the demo's vocabulary, whose tokens are in simplified script.
    fn demo(normalization: Normalization) -> WordPiece {
        WordPiece::parse(include_str!("../demo/vocab.txt")).unwrap().with_normalization(normalization)
    }

    #[test]
    fn phrases_decide_between_characters() {
        for (traditional, expected) in [
            ("紅蘋果", "红苹果"),
            ("頭髮", "头发"),
            ("發展", "发展"),
            ("乾淨", "干净"),
            ("干涉", "干涉"),
            ("乾隆", "乾隆"),
            ("乾坤", "乾坤"),
            ("皇后在後面", "皇后在后面"),
            ("麵包和麵條", "面包和面条"),
            ("十里", "十里"),
            ("裡面", "里面"),
            ("瞭解", "了解"),
            ("瞭望塔", "瞭望塔"),
            ("憑藉", "凭借"),
            ("慰藉", "慰藉"),
            ("著名", "著名"),
            ("穿着紅色衣服的女孩", "穿着红色衣服的女孩"),
            ("3D 風格的 Banana", "3D 风格的 Banana"),
            ("隆\u{f900}", "隆岂"),
        ] {
            assert_eq!(simplified(traditional), expected);
            assert_eq!(normalize(traditional, Normalization::None).unwrap(), traditional);
        }
    }

    #[test]
    fn both_scripts_give_equal_ids() {
        let wordpiece = demo(Normalization::Simplified);
        for (traditional, text) in [
            ("紅蘋果，立體風格", "红苹果，立体风格"),
            ("細膩風格的女宇航員", "细腻风格的女宇航员"),
            ("　一輪　彎月！", " 一轮 弯月！"),
            ("捲髮的人，現代風格", "卷发的人，现代风格"),
            ("紅", "红"),
        ] {
            for tokens in [4, 28] {
                let ids = wordpiece.encode(text, tokens).unwrap();
                assert_eq!(wordpiece.encode(traditional, tokens).unwrap(), ids, "{traditional}");
                let target = wordpiece.encode_target(text, tokens).unwrap();
                assert_eq!(wordpiece.encode_target(traditional, tokens).unwrap(), target, "{traditional}");
                assert_eq!(demo(Normalization::None).encode(text, tokens).unwrap(), ids, "{text}");
            }
            let unknown = |wordpiece: &WordPiece| wordpiece.encode(traditional, 28).unwrap().contains(&wordpiece.unk());
            assert!(unknown(&demo(Normalization::None)) && !unknown(&wordpiece), "{traditional}");
        }
    }

    #[test]
    fn simplified_text_keeps_its_ids() {
        let (plain, wordpiece) = (demo(Normalization::None), demo(Normalization::Simplified));
        let captions = include_str!("../../tests/golden/filter/captions.tsv").split(['\t', '\n']);
        for text in include_str!("../demo/vocab.txt").lines().chain(captions) {
            let once = simplified(text);
            assert_eq!(simplified(&once), once);
            assert_eq!(plain.encode(&once, 64).unwrap(), wordpiece.encode(&once, 64).unwrap(), "{text}");
            // Some captions of the demo have traditional characters.
            if ["擊", "餅", "騎", "唸"].contains(&text) {
                assert_ne!(once, text);
                continue;
            }
            assert_eq!(plain.encode(text, 64).unwrap(), wordpiece.encode(text, 64).unwrap(), "{text}");
        }
    }
}
