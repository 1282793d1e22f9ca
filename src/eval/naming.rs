//! Naming accuracy: the share of captions that contain the name of the object in the image.

use super::{
    Rate,
    captioning::{self, Settings},
    plain,
};
use crate::{
    data::Record,
    error::{Result, ensure, failed},
    generate::Models,
    report,
};

/// The share of captions that contain the image's `name_zh`.
///
/// # Errors
/// The data cannot be read, no image has `name_zh` in its JSON, or the model is damaged.
pub fn run(models: &Models, settings: &Settings) -> Result<Rate> {
    let (captioned, nameless) = captioning::run(models, settings, false, |record| name(record).is_some())?;
    let hint = "the name of an image is `name_zh` in its JSON file, as written by scripts/build_emoji.sh";
    ensure!(!captioned.is_empty(), failed(format_args!("no image in `{}` has a name", settings.data), hint));
    if nameless > 0 {
        report::warn(format_args!("{nameless} images have no `name_zh` and were left out"));
    }
    let named = captioned.iter().filter(|c| name(&c.record).is_some_and(|name| names_it(&c.caption, name)));
    Ok(Rate::new(named.count(), captioned.len()))
}

fn name(record: &Record) -> Option<&str> {
    record.meta.get("name_zh").and_then(|name| name.as_str())
}

/// Whether `caption` contains `name`. Case and spaces are ignored, because captions have neither.
fn names_it(caption: &str, name: &str) -> bool {
    let name = plain(name);
    !name.is_empty() && plain(caption).contains(&name)
}

#[cfg(test)]
mod tests {
    use super::names_it;

    #[test]
    fn case_and_spaces_are_ignored() {
        assert!(names_it("一个扁平风格的atm取款机图标", "ATM 取款机"));
        assert!(names_it("弯月，扁平风格", "弯月"));
        assert!(!names_it("月，扁平风格", "弯月"));
        assert!(!names_it("弯月", " "));
    }
}
