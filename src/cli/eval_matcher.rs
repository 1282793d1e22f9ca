//! `vilg eval matcher`

use super::{model::MatcherOption, output};
use crate::{
    bundle::Bundle,
    error::{Result, ensure, failed, usage},
    eval::{
        Rate,
        matcher::{
            Samples,
            calibration::calibrate,
            classes::{Classes, Classification},
            pairs::half_shuffled,
            reliability::{Bin, Reliability},
            retrieval::{Candidates, Recall, Retrieval, among_candidates, retrieval},
        },
    },
    generate::Matching,
    report,
};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Measure a matcher: retrieval in both directions, scores, zero-shot classification; or calibrate its scores
#[derive(clap::Args)]
#[command(
    after_help = "Recall is that of Chinese-CLIP's evaluation: all captions of an image count as right, and so do equal \
    captions; ties count against the model. Intervals are 95 % Wilson intervals.\n\n\
    --calibrate fits the score σ(a · cosine + b) by logistic regression on half of the samples: each image with its own \
    caption and with that of another sample. A score above 0.5 then means: more likely a pair than not, where pairs and \
    others are equally frequent. a and b are stored in the model folder, and the other half of the samples shows how \
    reliable the scores are.\n\n\
    --classes measures zero-shot classification instead: captions are not needed."
)]
pub struct Args {
    /// Tar shards (`DIR/{00000..00012}.tar`, `DIR/*.tar`), folders of shards, or folders of image-caption pairs
    #[arg(long, value_name = "SRC", required = true, num_args = 1..)]
    data: Vec<String>,
    /// Number of samples to measure, from the first on; 0: all
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    samples: usize,
    /// Also measure R@1 among K samples: groups of K, in an order chosen by --seed
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(2..), conflicts_with = "calibrate")]
    candidates: Option<u32>,
    /// Fit the calibration of the score and store it in the model folder
    #[arg(long)]
    calibrate: bool,
    /// SVG file to write: the reliability diagram of the scores
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Text file with the name of a class on each line: measure zero-shot classification
    #[arg(long, value_name = "FILE", conflicts_with_all = ["calibrate", "candidates", "plot"])]
    classes: Option<PathBuf>,
    /// Text file with a template on each line, `{}` in place of the name of the class [default: 一张{}的图片]
    #[arg(long, value_name = "FILE", requires = "classes")]
    templates: Option<PathBuf>,
    /// JSON field with the class of a sample, by its name or by its number from 0 on [default: the folder's name]
    #[arg(long, value_name = "KEY", requires = "classes")]
    label: Option<String>,
    /// Random seed of the shuffling
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    #[command(flatten)]
    model: MatcherOption,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    args.plot.as_ref().map_or(Ok(()), |file| output::check(file, "--plot"))?;
    let (bundle, matching) = args.model.load()?;
    if let Some(classes) = &args.classes {
        return classify(args, &matching, classes, json);
    }
    if args.calibrate {
        bundle.calibration_folder()?;
    }
    let hint = "calibrate the model first, or plot while you do, with --calibrate";
    let message = format!("{} is not calibrated, so that there are no scores to plot", args.model.name());
    ensure!(args.plot.is_none() || args.calibrate || matching.is_calibrated(), usage(message, hint));
    let samples = Samples::read(&matching, &args.data, args.samples, true, None)?;
    if args.calibrate {
        return store_calibration(args, &bundle, &samples, json);
    }
    measure(args, &matching, &samples, json)
}

fn store_calibration(args: &Args, bundle: &Bundle, samples: &Samples, json: bool) -> Result<()> {
    let found = calibrate(samples, args.seed)?;
    plot(args, &found.reliability)?;
    bundle.calibrate(found.calibration)?;
    if json {
        report::json(&json!({ "model": args.model.name(), "data": args.data, "seed": args.seed, "result": found }));
        return Ok(());
    }
    let [slope, offset] = found.calibration;
    report::result(format_args!("score = σ({slope:.4} · cosine {offset:+.4}), stored in {}", bundle.name()));
    report::result(format_args!("fitted on {} samples; on others:", found.fitted_on));
    print_reliability(&found.reliability);
    Ok(())
}

