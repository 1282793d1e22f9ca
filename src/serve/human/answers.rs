//! What a rater's form sends.

use crate::eval::human::kind::Kind;
use std::collections::BTreeMap;

/// Answers by the place of the output on the page, from 0 on, and the question.
pub type Answers = BTreeMap<(usize, &'static str), i64>;

/// Reads a form, `0.clarity=4&0.texture=3`; answers may be missing. `None` if it has anything that the page of `outputs`
/// outputs does not offer, or an answer twice.
pub fn parse(kind: Kind, outputs: usize, form: &str) -> Option<Answers> {
    let mut answers = Answers::new();
    for field in form.split('&').filter(|field| !field.is_empty()) {
        let (name, value) = field.split_once('=')?;
        let (place, question) = name.split_once('.')?;
        let (place, question) = (number(place)?, kind.question(question)?);
        let value = number(value)?.cast_signed();
        let offered = place < outputs as u64 && (question.low..=question.high).contains(&value);
        let is_new = answers.insert((usize::try_from(place).ok()?, question.name), value).is_none();
        if !offered || !is_new {
            return None;
        }
    }
    Some(answers)
}

/// One or two digits.
fn number(text: &str) -> Option<u64> {
    let plain = (1..=2).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok())?
}

/// Whether all questions about all outputs are answered.
pub fn is_complete(kind: Kind, outputs: usize, answers: &Answers) -> bool {
    answers.len() == outputs * kind.questions().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_page_offers_is_read() {
        let found = parse(Kind::Images, 2, "0.clarity=4&1.texture=1").unwrap();
        assert_eq!(found, Answers::from([((0, "clarity"), 4), ((1, "texture"), 1)]));
        assert!(!is_complete(Kind::Images, 2, &found));
        let whole = parse(Kind::Answers, 1, "0.quality=0&0.person=1").unwrap();
        assert!(is_complete(Kind::Answers, 1, &whole));
        assert_eq!(parse(Kind::Images, 1, ""), Some(Answers::new()));
        for wrong in [
            "0.clarity=6",
            "0.clarity=0",
            "0.clarity=-1",
            "0.clarity=+1",
            "0.clarity=",
            "0.clarity",
            "clarity=1",
            "2.clarity=1",
            "-1.clarity=1",
            "99999999999999999999.clarity=1",
            "0.fluency=1",
            "0.clarity=1&0.clarity=2",
            "0.clarity=4&rater=2",
            "0.clarity=%31",
            "0.clarity=٣",
        ] {
            assert_eq!(parse(Kind::Images, 2, wrong), None, "{wrong}");
        }
    }
}
