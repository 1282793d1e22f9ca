//! `vilg bench`

use super::cache::CacheOptions;
use crate::{
    bench::{self, Report, SHAPES, Shape, attention::Cost},
    config::{self, AttentionKind, Precision},
    error::Result,
    ops::packed::Format,
    report, runtime,
};
use clap::{Subcommand, ValueEnum, builder::PossibleValuesParser};
use serde_json::json;
use std::path::PathBuf;

/// Measure speed and memory on this machine: `train`, `decode` and `attention` on --device, the others on the CPU
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time complete training steps of the generator: forward, backward, gradient clipping, optimizer update
    Train(WorkArgs<Numbers>),
    /// Time complete training steps of the image tokenizer
    Tokenizer(WorkArgs<Numbers>),
    /// Time complete training steps of the image–text matcher
    Matcher(WorkArgs<Numbers>),
    /// Time the image–text matcher's embeddings of images
    Embed(WorkArgs<Numbers>),
    /// Time greedy generation with the KV cache: all codes of one image for each sequence of the batch
    Decode(WorkArgs<Format>),
    Attention(AttentionArgs),
    Data(DataArgs),
}

/// Time reading samples from shards, at random and sequentially
#[derive(clap::Args)]
#[command(
    after_help = "Shards of image codes are recognized by their codes.json; other samples are decoded as in training. The \
    operating system keeps files in memory: for cold storage, read more data than fits."
)]
struct DataArgs {
    /// Shards or folders, as for `vilg data inspect`
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<String>,
    /// Batch size, in samples
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=8192))]
    batch: u16,
    /// Number of reader threads (data.workers)
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: u16,
    /// Samples that each stream of the sequential order shuffles (data.shuffle_buffer)
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    shuffle_buffer: u32,
    /// Side of the images, in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=4096))]
    image_size: u32,
    /// Number of samples that each repetition reads
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    samples: u64,
    /// Number of timed repetitions; the median is reported
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..), allow_negative_numbers = true)]
    repeat: u16,
    #[command(flatten)]
    cache: CacheOptions,
}

#[derive(clap::Args)]
#[command(
    after_help = "Data and weights are random. One extra repetition warms up and is not counted. The peak FLOP/s is measured in \
    the same run, with multiply-adds on registers only. Peak memory is the peak of the whole process."
)]
struct WorkArgs<P: ValueEnum + Clone + Send + Sync + 'static> {
    #[command(flatten)]
    common: Common,
    /// Batch size, in sequences or images [default: given by --shape]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096), allow_negative_numbers = true)]
    batch: Option<u16>,
    /// Number format of the matrix products; for `decode`: of the weights
    #[arg(long, value_name = "P", default_value = "f32")]
    precision: P,
    /// Attention of the generator's layers: sparse (row, column and conv as in the paper) or dense
    #[arg(long, value_name = "KIND", default_value = "sparse")]
    attention: Kind,
}

/// Time attention (forward and backward) with each sparse pattern against the number of image codes
#[derive(clap::Args)]
#[command(
    after_help = "Memory is what the work adds to the memory already in use. `dense n×n` builds the whole attention matrix; \
    the other patterns never do."
)]
struct AttentionArgs {
    #[command(flatten)]
    common: Common,
    /// Side lengths of the square grids of image codes, separated by commas
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "16,32,64",
        value_parser = clap::value_parser!(u16).range(1..=256))]
    sides: Vec<u16>,
    /// Time attention from stock tensor ops, as GPUs run it, instead of the kernels for CPUs
    #[arg(long, conflicts_with = "block")]
    blockwise: bool,
    /// Time one complete transformer block of --shape, on the grid of that shape
    #[arg(long, conflicts_with_all = ["sides", "plot"])]
    block: bool,
    /// Write a plot to this SVG file: time against the number of codes
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Common {
    /// Model size to measure
    #[arg(long, value_name = "NAME", default_value = "perf", value_parser = PossibleValuesParser::new(SHAPES))]
    shape: String,
    /// Number of timed repetitions; the median is reported
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..), allow_negative_numbers = true)]
    repeat: u16,
}

#[derive(Clone, Copy, ValueEnum)]
enum Numbers {
    F32,
    /// bf16 where the processor has fast bf16 instructions, else f32
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Sparse,
    Dense,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let on_devices = matches!(args.command, Command::Train(_) | Command::Decode(_) | Command::Attention(_));
    if !on_devices {
        runtime::cpu_only("this benchmark")?;
    }
    match args.command {
        Command::Train(args) => show(&bench::train(&args.training()?, args.repeat())?, json),
        Command::Tokenizer(args) => show(&bench::tokenizer(&args.training()?, args.repeat())?, json),
        Command::Matcher(args) => show(&bench::matcher(&args.training()?, args.repeat())?, json),
        Command::Embed(args) => show(&bench::embed(&args.training()?, args.repeat())?, json),
        Command::Decode(args) => show(&bench::decode(&args.shape()?, args.precision, args.repeat())?, json),
        Command::Attention(args) => run_attention(&args, json),
        Command::Data(args) => run_data(args, json),
    }
}

