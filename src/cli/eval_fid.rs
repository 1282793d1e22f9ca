//! `vilg eval fid`

use super::output;
use crate::{
    error::{Context, Hint, Result, ensure, usage},
    eval::fid::{
        self, FEATURES, Features, Gaussian, Inception, InceptionScore, Kid, PrecisionRecall, Protocol, Settings,
    },
    report, runtime,
};
use clap::ValueEnum;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Measure generated images against real ones: FID, KID, precision and recall, Inception Score
#[derive(clap::Args)]
#[command(
    after_help = "A and B are shards, folders of images, or statistics (.npz files with `mu` and `sigma`, as pytorch-fid saves \
    them). Two files of statistics need no --inception. Images keep their size until the protocol resizes them.\n\n\
    Figures of different protocols cannot be compared: name the protocol beside a figure. FID and the Inception Score also \
    depend on the number of images; 30,000 and 50,000 are usual, and below 2,048 the FID is much too high. KID is without \
    such a bias."
)]
pub struct Args {
    /// Generated images, or statistics of them
    #[arg(value_name = "A")]
    generated: String,
    /// Real images, or statistics of them. With --save-stats: the .npz file to write
    #[arg(value_name = "B")]
    real: String,
    /// Folder written by `vilg import inception`
    #[arg(long, value_name = "DIR")]
    inception: Option<PathBuf>,
    /// How images become features
    #[arg(long, value_enum, default_value_t = Protocol::PytorchFid)]
    protocol: Protocol,
    /// What to measure, separated by commas. All but fid need images; is needs only A
    #[arg(long, value_enum, value_name = "METRIC", value_delimiter = ',', default_value = "fid")]
    metrics: Vec<Metric>,
    /// Save statistics of A in the file B instead of comparing
    #[arg(long, conflicts_with = "metrics")]
    save_stats: bool,
    /// Number of images of each side, chosen by --seed; 0: all
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    samples: usize,
    /// Number of images in each of KID's 100 subsets
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    kid_subset_size: u32,
    /// Random seed of the choice of images, subsets and splits
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Metric {
    /// Fréchet Inception Distance
    Fid,
    /// Kernel Inception Distance
    Kid,
    /// Precision and recall
    Prc,
    /// Inception Score
    Is,
}

/// One side of the comparison.
struct Side {
    gaussian: Gaussian,
    /// Number of images, and their features if they were wanted; statistics have neither.
    images: Option<usize>,
    features: Option<candle_core::Tensor>,
}

/// What was measured.
#[derive(Default)]
struct Found {
    fid: Option<f64>,
    kid: Option<Kid>,
    precision_recall: Option<PrecisionRecall>,
    inception_score: Option<InceptionScore>,
}

pub fn run(args: &Args, json: bool) -> Result<()> {
    check(args)?;
    let images = [&args.generated, &args.real].into_iter().any(|path| !is_statistics(path));
    let network = if images { Some(network(args)?) } else { None };
    if args.save_stats {
        return save(args, network.as_ref(), json);
    }
    let [a, b] = [&args.generated, &args.real].map(|path| side(args, path, network.as_ref()));
    let (a, b) = (a?, b?);
    let found = measure(args, network.as_ref(), &a, &b)?;
    if json {
        report::json(&json!({
            "a": args.generated, "b": args.real, "protocol": args.protocol.name(), "images": [a.images, b.images],
            "seed": args.seed, "fid": found.fid, "kid": found.kid, "precision_recall": found.precision_recall,
            "inception_score": found.inception_score,
        }));
    } else {
        print(args, &found, [a.images, b.images]);
    }
    Ok(())
}

/// Refuses what cannot be measured before hours of work.
fn check(args: &Args) -> Result<()> {
    let hint = "give images instead of statistics";
    if args.save_stats {
        let message = "--save-stats needs images as A and a name that ends in .npz as B";
        ensure!(
            !is_statistics(&args.generated) && is_statistics(&args.real),
            usage(message, "vilg eval fid --save-stats DIR B.npz")
        );
        let file = Path::new(&args.real);
        ensure!(!file.exists(), usage(format_args!("{} exists", args.real), "choose another file"));
        return output::check(file, "B");
    }
    let wants = |metric| args.metrics.contains(&metric);
    let both = wants(Metric::Kid) || wants(Metric::Prc);
    ensure!(
        !(both && is_statistics(&args.real)),
        usage(format_args!("{} has no features of single images", args.real), hint)
    );
    let one = both || wants(Metric::Is);
    ensure!(
        !(one && is_statistics(&args.generated)),
        usage(format_args!("{} has no features of single images", args.generated), hint)
    );
    let tensorflow = args.protocol.weights() == fid::Weights::TensorFlow;
    let message = "the Inception Score is defined for TensorFlow's weights";
    ensure!(!wants(Metric::Is) || tensorflow, usage(message, "choose --protocol pytorch-fid, or leave out is"));
    Ok(())
}

fn is_statistics(path: &str) -> bool {
    path.ends_with(".npz")
}

fn network(args: &Args) -> Result<Inception> {
    let message = "--inception is missing: features of images need the network";
    let folder =
        args.inception.as_ref().ok_or_else(|| usage(message, "`vilg import inception SRC DIR` writes its folder"))?;
    Inception::open(folder, args.protocol.weights(), &runtime::device()?)
}

fn extract(args: &Args, path: &str, network: Option<&Inception>) -> Result<Features> {
    let keep = args.metrics.iter().any(|metric| *metric != Metric::Fid);
    let settings = Settings { protocol: args.protocol, samples: args.samples, seed: args.seed, keep };
    let found = fid::extract(network.context("no network")?, path, &settings)?;
    if found.moments.count() < FEATURES && (args.save_stats || args.metrics.contains(&Metric::Fid)) {
        let count = found.moments.count();
        report::warn(format_args!(
            "`{path}` has only {count} images; the FID of fewer than {FEATURES} is much too high"
        ));
    }
    Ok(found)
}

fn side(args: &Args, path: &str, network: Option<&Inception>) -> Result<Side> {
    if is_statistics(path) {
        let gaussian = fid::read_statistics(Path::new(path), args.protocol)?;
        return Ok(Side { gaussian, images: None, features: None });
    }
    let Features { moments, all } = extract(args, path, network)?;
    let images = moments.count();
    let gaussian = moments.gaussian().hint(format_args!("`{path}` has too few images"), "give at least two")?;
    Ok(Side { gaussian, images: Some(images), features: all })
}

fn save(args: &Args, network: Option<&Inception>, json: bool) -> Result<()> {
    let moments = extract(args, &args.generated, network)?.moments;
    let images = moments.count();
    fid::write_statistics(Path::new(&args.real), &moments.gaussian()?, args.protocol)?;
    if json {
        report::json(
            &json!({ "a": args.generated, "path": args.real, "protocol": args.protocol.name(), "images": images }),
        );
    } else {
        report::note(format_args!("wrote statistics of {images} images ({}) to {}", args.protocol.name(), args.real));
    }
    Ok(())
}

fn measure(args: &Args, network: Option<&Inception>, a: &Side, b: &Side) -> Result<Found> {
    let mut found = Found::default();
    for metric in &args.metrics {
        match metric {
            Metric::Fid => found.fid = Some(a.gaussian.distance(&b.gaussian)?),
            Metric::Kid => {
                let (a, b) = (features(a)?, features(b)?);
                found.kid = Some(fid::kid(a, b, args.kid_subset_size as usize, args.seed)?);
            }
            Metric::Prc => found.precision_recall = Some(fid::precision_recall(features(a)?, features(b)?)?),
            Metric::Is => {
                let logits = network.context("no network")?.logits(features(a)?)?;
                found.inception_score = Some(fid::inception_score(&logits, args.seed)?);
            }
        }
    }
    Ok(found)
}

fn features(side: &Side) -> Result<&candle_core::Tensor> {
    side.features.as_ref().context("features were not kept")
}

fn print(args: &Args, found: &Found, images: [Option<usize>; 2]) {
    report::result(format_args!("protocol {}: {}", args.protocol.name(), args.protocol.description()));
    for (name, path, images) in [("A", &args.generated, images[0]), ("B", &args.real, images[1])] {
        let what = images.map_or("statistics".to_owned(), |count| format!("{count} images"));
        report::result(format_args!("{name}  {what} in {path}"));
    }
    if let Some(fid) = found.fid {
        report::result(format_args!("FID  {fid:.4}"));
    }
    if let Some(Kid { mean, std, standard_error, subsets, subset_size }) = &found.kid {
        report::result(format_args!(
            "KID  {mean:.6}  standard error {standard_error:.6}, standard deviation {std:.6} ({subsets} subsets of {subset_size})"
        ));
    }
    if let Some(PrecisionRecall { precision, recall, neighbours }) = &found.precision_recall {
        report::result(format_args!("precision  {precision:.4}  recall  {recall:.4} ({neighbours} neighbours)"));
    }
    if let Some(InceptionScore { mean, std, splits }) = &found.inception_score {
        report::result(format_args!("Inception Score of A  {mean:.4}  standard deviation {std:.4} ({splits} splits)"));
    }
}
