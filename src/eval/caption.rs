//! Caption accuracy: the share of captions that contain the name of the object in the image.

use super::{Rate, choose, open, tell_bad};
use crate::{
    data::Kind,
    error::{Result, ensure, failed},
    generate::{Decoding, Models},
    report,
};
use image::RgbImage;

/// Number of images captioned in one batch.
const BATCH: usize = 64;

/// The share of captions that contain the image's `name_zh`, for `samples` images (0: all) of `data` chosen by `seed`.
///
/// # Errors
/// The data cannot be read, no image has `name_zh` in its JSON, or the model is damaged.
pub fn run(models: &Models, data: &str, samples: usize, decoding: &Decoding, seed: u64) -> Result<Rate> {
    let dataset = open(data, Kind::Images(models.image_tokenizer.image_size() as u32))?;
    let places: Vec<(usize, u64)> =
        dataset.sources.iter().enumerate().flat_map(|(i, source)| (0..source.len()).map(move |n| (i, n))).collect();
    let count = if samples == 0 { places.len() } else { samples };
    let chosen = choose(count, places.len(), seed, "eval pairs", 0);
    let (mut hits, mut of, mut nameless, mut bad) = (0, 0, 0, dataset.bad.clone());
    let bar = report::bar(chosen.len() as u64, "captioning");
    for chunk in chosen.chunks(BATCH) {
        let (mut pictures, mut names): (Vec<RgbImage>, Vec<String>) = Default::default();
        for &i in chunk {
            let (source, sample) = places[i];
            match dataset.read(source, sample) {
                Ok(record) => match (record.image, record.meta.get("name_zh").and_then(|name| name.as_str())) {
                    (Some(picture), Some(name)) => {
                        pictures.push(picture);
                        names.push(name.to_owned());
                    }
                    _ => nameless += 1,
                },
                Err(e) => bad.add(e),
            }
        }
        let captions = models.caption(&models.encode(&pictures)?, decoding, 1)?;
        let said = names.iter().zip(&captions).filter(|(name, c)| c.first().is_some_and(|c| names_it(&c.text, name)));
        hits += said.count();
        of += names.len();
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    tell_bad(data, &bad, of + nameless)?;
    let hint = "the name of an image is `name_zh` in its JSON file, as written by scripts/build_emoji.sh";
    ensure!(of > 0, failed(format_args!("no image in `{data}` has a name"), hint));
    if nameless > 0 {
        report::warn(format_args!("{nameless} images have no `name_zh` and were left out"));
    }
    Ok(Rate::new(hits, of))
}

/// Whether `caption` contains `name`. Case and spaces are ignored, because captions have neither.
fn names_it(caption: &str, name: &str) -> bool {
    let plain = |text: &str| text.to_lowercase().split_whitespace().collect::<String>();
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
