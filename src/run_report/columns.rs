//! Which values of a result are columns of its table.

use super::evaluation::{Evaluation, Kind};
use serde_json::Value;

/// Maximum number of metrics or types of questions.
const KEYS: usize = 100;

/// Caption metrics in the order of papers, by the beginnings of their names.
const METRICS: [&str; 4] = ["Bleu", "METEOR", "ROUGE", "CIDEr"];

/// How a value is shown.
#[derive(Debug, Clone, Copy)]
pub enum Format {
    Text,
    /// A number with this many decimals.
    Number(usize),
    /// A share from 0 to 1 in percent.
    Share,
    /// A number times 100, as papers print caption metrics.
    Hundredfold,
    /// An accuracy: its rate in percent with the counts and the interval.
    Rate,
}
use Format::{Hundredfold, Number, Rate, Share, Text};

/// A column: its header, where the value is in the JSON, and its format.
pub type Column = (String, String, Format);

fn columns(fixed: &[(&str, &str, Format)]) -> Vec<Column> {
    fixed.iter().map(|(name, at, format)| ((*name).to_owned(), (*at).to_owned(), *format)).collect()
}

/// The title of a table, and what its figures are.
pub fn title(kind: Kind) -> (&'static str, &'static str) {
    match kind {
        Kind::TextToImage => (
            "Text to image, images of many captions",
            "FID or another Fréchet distance: lower is better. CLIP score: higher is better. Both can only be compared between \
             results with the same features and matcher; the paper's FID is of the protocol dm-gan, on 30,000 captions of \
             MS-COCO.",
        ),
        Kind::Fid => (
            "Generated images against real ones",
            "FID and KID: lower is better. Figures of different protocols cannot be compared; the paper's are of the protocol \
             dm-gan, on 30,000 captions of MS-COCO.",
        ),
        Kind::Caption => (
            "Captions",
            "Times 100, on characters; higher is better. CIDEr is CIDEr-D. The paper's figures are of AIC-ICC and COCO-CN: \
             compare them with results on the same data only.",
        ),
        Kind::Naming => ("Naming", "Captions that contain the name of the concept, with 95 % Wilson intervals."),
        Kind::Vqa => ("Questions about images", "Exact answers, with 95 % Wilson intervals."),
        Kind::Retrieval => (
            "Text to image, retrieval",
            "The caption's own image is the nearest to the generated one, with 95 % Wilson intervals.",
        ),
        Kind::Matcher => ("Matcher, retrieval", "Recall with 95 % Wilson intervals."),
        Kind::Classification => ("Matcher, zero-shot classification", "Accuracy with 95 % Wilson intervals."),
        Kind::Calibration => ("Matcher, calibration", "score = σ(slope · cosine + offset)."),
        Kind::Reconstruction => (
            "Image tokenizers, reconstruction",
            "PSNR and SSIM: higher is better; LPIPS and the Fréchet distances: lower is better. ΔE: color error (CIE76) of saturated \
             pixels, by hue; lower is better.",
        ),
        Kind::Ablation => (
            "End-to-end against two-stage training",
            "Fréchet distances: lower is better; in parentheses 95 % bootstrap intervals. The paper's table 7 (FID on MS-COCO, \
             300 M parameters) is beside distances of Inception's features.",
        ),
        Kind::Other => ("Other results", "All values of the files."),
    }
}