fn measure(args: &Args, matching: &Matching, samples: &Samples, json: bool) -> Result<()> {
    let count = samples.captions.len();
    ensure!(count > 1, failed("retrieval needs at least two samples", "give more data with --data"));
    let found = retrieval(samples)?;
    let candidates = args.candidates.map(|count| among_candidates(samples, count as usize, args.seed)).transpose()?;
    let scores = match matching.is_calibrated() {
        true => {
            let pairs = half_shuffled(samples, &(0..count).collect::<Vec<_>>(), args.seed)?;
            Some(Reliability::new(&pairs, |cosine| matching.score(cosine).unwrap_or_default()))
        }
        false => None,
    };
    scores.as_ref().map_or(Ok(()), |scores| plot(args, scores))?;
    if json {
        report::json(&json!({ "model": args.model.name(), "data": args.data, "seed": args.seed, "retrieval": found,
            "candidates": candidates, "scores": scores }));
    } else {
        print(&found, candidates.as_ref(), scores.as_ref());
    }
    if scores.is_none() {
        report::warn(format_args!("{}; scores are not measured", args.model.calibrate_hint()));
    }
    Ok(())
}

fn plot(args: &Args, reliability: &Reliability) -> Result<()> {
    args.plot.as_ref().map_or(Ok(()), |file| reliability.plot(file))
}

fn classify(args: &Args, matching: &Matching, classes: &Path, json: bool) -> Result<()> {
    let classes = Classes::open(matching, classes, args.templates.as_deref())?;
    let samples = Samples::read(matching, &args.data, args.samples, false, args.label.as_deref())?;
    let found = classes.classify(&samples)?;
    if json {
        report::json(&json!({ "model": args.model.name(), "data": args.data, "classification": found }));
        return Ok(());
    }
    let Classification { classes, templates, top1, top5, chance_top1, .. } = &found;
    report::result(format_args!("zero-shot classification, {classes} classes, {templates} templates"));
    report::result(format_args!("top-1  {top1}  chance {:.1} %", 100.0 * chance_top1));
    report::result(format_args!("top-5  {top5}"));
    Ok(())
}

fn print(found: &Retrieval, candidates: Option<&Candidates>, scores: Option<&Reliability>) {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let row = |name: &str, recall: &Recall| {
        let rates = [recall.r1.rate, recall.r5.rate, recall.r10.rate, recall.mean_recall];
        std::iter::once(name.to_owned()).chain(rates.map(percent)).collect()
    };
    report::result(format_args!("{} images, {} captions", found.images, found.captions));
    let rows = [row("image to text", &found.image_to_text), row("text to image", &found.text_to_image)];
    report::table(&["retrieval", "R@1", "R@5", "R@10", "mean recall"], &rows);
    report::result(format_args!("mean recall of both directions: {}", percent(found.mean_recall)));
    if let Some(Candidates { candidates, chance, image_to_text, text_to_image }) = candidates {
        let chance = percent(*chance);
        report::result(format_args!("R@1 among {candidates} candidates (chance {chance}):"));
        report::result(format_args!("image to text  {image_to_text}"));
        report::result(format_args!("text to image  {text_to_image}"));
    }
    if let Some(scores) = scores {
        report::result("scores of pairs of which half are shuffled:");
        print_reliability(scores);
    }
}

fn print_reliability(found: &Reliability) {
    let row = |(at, bin): (usize, &Bin)| {
        let share = |x: f64| if bin.count == 0 { "-".to_owned() } else { format!("{x:.3}") };
        let range = format!("{:.1} to {:.1}", at as f64 / 10.0, (at + 1) as f64 / 10.0);
        vec![range, share(bin.mean_score), share(bin.true_pairs), bin.count.to_string()]
    };
    let rows: Vec<Vec<String>> = found.bins.iter().enumerate().map(row).collect();
    report::table(&["score", "mean score", "true pairs", "count"], &rows);
    report::result(format_args!("expected calibration error  {:.4}", found.expected_calibration_error));
    let one = |name: &str, rate: &Rate| report::result(format_args!("{name} at 0.5  {rate}"));
    one("precision", &found.precision);
    one("recall", &found.recall);
}
