//! Which keys a resumed run may change.

use super::{Config, Data, Train};

impl Config {
    /// Whether a resumed run may change the key `section.key` (or `key`, or all of a `section`): no result of a finished
    /// step depends on it. Of vocabulary and image tokenizer, digests are compared instead of paths.
    pub fn is_free_at_resume(name: &str) -> bool {
        match name.split_once('.') {
            None => ["name", "sample"].contains(&name),
            Some(("data", key)) => Data::FREE_AT_RESUME.contains(&key),
            Some(("text", key)) => key == "vocab",
            Some(("image_tokenizer", key)) => key == "path",
            Some(("train", key)) => Train::FREE_AT_RESUME.contains(&key),
            Some(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::values;

    #[test]
    fn keys_that_are_free_at_resume_exist() {
        let known: Vec<String> = values(&Config::default()).unwrap().into_iter().map(|(name, _)| name).collect();
        let keys = Train::FREE_AT_RESUME.iter().map(|key| format!("train.{key}"));
        for name in keys.chain(Data::FREE_AT_RESUME.iter().map(|key| format!("data.{key}"))) {
            assert!(known.contains(&name) && Config::is_free_at_resume(&name), "{name}");
        }
        for name in ["name", "text.vocab", "image_tokenizer.path"] {
            assert!(known.contains(&name.to_owned()) && Config::is_free_at_resume(name), "{name}");
        }
        for name in ["seed", "train.learning_rate", "data.sources", "model.layers", "text.max_tokens", "text.normalize"]
        {
            assert!(!Config::is_free_at_resume(name), "{name}");
        }
    }
}
