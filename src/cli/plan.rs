//! `vilg plan`

use super::{
    config::Source,
    plan_roofline,
    summary::{grouped, rounded},
};
use crate::{
    config::{Config, Offload},
    error::{Error, Result, ensure, hint_of, usage},
    report,
    runtime::Kernels,
    train::{
        decoding_time::{DecodingTime, Generation},
        fit::Fit,
        held::{Held, held},
        memory::{Cluster, Row},
        roofline::{Bandwidths, Roofline},
        sizes::{Shares, Sizes, check_ranks},
    },
};
use clap::ValueEnum;
use serde_json::json;

/// Estimate memory, traffic and time on N GPUs for each ZeRO stage, and say which settings fit
#[derive(clap::Args)]
#[command(
    after_help = "All figures are computed: nothing is allocated, and neither data nor vocabulary need to exist. A GB is 10^9 \
    bytes. --on cpu plans for the ranks of `vilg train --nproc N` on CPUs, where all numbers are f32."
)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Number of GPUs, one rank each; with --on cpu: number of ranks
    #[arg(long, visible_alias = "ranks", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    gpus: u32,
    /// Memory of one GPU in GB; with --on cpu: memory of one rank, optional
    #[arg(long, value_name = "GB")]
    gpu_memory: Option<f64>,
    /// Model FLOPs utilization: share of the GPU's peak, without recomputation, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.4)]
    mfu: f64,
    /// Peak of one GPU in TFLOP/s (an A100 has 312 in bf16)
    #[arg(long, value_name = "N", default_value_t = 312.0)]
    gpu_tflops: f64,
    /// Also estimate how long N images take to generate on these GPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "on")]
    generate: Option<u32>,
    /// With --generate: candidates of each image
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024),
        requires = "generate", allow_negative_numbers = true)]
    best_of: u32,
    /// With --generate: candidates that a GPU decodes together
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536),
        requires = "generate", allow_negative_numbers = true)]
    generate_batch: u32,
    /// With --generate or --roofline: memory bandwidth of one GPU in TB/s (an A100 of 80 GB has 2.0, an H100 3.35)
    #[arg(long, value_name = "N", default_value_t = 2.0)]
    gpu_bandwidth: f64,
    /// Also compute the least time of a step from the FLOPs, bytes and launches of each op, with and without fused kernels
    #[arg(long, conflicts_with = "on")]
    roofline: bool,
    /// With --roofline: bandwidth from one GPU to the others in GB/s
    #[arg(long, value_name = "N", default_value_t = 50.0, requires = "roofline")]
    gpu_network: f64,
    /// With --roofline: bandwidth from one GPU to its host in GB/s
    #[arg(long, value_name = "N", default_value_t = 25.0, requires = "roofline")]
    gpu_host: f64,
    /// Hardware that the ranks run on
    #[arg(long, value_enum, default_value = "gpu")]
    on: Device,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Device {
    Gpu,
    Cpu,
}

