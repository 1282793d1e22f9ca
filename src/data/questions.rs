//! Questions about an image, in the field `questions` of a sample's JSON: a list of `question`, `answer` and, where known, the
//! `type` of the question.

use super::clean::clean;
use serde_json::Value;

/// A question about an image with its answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    pub question: String,
    pub answer: String,
    /// Its type, such as `count`; empty if the data does not say.
    pub kind: String,
}

/// The questions in a sample's JSON that have both a question and an answer.
pub fn questions(meta: &Value) -> Vec<Question> {
    let list = meta.get("questions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map_or(String::new(), clean);
    let parse = |value: &Value| Question {
        question: text(value, "question"),
        answer: text(value, "answer"),
        kind: text(value, "type"),
    };
    list.iter().map(parse).filter(|question| !question.question.is_empty() && !question.answer.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_has_no_question_or_answer_is_left_out() {
        let meta = json!({ "questions": [
            { "question": "这是什么？", "answer": " 月亮\n", "type": "thing" },
            { "question": "几个？", "answer": "" },
            { "answer": "三个" },
            { "question": 3, "answer": "三个" },
            "什么",
            { "question": "几个？", "answer": "三个" },
        ] });
        let [first, second] = <[Question; 2]>::try_from(questions(&meta)).unwrap();
        assert_eq!((first.answer.as_str(), first.kind.as_str()), ("月亮", "thing"));
        assert_eq!((second.question.as_str(), second.kind.as_str()), ("几个？", ""));
        for none in [json!(null), json!({}), json!({ "questions": "x" }), json!({ "questions": [] })] {
            assert!(questions(&none).is_empty());
        }
    }
}
