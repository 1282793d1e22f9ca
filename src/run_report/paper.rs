//! Figures of the paper (arXiv 2112.15283), for the metrics that are the same as ours.

/// A result of the paper: what it is of, and figures by the name of the metric.
pub struct Result {
    pub of: &'static str,
    pub figures: &'static [(&'static str, f64)],
}

/// FID on MS-COCO's validation set, 30,000 captions translated to Chinese, by DM-GAN's protocol.
pub const FID: [Result; 4] = [
    Result { of: "ERNIE-ViLG 10 B, zero-shot, best of 60", figures: &[("FID", 14.7)] },
    Result { of: "ERNIE-ViLG 10 B, fine-tuned, best of 10", figures: &[("FID", 7.9)] },
    Result { of: "DALL-E, zero-shot", figures: &[("FID", 27.5)] },
    Result { of: "CogView, zero-shot", figures: &[("FID", 27.1)] },
];

/// Caption metrics on characters, in percent, after fine-tuning.
pub const CAPTIONS: [Result; 2] = [
    Result {
        of: "ERNIE-ViLG 10 B, AIC-ICC validation",
        figures: &[("Bleu_4", 68.2), ("METEOR", 41.7), ("ROUGE_L", 72.5), ("CIDEr", 231.4)],
    },
    Result {
        of: "ERNIE-ViLG 10 B, COCO-CN test",
        figures: &[("Bleu_4", 50.0), ("METEOR", 31.6), ("ROUGE_L", 60.3), ("CIDEr", 138.2)],
    },
];

/// FID of a row of the ablation, by the codes and the reconstructor as `vilg eval ablation` names them: 300 M parameters,
/// MS-COCO's validation set, zero-shot. The paper has no images of a two-stage generator through an end-to-end reconstructor.
pub fn ablation(codes: &str, reconstructor: &str) -> Option<f64> {
    match (codes, reconstructor) {
        ("two-stage", "two-stage") => Some(41.4),
        ("end-to-end", "two-stage") => Some(40.5),
        ("end-to-end", "end-to-end") => Some(39.9),
        ("gold", "two-stage") => Some(21.7),
        ("gold", "end-to-end") => Some(18.6),
        _ => None,
    }
}