pub fn run(args: Args, json: bool) -> Result<()> {
    let config = args.source.load("10b")?;
    let hint = "for example --gpus 8 --gpu-memory 80 --mfu 0.4 --gpu-tflops 312";
    let known = args.gpu_memory.is_some() || args.on == Device::Cpu;
    ensure!(known, usage("--gpu-memory is missing", hint));
    let positive = |name: &str, value: f64, most: f64| {
        let ok = value.is_finite() && value > 0.0 && value <= most;
        ensure!(ok, usage(format!("--{name} = {value}: must be above 0, at most {most}"), hint));
        Ok(())
    };
    args.gpu_memory.map_or(Ok(()), |memory| positive("gpu-memory", memory, 1e6))?;
    positive("mfu", args.mfu, 1.0)?;
    positive("gpu-tflops", args.gpu_tflops, 1e6)?;
    positive("gpu-bandwidth", args.gpu_bandwidth, 1e3)?;
    positive("gpu-network", args.gpu_network, 1e5)?;
    positive("gpu-host", args.gpu_host, 1e5)?;
    let sizes = Sizes::of(&config)?;
    let (gpus, memory_bytes) = (args.gpus as usize, (args.gpu_memory.unwrap_or(0.0) * 1e9) as u64);
    match args.on {
        Device::Gpu => {
            let cluster = Cluster { gpus, memory_bytes, tflops: args.gpu_tflops, mfu: args.mfu };
            let wanted = args.generate.map(|images| Generation {
                images: images.into(),
                best_of: args.best_of.into(),
                batch: args.generate_batch.into(),
                bandwidth: args.gpu_bandwidth,
            });
            let none = || usage(format_args!("{} generates no images", config.name), "leave out --generate");
            let time = |wanted| DecodingTime::of(&config, &sizes, &cluster, wanted).ok_or_else(none);
            let generation = wanted.map(|wanted| Ok::<_, Error>((wanted, time(wanted)?))).transpose()?;
            let bandwidths = Bandwidths { memory: args.gpu_bandwidth, network: args.gpu_network, host: args.gpu_host };
            let with = |kernels| Roofline::of(&config, &sizes, &cluster, bandwidths, kernels);
            let wanted = [Kernels::Stock, Kernels::Fused].into_iter().filter(|_| args.roofline);
            let rooflines: Option<Vec<Roofline>> = wanted.map(with).collect();
            let none = || usage(format_args!("{} is no generator", config.name), "leave out --roofline");
            on_gpus(&config, &sizes, cluster, generation, &rooflines.ok_or_else(none)?, json);
        }
        Device::Cpu => on_cpus(&config, &sizes, gpus, args.gpu_memory.map(|_| memory_bytes), json),
    }
    Ok(())
}

fn on_gpus(
    config: &Config,
    sizes: &Sizes,
    cluster: Cluster,
    generation: Option<(Generation, DecodingTime)>,
    rooflines: &[Roofline],
    json: bool,
) {
    let fit = Fit::of(config, sizes, cluster);
    let refusal = check_ranks(sizes.spec, config, cluster.gpus).err();
    if json {
        let refusal = refusal.as_ref().map(ToString::to_string);
        let generation = generation.map(|(wanted, time)| json!({ "images": wanted, "time": time }));
        return report::json(&json!({ "plan": fit, "vocabulary": sizes.inputs.vocabulary, "refused": refusal,
            "generation": generation, "rooflines": rooflines, "attention_scores_bytes": sizes.attention_scores(config, cluster.gpus) }));
    }
    let gpus = if cluster.gpus == 1 { "GPU" } else { "GPUs" };
    report::result(format_args!(
        "{}: {} parameters on {} {gpus} of {} GB",
        config.name,
        rounded(fit.parameters),
        cluster.gpus,
        cluster.memory_bytes as f64 / 1e9,
    ));
    let Cluster { mfu, tflops, .. } = cluster;
    report::result(format_args!(
        "step: {:.2e} FLOP, {} s at an MFU of {mfu} and {tflops} TFLOP/s a GPU (312: A100, bf16), traffic hidden; \
        micro-steps: {}\nrun: {} steps, {} days",
        fit.flops,
        short(fit.seconds),
        fit.micro_steps,
        config.train.steps,
        short(fit.days)
    ));
    rows(config, &fit);
    activations(&fit);
    if let Some([scores, matrix]) = sizes.attention_scores(config, cluster.gpus) {
        report::result(format_args!(
            "largest tensor of attention: {} GB of scores for a micro-batch; the full n×n matrix would take {} GB",
            gb(scores),
            gb(matrix)
        ));
    }
    if !rooflines.is_empty() {
        plan_roofline::print(rooflines);
    }
    verdict(config, &fit);
    print_refusal(config, cluster.gpus, refusal);
    if let Some((wanted, time)) = generation {
        print_generation(&wanted, &time);
    }
}

