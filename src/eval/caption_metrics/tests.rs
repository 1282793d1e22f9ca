//! The metrics against pycocoevalcap, METEOR's jar and Vedantam's CIDEr (scripts/golden_caption_metrics.py).

use super::*;
use serde_json::Value;

fn golden() -> (Vec<Sample>, Value) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/captions");
    let expected = std::fs::read(folder.join("expected.json")).unwrap();
    let samples = read(&folder.join("references.json"), &folder.join("results.json")).unwrap();
    (samples, serde_json::from_slice(&expected).unwrap())
}

#[test]
fn scores_are_those_of_pycocoevalcap() {
    let (samples, expected) = golden();
    let ids = serde_json::to_value(samples.iter().map(|sample| &sample.id).collect::<Vec<_>>()).unwrap();
    assert_eq!(ids, expected["image_ids"]);
    assert!(samples.len() >= 40 && samples.iter().all(|sample| sample.references.len() == 5));
    let scores = measure(&samples, false, None).unwrap();
    assert_eq!(scores.len(), 8);
    for (name, scores) in &scores {
        let total = expected["corpus"][name].as_f64().unwrap();
        assert!((scores.corpus - total).abs() < 1e-9, "{name}: {} instead of {total}", scores.corpus);
        let images = expected["images"][name].as_array().unwrap();
        assert_eq!(images.len(), scores.images.len());
        for ((ours, theirs), sample) in scores.images.iter().zip(images).zip(&samples) {
            let theirs = theirs.as_f64().unwrap();
            assert!((ours - theirs).abs() < 2e-9, "{name} of {sample:?}: {ours} instead of {theirs}");
        }
    }
}

/// pycocoevalcap's own METEOR normalises, stems and has synonyms, which matters for Latin words only.
#[test]
fn meteor_is_that_of_the_jar_without_latin_words() {
    let (samples, expected) = golden();
    let (_, scores) = measure(&samples, false, None).unwrap().swap_remove(4);
    let theirs = expected["images"]["METEOR_norm"].as_array().unwrap();
    let chinese =
        |sample: &Sample| !sample.references.iter().any(|text| text.contains(|c: char| c.is_ascii_alphabetic()));
    let mut count = 0;
    for ((ours, theirs), sample) in scores.images.iter().zip(theirs).zip(&samples).filter(|(_, sample)| chinese(sample))
    {
        let theirs = theirs.as_f64().unwrap();
        assert!((ours - theirs).abs() < 1e-3, "{sample:?}: {ours} instead of {theirs}");
        count += 1;
    }
    assert!(count >= 40, "{count}");
}

#[test]
fn scores_do_not_depend_on_the_order_of_images() {
    let (mut samples, _) = golden();
    let forwards = measure(&samples, false, None).unwrap();
    samples.reverse();
    for ((name, a), (_, b)) in forwards.iter().zip(measure(&samples, false, None).unwrap()) {
        assert!((a.corpus - b.corpus).abs() < 1e-12, "{name}: {} and {}", a.corpus, b.corpus);
        assert!(a.images.iter().eq(b.images.iter().rev()), "{name}");
    }
}

#[test]
fn punctuation_can_be_left_out() {
    let sample = |caption: &str| Sample {
        id: ImageId::Number(1),
        caption: caption.to_owned(),
        references: vec!["一只猫，一只狗。".to_owned()],
    };
    let bleu = |caption, drop| measure(&[sample(caption)], drop, None).unwrap()[3].1.corpus;
    assert!((bleu("一只猫一只狗", true) - 1.0).abs() < 1e-6 && bleu("一只猫一只狗", false) < 0.9);
}