fn run_data(args: DataArgs, json: bool) -> Result<()> {
    let sources = args.sources.into_iter().map(|path| config::Source { path, weight: 1.0 }).collect();
    let (workers, shuffle_buffer) = (args.workers.into(), args.shuffle_buffer as usize);
    let speeds = bench::data::data(&bench::data::Reading {
        data: config::Data { sources, workers, shuffle_buffer, ..args.cache.data() },
        image_size: args.image_size,
        batch: args.batch.into(),
        samples: args.samples,
        repeat: args.repeat.into(),
    })?;
    if json {
        report::json(
            &json!({ "batch": args.batch, "workers": workers, "shuffle_buffer": shuffle_buffer, "orders": speeds }),
        );
        return Ok(());
    }
    let rows: Vec<Vec<String>> = speeds
        .iter()
        .map(|speed| {
            let all: Vec<String> = speed.all.iter().map(|n| format!("{n:.0}")).collect();
            vec![speed.order.to_owned(), format!("{:.0}", speed.samples_per_second), all.join(" ")]
        })
        .collect();
    report::table(&["order", "samples/s", "repetitions"], &rows);
    Ok(())
}

impl<P: ValueEnum + Clone + Send + Sync + 'static> WorkArgs<P> {
    fn shape(&self) -> Result<Shape> {
        let mut shape = Shape::named(&self.common.shape)?;
        shape.batch = self.batch.map_or(shape.batch, usize::from);
        shape.config.model.attention = match self.attention {
            Kind::Sparse => AttentionKind::Sparse,
            Kind::Dense => AttentionKind::Dense,
        };
        Ok(shape)
    }

    fn repeat(&self) -> usize {
        usize::from(self.common.repeat)
    }
}

impl WorkArgs<Numbers> {
    fn training(&self) -> Result<Shape> {
        let mut shape = self.shape()?;
        shape.config.train.precision = match self.precision {
            Numbers::F32 => Precision::F32,
            Numbers::Bf16 => Precision::Bf16,
        };
        Ok(shape)
    }
}

fn show(measured: &Report, json: bool) -> Result<()> {
    if json {
        report::json(measured);
    } else {
        report::table(&[], &rows(measured));
    }
    Ok(())
}

fn rows(r: &Report) -> Vec<Vec<String>> {
    let seconds = &r.seconds;
    let giga = |x: f64| format!("{:.1}", x / 1e9);
    let spread = format!("{:.4} to {:.4}, median deviation {:.4}", seconds.min, seconds.max, seconds.mad);
    let of_peak = r.share_of_peak.map_or(String::new(), |share| format!(", {:.0} % of the peak", 100.0 * share));
    let peak = r.peak_flops_per_second.map_or("unknown".to_owned(), giga);
    let lines = [
        ("work", format!("{} {}, batch {}, {}, {} threads", r.shape, r.work, r.batch, r.device, r.threads)),
        ("parameters", format!("{:.1} M", r.parameters as f64 / 1e6)),
        ("seconds", format!("{:.4} (median of {})", seconds.median, seconds.all.len())),
        ("spread", spread),
        ("speed", format!("{:.1} {}/s", r.per_second, r.unit)),
        ("GFLOP/s", format!("{}{of_peak}", giga(r.flops_per_second))),
        ("peak GFLOP/s", peak),
        ("peak memory", memory(r.peak_memory_bytes)),
    ];
    lines.map(|(name, value)| vec![name.to_owned(), value]).to_vec()
}

fn run_attention(args: &AttentionArgs, json: bool) -> Result<()> {
    args.plot.as_ref().map_or(Ok(()), |plot| super::output::check(plot, "--plot"))?;
    let (shape, repeat) = (Shape::named(&args.common.shape)?, usize::from(args.common.repeat));
    let sides: Vec<usize> = args.sides.iter().map(|&side| usize::from(side)).collect();
    let costs = match args.block {
        true => bench::attention::block(&shape, repeat)?,
        false => bench::attention::attention(&shape, &sides, args.blockwise, repeat)?,
    };
    if let Some(path) = &args.plot {
        bench::plot(&costs, path)?;
    }
    if json {
        report::json(&json!({ "work": if args.block { "block" } else { "attention" }, "shape": shape.name,
            "device": runtime::facts().device, "threads": rayon::current_num_threads(), "costs": costs }));
    } else {
        let header = ["codes", "pattern", "milliseconds", "GFLOP/s", "times faster", "memory", "of dense"];
        report::table(&header, &costs.iter().map(row).collect::<Vec<_>>());
    }
    Ok(())
}

fn row(cost: &Cost) -> Vec<String> {
    vec![
        cost.codes.to_string(),
        cost.pattern.to_owned(),
        format!("{:.2}", cost.seconds.median * 1e3),
        format!("{:.1}", cost.flops / cost.seconds.median / 1e9),
        format!("{:.2}", cost.speedup),
        memory(cost.memory_bytes),
        cost.memory_share.map_or(String::new(), |share| format!("{:.0} %", 100.0 * share)),
    ]
}

fn memory(bytes: Option<u64>) -> String {
    bytes.map_or("unknown".to_owned(), |bytes| format!("{:.3} GB", bytes as f64 / 1e9))
}