/// Prints how long many images take.
fn print_generation(wanted: &Generation, time: &DecodingTime) {
    let Generation { images, best_of, batch, bandwidth } = wanted;
    let DecodingTime { steps, weights_ms, cache_ms, compute_ms, hours } = time;
    report::result(format_args!(
        "\n{images} images, best of {best_of}: {} hours\n\
        a step of decoding {batch} candidates, {steps} an image: {} ms for weights and {} ms for cached keys and values at \
        {bandwidth} TB/s, or {} ms for FLOPs if that is more; ranking and the image tokenizer are not counted",
        short(*hours),
        short(*weights_ms),
        short(*cache_ms),
        short(*compute_ms),
    ));
}

/// Prints why `vilg train` would refuse this configuration on `ranks` ranks, and the next step.
fn print_refusal(config: &Config, ranks: usize, refusal: Option<Error>) {
    if let Some(error) = refusal {
        report::result(format_args!("`vilg train` refuses: {error}"));
        report::result(format_args!("hint: {}", refused(config, ranks, &error)));
    }
}

/// The hint for a refused configuration: the largest `train.accumulation` that gives every micro-step a sample on each
/// rank, if there is one.
fn refused(config: &Config, ranks: usize, error: &Error) -> String {
    let train = &config.train;
    let least = train.generator_batches().into_iter().filter(|size| *size > 0).min();
    match least.map(|size| size / ranks) {
        Some(parts) if parts > 0 => format!("train.accumulation = {parts}"),
        _ => hint_of(error).unwrap_or_default().to_owned(),
    }
}

fn rows(config: &Config, fit: &Fit) {
    report::result("\nGB a GPU, the fullest one's:");
    let header = [
        "  stage",
        "offload",
        "weights",
        "gradients",
        "optimizer",
        "working set",
        "| these",
        "under way",
        "average",
        "activations",
        "| all",
        "fits",
        "| host",
        "traffic a step",
    ];
    let row = |row: &Row| {
        let kinds = row.kinds;
        let same = (row.stage, row.offload) == (config.train.zero_stage, config.train.offload != Offload::None);
        let own = if same { "*" } else { " " };
        vec![
            format!(" {own}{}", row.stage),
            if row.offload { "cpu" } else { "none" }.into(),
            gb(kinds.weights),
            gb(kinds.gradients),
            gb(kinds.optimizer),
            gb(kinds.working_set),
            format!("| {}", gb(row.states_bytes)),
            gb(kinds.under_way),
            gb(kinds.average),
            kinds.activations.map_or("unknown".into(), gb),
            format!("| {}", gb(row.total_bytes)),
            if row.fits { "yes" } else { "no" }.into(),
            format!("| {}", gb(row.host_bytes)),
            gb(row.traffic_bytes),
        ]
    };
    report::table(&header, &fit.rows.iter().map(row).collect::<Vec<_>>());
    report::result(
        "  * train.zero_stage; gradients are fp32, the optimizer's are fp32 master weights and moments; fits: with 1 GB left over",
    );
}

fn activations(fit: &Fit) {
    let all = [
        fit.activations_kept,
        fit.activations_recomputed,
        fit.activations_kept_fused,
        fit.activations_recomputed_fused,
    ];
    if let [Some(kept), Some(recomputed), Some(kept_fused), Some(recomputed_fused)] = all.map(|bytes| bytes.map(gb)) {
        report::result(format_args!(
            "\nactivations of a micro-step: {kept} GB with train.activation_checkpointing = 0, {recomputed} GB with 1; \
            with --kernels fused {kept_fused} and {recomputed_fused} GB"
        ));
    }
}

fn verdict(config: &Config, fit: &Fit) {
    let place = if config.train.offload == Offload::None { "on the GPU" } else { "on the host" };
    let own = format!("train.zero_stage = {}, optimizer state {place}", config.train.zero_stage);
    if fit.fits {
        return report::result(format_args!("\nthe configuration fits ({own})"));
    }
    report::result(format_args!("\nthe configuration does not fit ({own})"));
    let hint = match (&fit.change[..], fit.gpus_needed) {
        ([], Some(gpus)) => format!("no settings fit; at least {gpus} of these GPUs are needed"),
        ([], None) => "no settings fit on any number of these GPUs; use larger ones or a smaller model".into(),
        (keys, _) => keys.join(", "),
    };
    report::result(format_args!("hint: {hint}"));
}

