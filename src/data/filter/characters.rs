//! Which characters of a caption are special (ERNIE-ViLG, §3.2.1: "no special characters"). The paper does not list them;
//! this table is ours.
//!
//! | class (Unicode general category) | special |
//! | --- | --- |
//! | letters and marks of any script (L, M), decimal digits (Nd), `〇` | no |
//! | punctuation of Chinese and English prose: [`PROSE`] | no |
//! | signs of quantities: [`QUANTITIES`] | no |
//! | the space and the ideographic space | no |
//! | other punctuation (P): `#`, `@`, `*`, `_`, `\`, `{`, `[`, `※`, … | yes |
//! | other symbols (S): arrows, stars, blocks, emoji, `\|`, `=`, `<`, `^`, … | yes |
//! | other numbers (Nl, No): `①`, `Ⅷ`, `½`, … | yes |
//! | control, format, private and unassigned characters (C), line and paragraph separators | yes |
//! | variation selectors, which turn a character into an emoji | yes |
//! | mathematical and enclosed letters (`𝓐`, `🅰`) | yes |

use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};

/// Punctuation of prose, full-width and half-width.
pub const PROSE: &str = "，。、！？；：“”‘’（）《》〈〉【】「」『』〔〕…—–－·・～,.!?;:'\"()-/&";
/// Signs that belong to numbers.
pub const QUANTITIES: &str = "%％‰+＋×÷°℃℉$￥¥€£~";

/// Whether `c` is special.
pub fn is_special(c: char) -> bool {
    if c.is_ascii_alphanumeric() || matches!(c, '\u{4e00}'..='\u{9fff}') {
        return false;
    }
    if matches!(c, ' ' | '\u{3000}' | '〇') || PROSE.contains(c) || QUANTITIES.contains(c) {
        return false;
    }
    if matches!(c, '\u{fe00}'..='\u{fe0f}' | '\u{1d400}'..='\u{1d7ff}' | '\u{1f100}'..='\u{1f1ff}') {
        return true;
    }
    match c.general_category_group() {
        GeneralCategoryGroup::Letter | GeneralCategoryGroup::Mark => false,
        GeneralCategoryGroup::Number => c.general_category() != GeneralCategory::DecimalNumber,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_not_special_and_decoration_is() {
        let prose = "一只猫，在〇八年（北京）的 café！ABC 12.5%、３℃～5×6；「こ」한글Жд\u{3000}U.S.A.'s";
        assert_eq!(prose.chars().filter(|c| is_special(*c)).collect::<String>(), "");
        let decoration = "#@*_\\{}[]<>|=^`★●→■①Ⅷ½😀❤©®™※♪☆\u{200b}\u{feff}\u{e000}\u{fe0f}\u{7}\t\u{2028}𝓐🅰";
        for c in decoration.chars() {
            assert!(is_special(c), "{c:?}");
        }
    }
}
