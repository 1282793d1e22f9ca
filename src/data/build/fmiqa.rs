//! Questions of FM-IQA: `{"train": [{"image_id", "Question", "Answer", "question_id"}], "val": [..]}`, about COCO images.

use super::{
    emit::Emit,
    groups::Groups,
    images::{ById, Images},
    json,
    reader::Reader,
    row::Row,
    seen::Seen,
};
use crate::{
    data::bad::{Bad, Cause},
    error::Result,
};
use serde_json::{Map, Value};
use std::path::PathBuf;

pub struct Fmiqa {
    pub questions: PathBuf,
    /// The list of the file that is read.
    pub split: String,
    pub images: Images,
}

/// The image id and the question, with the names that samples use: `question`, `answer`.
fn question(entry: Value) -> Option<(String, Value)> {
    let Value::Object(mut entry) = entry else { return None };
    let id = json::id_text(entry.get("image_id"))?;
    entry.remove("image_id");
    for (from, to) in [("Question", "question"), ("Answer", "answer")] {
        let text = entry.remove(from).filter(Value::is_string)?;
        entry.insert(to.to_owned(), text);
    }
    Some((id, Value::Object(entry)))
}

impl Fmiqa {
    fn row(&self, id: String, questions: Vec<Value>, images: &ById) -> Result<Row, Bad> {
        let fields = [
            ("image_id".to_owned(), id.as_str().into()),
            ("split".to_owned(), self.split.as_str().into()),
            ("questions".to_owned(), questions.into()),
        ];
        Ok(Row { image: images.find(&id)?, id: Some(id), captions: Vec::new(), fields: Map::from_iter(fields) })
    }
}

impl Reader for Fmiqa {
    fn read(&self, rows: &mut Emit) -> Result<()> {
        let images = self.images.by_id()?;
        let (mut questions, mut seen) = (Groups::default(), Seen::default());
        let shown = self.questions.display();
        json::for_each(&self.questions, &self.split, |entry| {
            let Some((id, question)) = question(entry) else {
                let what = "a question without image_id, Question or Answer";
                return rows.damage(Bad::new(Cause::BadRow, format_args!("{shown}: {what}")));
            };
            let number = json::id_text(question.get("question_id"));
            if let Some(number) = number.filter(|number| !seen.is_new(&format!("{number} {id}"))) {
                return rows
                    .damage(Bad::new(Cause::Duplicate, format_args!("{shown}: question {number} of image {id}")));
            }
            questions.add(&id, question);
            Ok(())
        })?;
        questions.rest().try_for_each(|(id, questions)| rows.row(self.row(id, questions, &images)))
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.questions.clone()]
    }
}