fn on_cpus(config: &Config, sizes: &Sizes, ranks: usize, memory: Option<u64>, json: bool) {
    let shares = sizes.shares(config, ranks);
    let stages: Vec<Held> = (0..=3).map(|stage| held(config, sizes, &shares, stage)).collect();
    let fits = |held: &Held| memory.map(|memory| held.peak() <= memory);
    let refusal = check_ranks(sizes.spec, config, ranks).err();
    if json {
        let stages: Vec<_> = (0..).zip(&stages).map(|(stage, held)| held_json(stage, held, fits(held))).collect();
        let refusal = refusal.as_ref().map(ToString::to_string);
        return report::json(&json!({
            "parameters": shares.total(), "ranks": ranks, "largest_rank": shares.largest,
            "smallest_rank": shares.smallest, "stages": stages, "refused": refusal,
        }));
    }
    report::result(format_args!("{}: {} parameters, f32", config.name, rounded(shares.total())));
    print_shares(&shares);
    report::result("\nGB a rank, the fullest one's:");
    let own = |stage: u8| if stage == config.train.zero_stage { "*" } else { " " };
    let rows: Vec<Vec<String>> =
        (0..).zip(&stages).map(|(stage, held)| held_row(format!(" {}{stage}", own(stage)), held, fits(held))).collect();
    print_held(&rows);
    print_refusal(config, ranks, refusal);
}

/// Prints how many elements the largest and the smallest shard hold.
pub fn print_shares(shares: &Shares) {
    let (least, most) = (grouped(shares.smallest), grouped(shares.largest));
    let Shares { world_size, ranks, .. } = shares;
    let split = if ranks == world_size { "they".into() } else { format!("{ranks} at a time") };
    report::result(format_args!(
        "ranks: {world_size}, of which each owns {least} to {most} elements where {split} split them"
    ));
}

/// The memory of one rank as JSON, in bytes.
pub fn held_json(stage: u8, held: &Held, fits: Option<bool>) -> serde_json::Value {
    json!({
        "stage": stage, "bytes": held, "between_steps": held.between_steps(), "step": held.step(),
        "peak": held.peak(), "fits": fits,
    })
}

/// The memory of one rank as a row of [`print_held`], in GB.
pub fn held_row(name: String, held: &Held, fits: Option<bool>) -> Vec<String> {
    let unknown = || "unknown".to_owned();
    let fits = fits.map(|fits| if fits { "yes" } else { "no" });
    let kinds = [held.weights, held.gradients, held.sums, held.moments, held.average];
    let mut row = vec![name];
    row.extend(kinds.map(gb));
    row.extend([held.activations.map_or_else(unknown, gb), held.working.map_or_else(unknown, gb)]);
    row.push(format!("| {}", gb(held.step())));
    row.extend([held.start, held.checkpoint].map(gb));
    row.extend(fits.map(str::to_owned));
    row
}

/// Prints the rows of [`held_row`] with a legend.
pub fn print_held(rows: &[Vec<String>]) {
    let header = [
        "  stage",
        "weights",
        "gradients",
        "sums",
        "moments",
        "average",
        "activations",
        "working",
        "| step",
        "start",
        "checkpoint",
        "fits",
    ];
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    report::table(&header[..columns.min(header.len())], rows);
    report::result(
        "  working: activations with what one segment and collectives add; step: the five kinds and working; start, \
        checkpoint:\n  at most, as the run starts and while a checkpoint is written; the allocator's gaps come on top",
    );
}

/// Formats bytes as GB.
fn gb(bytes: u64) -> String {
    short(bytes as f64 / 1e9)
}

/// Formats a number with about three digits.
fn short(number: f64) -> String {
    match number {
        0.0 => "0".into(),
        n if n >= 100.0 => format!("{n:.0}"),
        n if n >= 10.0 => format!("{n:.1}"),
        n if n >= 0.1 => format!("{n:.2}"),
        n if n >= 0.001 => format!("{n:.4}"),
        n => format!("{n:.1e}"),
    }
}
