//! Checks the section `[matcher]`.

use super::{ImageEncoder, Matcher, Text, check::Check};

pub(super) fn matcher(check: &mut Check, m: &Matcher, text: &Text) {
    let ok = (1..=4096).contains(&m.image_size);
    check.that(ok, "matcher.image_size", "be from 1 to 4096", "224 is usual");
    let ok = (1..=m.image_size).contains(&m.patch_size) && m.image_size.is_multiple_of(m.patch_size);
    let must = format!("divide matcher.image_size ({})", m.image_size);
    let patched = m.image_encoder == ImageEncoder::Vit;
    check.that(ok || !patched, "matcher.patch_size", must, "16 pixels are usual at 224");
    let encoders = [
        ("image", m.image_layers, m.image_hidden, m.image_heads, patched),
        ("text", m.text_layers, m.text_hidden, m.text_heads, true),
    ];
    for (part, layers, hidden, heads, transformer) in encoders {
        let key = |name: &str| format!("matcher.{part}_{name}");
        check.that((1..=1024).contains(&layers) || !transformer, &key("layers"), "be from 1 to 1024", "12 are usual");
        check.that((1..=65536).contains(&hidden), &key("hidden"), "be from 1 to 65536", "768 are usual");
        let width = if transformer { hidden } else { hidden.saturating_mul(32) };
        let ok = heads > 0 && width.is_multiple_of(heads);
        check.that(ok, &key("heads"), format!("divide {width} channels"), "64 channels per head are usual");
    }
    let resnet = m.image_encoder == ImageEncoder::Resnet;
    let ok = m.resnet_blocks.len() == 4 && m.resnet_blocks.iter().all(|blocks| (1..=256).contains(blocks));
    check.that(ok || !resnet, "matcher.resnet_blocks", "be four numbers from 1 to 256", "RN50 has [3, 4, 6, 3]");
    let ok = m.image_size.is_multiple_of(32);
    check.that(ok || !resnet, "matcher.image_size", "be a multiple of 32", "a ResNet divides the side length by 32");
    let ok = m.text_positions == 0 || (text.max_tokens..=65536).contains(&m.text_positions);
    check.that(ok, "matcher.text_positions", "be 0 or at least text.max_tokens", "0 gives text.max_tokens rows");
    check.that((1..=65536).contains(&m.embedding), "matcher.embedding", "be from 1 to 65536", "512 are usual");
    let ok = m.min_crop_area > 0.0 && m.min_crop_area <= 1.0;
    check.that(ok, "matcher.min_crop_area", "be above 0 and at most 1", "0.9 is usual for captions that name places");
    let ok = m.calibration.is_empty() || m.calibration.len() == 2 && m.calibration.iter().all(|x| x.is_finite());
    check.that(ok, "matcher.calibration", "be empty or [slope, offset]", "`vilg eval matcher --calibrate` fits both");
}