/// The columns of a kind.
pub fn layout(kind: Kind, all: &[&Evaluation]) -> Vec<Column> {
    match kind {
        Kind::TextToImage => columns(&[
            ("prompts", "/prompts", Text),
            ("images", "/scores/images", Number(0)),
            ("best of", "/settings/best_of", Number(0)),
            ("ranked by", "/settings/rank", Text),
            ("features", "/settings/features", Text),
            (distance(all), "/scores/distance", Number(2)),
            ("CLIP score", "/scores/clip_score/mean", Number(2)),
        ]),
        Kind::Fid => columns(&[
            ("generated", "/a", Text),
            ("real", "/b", Text),
            ("protocol", "/protocol", Text),
            ("images", "/images", Text),
            ("FID", "/fid", Number(2)),
            ("KID", "/kid/mean", Number(5)),
            ("precision", "/precision_recall/precision", Number(3)),
            ("recall", "/precision_recall/recall", Number(3)),
            ("Inception Score", "/inception_score/mean", Number(2)),
        ]),
        Kind::Caption => {
            let mut all_columns = columns(&[("data", "/data", Text), ("images", "/images", Number(0))]);
            let mut names = keys(all, "/metrics");
            names.sort_by_key(|name| METRICS.iter().position(|metric| name.starts_with(metric)));
            all_columns.extend(names.into_iter().map(|name| {
                let at = format!("/metrics/{}", pointer(&name));
                (name, at, Hundredfold)
            }));
            all_columns
        }
        Kind::Naming => {
            columns(&[("data", "/data", Text), ("accuracy", "/accuracy", Rate), ("beam", "/beam", Number(0))])
        }
        Kind::Vqa => {
            let mut all_columns = columns(&[("data", "/data", Text), ("all", "/accuracy/all", Rate)]);
            all_columns.extend(keys(all, "/accuracy/types").into_iter().map(|name| {
                let at = format!("/accuracy/types/{}", pointer(&name));
                (name, at, Rate)
            }));
            all_columns.extend(columns(&[("without the image", "/accuracy/without_images", Rate)]));
            all_columns
        }
        Kind::Retrieval => columns(&[
            ("data", "/data", Text),
            ("candidates", "/result/candidates", Number(0)),
            ("best of", "/sampling/best_of", Number(0)),
            ("top-1", "/result/top1", Rate),
            ("chance", "/result/chance_top1", Share),
            ("top-5", "/result/top5", Rate),
            ("upper bound, top-1", "/result/reconstructed_top1", Rate),
        ]),
        Kind::Matcher => columns(&[
            ("model", "/model", Text),
            ("data", "/data", Text),
            ("images", "/retrieval/images", Number(0)),
            ("image to text, R@1", "/retrieval/image_to_text/r1", Rate),
            ("R@5", "/retrieval/image_to_text/r5/rate", Share),
            ("R@10", "/retrieval/image_to_text/r10/rate", Share),
            ("text to image, R@1", "/retrieval/text_to_image/r1", Rate),
            ("R@5", "/retrieval/text_to_image/r5/rate", Share),
            ("R@10", "/retrieval/text_to_image/r10/rate", Share),
            ("mean recall", "/retrieval/mean_recall", Share),
            ("calibration error", "/scores/expected_calibration_error", Number(4)),
        ]),
        Kind::Classification => columns(&[
            ("model", "/model", Text),
            ("data", "/data", Text),
            ("classes", "/classification/classes", Number(0)),
            ("top-1", "/classification/top1", Rate),
            ("top-5", "/classification/top5", Rate),
            ("chance", "/classification/chance_top1", Share),
        ]),
        Kind::Calibration => columns(&[
            ("model", "/model", Text),
            ("data", "/data", Text),
            ("slope", "/result/calibration/0", Number(4)),
            ("offset", "/result/calibration/1", Number(4)),
            ("fitted on", "/result/fitted_on", Number(0)),
            ("calibration error", "/result/reliability/expected_calibration_error", Number(4)),
        ]),
        Kind::Reconstruction => columns(&[
            ("tokenizer", "/model", Text),
            ("data", "/data", Text),
            ("images", "/result/images", Number(0)),
            ("PSNR in dB", "/result/psnr", Number(2)),
            ("SSIM", "/result/ssim", Number(4)),
            ("LPIPS", "/result/lpips", Number(4)),
            ("Fréchet (VGG)", "/result/frechet_vgg", Number(4)),
            ("FID (pytorch-fid)", "/result/fid", Number(2)),
            ("ΔE red", "/result/colors/0/delta_e", Number(1)),
            ("yellow", "/result/colors/1/delta_e", Number(1)),
            ("green", "/result/colors/2/delta_e", Number(1)),
            ("cyan", "/result/colors/3/delta_e", Number(1)),
            ("blue", "/result/colors/4/delta_e", Number(1)),
            ("magenta", "/result/colors/5/delta_e", Number(1)),
            ("codebook used", "/result/codebook_used", Share),
            ("perplexity", "/result/perplexity", Number(1)),
        ]),
        Kind::Ablation | Kind::Other => Vec::new(),
    }
}

/// The name of the distance between generated and real images.
fn distance(all: &[&Evaluation]) -> &'static str {
    let is_fid = |evaluation: &&Evaluation| {
        evaluation
            .values
            .pointer("/settings/features")
            .and_then(Value::as_str)
            .is_some_and(|name| name.starts_with("Inception"))
    };
    if all.iter().all(is_fid) { "FID" } else { "distance" }
}

/// The keys of an object in any of the results, in the order of the first one that has them.
fn keys(all: &[&Evaluation], at: &str) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    let objects = all.iter().filter_map(|evaluation| evaluation.values.pointer(at)?.as_object());
    for key in objects.flat_map(|object| object.keys()) {
        if !keys.contains(key) && keys.len() < KEYS {
            keys.push(key.clone());
        }
    }
    keys
}

/// A key as a part of a JSON pointer.
fn pointer(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
