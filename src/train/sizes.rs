//! What the size of a run depends on, without anything of it in memory: vocabulary, tokenizer, segments, micro-batches.

use super::{
    layout::{Entry, layout},
    optimizer,
};
use crate::{
    bounded_read as files,
    bundle::Bundle,
    config::{Config, ImageTokenizer, Task},
    error::{Result, ensure, usage},
    model::{Layout, Modality, activations::Micro, listing, size},
    nn::pattern::Grid,
};
use std::path::Path;

/// Entries of the Chinese BERT vocabulary, assumed where the vocabulary file is not there yet.
const CHINESE_VOCABULARY: usize = 21_128;

/// The sizes that a configuration takes from other files.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// The tokenizer's own configuration where its model folder exists, else what this one repeats of it.
    pub tokenizer: ImageTokenizer,
    /// Whether it was read from that folder; always true of a tokenizer's own task.
    pub tokenizer_found: bool,
    /// Entries of the text vocabulary.
    pub vocabulary: usize,
    /// Whether they were counted in the file or are assumed.
    pub vocabulary_found: bool,
}

impl Sizes {
    /// # Errors
    /// The tokenizer's folder exists and holds a bad configuration.
    pub fn of(config: &Config) -> Result<Self> {
        let file = Path::new(&config.image_tokenizer.path).join("config.toml");
        let (tokenizer, tokenizer_found) = match config.task {
            Task::Generator if config.image_tokenizer.path == "demo" => {
                (Bundle::open("demo")?.image_tokenizer_folder()?.config.image_tokenizer, true)
            }
            Task::Generator if file.is_file() => (Config::load(Some(&file), &[])?.image_tokenizer, true),
            task => (config.image_tokenizer.clone(), task == Task::ImageTokenizer),
        };
        let text = match config.text.vocab.as_str() {
            "demo" => Ok(Bundle::open("demo")?.text()?.vocab_text()),
            path => files::read_text(Path::new(path), files::VOCABULARY),
        };
        let (vocabulary, vocabulary_found) = match text {
            Ok(text) => (text.lines().count(), true),
            Err(_) => (CHINESE_VOCABULARY, false),
        };
        Ok(Self { tokenizer, tokenizer_found, vocabulary, vocabulary_found })
    }

    /// Parameters by part of what the configuration trains.
    pub fn parts(&self, config: &Config) -> Vec<size::Part> {
        let (codes, grid) = (self.tokenizer.codebook_size, self.tokenizer.grid());
        match config.task {
            Task::Generator => size::generator(config, self.vocabulary, codes, grid),
            Task::ImageTokenizer => size::image_tokenizer(&self.tokenizer),
        }
    }

    /// The parameters of each segment as the shard layout sees them.
    fn parameter_groups(&self, config: &Config) -> Vec<Vec<Entry>> {
        let (codes, grid) = (self.tokenizer.codebook_size, self.tokenizer.grid());
        if config.task == Task::ImageTokenizer {
            // Nothing of a tokenizer must lie whole on a rank, so that a segment is cut as if it were one parameter.
            let entry = |len| vec![Entry { name: String::new(), len: len as usize, whole: false }];
            return size::image_tokenizer_segments(&self.tokenizer).map(entry).into();
        }
        let entry = |(name, shape): (String, Vec<usize>)| Entry {
            whole: optimizer::is_muons_by_shape(&config.train, &name, &shape),
            len: shape.iter().product(),
            name,
        };
        let parameter_groups = listing::generator(config, self.vocabulary, codes, grid);
        parameter_groups.into_iter().map(|unit| unit.into_iter().map(entry).collect()).collect()
    }

    /// What each of so many ranks owns where they share everything out, or those of a replica (`train.hsdp_shard_size`).
    pub fn shares(&self, config: &Config, world_size: usize) -> Shares {
        let ranks = if config.train.hsdp_shard_size == 0 { world_size } else { config.train.hsdp_shard_size };
        let parameter_groups = self.parameter_groups(config);
        let lengths: Vec<u64> =
            parameter_groups.iter().map(|unit| unit.iter().map(|entry| entry.len as u64).sum()).collect();
        let (mut owned, mut muons) = (vec![0; ranks], vec![0; ranks]);
        let whole = |unit: &[Entry], name: &str| unit.iter().any(|entry| entry.whole && entry.name == name);
        for (unit, pieces) in parameter_groups.iter().zip(layout(&parameter_groups, ranks)) {
            for (rank, piece) in pieces.iter().enumerate().flat_map(|(rank, p)| p.iter().map(move |p| (rank, p))) {
                let len = piece.range.len() as u64;
                owned[rank] += len;
                muons[rank] += if whole(unit, &piece.name) { len } else { 0 };
            }
        }
        let largest_whole =
            parameter_groups.iter().flatten().filter(|entry| entry.whole).map(|entry| entry.len as u64).max();
        let most = (0..ranks).max_by_key(|&rank| owned[rank]).unwrap_or(0);
        Shares {
            world_size,
            ranks,
            parameter_groups: lengths,
            smallest: owned.iter().copied().min().unwrap_or(0),
            largest: owned.get(most).copied().unwrap_or(0),
            muons: muons.get(most).copied().unwrap_or(0),
            all_muons: muons.iter().sum(),
            largest_muon: largest_whole.unwrap_or(0),
        }
    }

    /// The micro-batches of a rank by list of spans (generator only): the largest of each.
    pub fn micro_batches(&self, config: &Config, ranks: usize) -> Vec<Micro> {
        if config.task != Task::Generator {
            return Vec::new();
        }
        let (height, width) = self.tokenizer.grid();
        let (settings, grid, text) = (&config.train, Grid { height, width }, config.text.max_tokens);
        let micro = |(layout, size, weight): (Layout, usize, f64)| {
            let outputs = match layout.target().modality {
                Modality::Image => self.tokenizer.codebook_size,
                Modality::Text => self.vocabulary,
            };
            let size = if weight == 0.0 { 0 } else { size };
            let samples = samples(size, ranks, settings.accumulation).1;
            Micro { layout, samples, outputs, bytes: 4, copied: 0, again: settings.accumulation > 1 }
        };
        let kinds = [
            (Layout::text_to_image(text, grid), settings.batch_size, settings.image_loss_weight),
            (Layout::image_to_text(grid, text), settings.caption_batch_size, settings.text_loss_weight),
        ];
        kinds.into_iter().map(micro).filter(|micro| micro.samples > 0).collect()
    }
}

/// Whether ranks make only the weights that they own, and never the whole model: they split them, and they are random.
pub fn starts_empty(config: &Config, world_size: usize) -> bool {
    let settings = &config.train;
    let split = world_size > 1 && settings.hsdp_shard_size != 1 && settings.zero_stage == 3;
    split && config.task == Task::Generator && settings.init_from.is_empty()
}

/// What ranks own where they share everything out, in elements.
#[derive(Debug, Clone)]
pub struct Shares {
    pub world_size: usize,
    /// Of a replica.
    pub ranks: usize,
    /// Of each segment.
    pub parameter_groups: Vec<u64>,
    /// Of the rank that owns least and of the one that owns most.
    pub smallest: u64,
    pub largest: u64,
    /// Of matrices that Muon updates, on the rank that owns most.
    pub muons: u64,
    /// The same of all ranks together.
    pub all_muons: u64,
    /// Of the largest matrix that Muon updates.
    pub largest_muon: u64,
}

impl Shares {
    /// All elements.
    pub fn total(&self) -> u64 {
        self.parameter_groups.iter().sum()
    }

    /// Of the largest segment.
    pub fn largest_unit(&self) -> u64 {
        self.parameter_groups.iter().copied().max().unwrap_or(0)
    }
}

/// The smallest and the largest micro-batch of any rank, of a batch of `size`.
pub fn samples(size: usize, ranks: usize, accumulation: usize) -> (usize, usize) {
    let (least, most) = (size / ranks.max(1), size.div_ceil(ranks.max(1)));
    let parts = |samples: usize| accumulation.min(samples).max(1);
    (least / parts(least), most.div_ceil(parts(most)))
}

/// Every rank needs at least one sample of each part of a step, and a place in a replica.
///
/// # Errors
/// A batch is too small, or replicas do not come out even.
pub fn check_ranks(config: &Config, ranks: usize) -> Result<()> {
    let settings = &config.train;
    let replica = settings.hsdp_shard_size;
    let what = format!("train.hsdp_shard_size = {replica} does not divide {ranks} ranks");
    ensure!(replica == 0 || ranks.is_multiple_of(replica), usage(what, "use a divisor, or 0: all ranks"));
    let parts = ranks.saturating_mul(settings.accumulation);
    let batches = [("batch_size", settings.batch_size), ("caption_batch_size", settings.caption_batch_size)];
    for (key, size) in batches.into_iter().filter(|(_, size)| ranks > 1 && *size > 0) {
        let what = format!("train.{key} = {size} gives {ranks} ranks x {} parts no sample each", settings.accumulation);
        ensure!(size >= parts, usage(what, format!("use fewer ranks, or make it at least {parts}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{MatrixOptimizer, Model},
        dist,
    };

    #[test]
    fn micro_batches_are_those_of_the_loop() {
        for (size, ranks, accumulation) in [(1024, 64, 16), (7, 2, 2), (10, 3, 4), (5, 1, 1), (64, 3, 7)] {
            let each = |rank: usize| {
                let mine = dist::part(size, rank, ranks).len();
                let parts = accumulation.min(mine);
                (0..parts).map(move |i| dist::part(mine, i, parts).len())
            };
            let all: Vec<usize> = (0..ranks).flat_map(each).collect();
            let expected = (*all.iter().min().unwrap(), *all.iter().max().unwrap());
            assert_eq!(samples(size, ranks, accumulation), expected, "{size} {ranks} {accumulation}");
        }
    }

    #[test]
    fn shares_add_up_and_differ_by_one_a_segment() {
        let mut config =
            Config { model: Model { layers: 3, hidden: 12, heads: 2, ..Model::default() }, ..Config::default() };
        config.image_tokenizer.image_size = 32;
        let sizes = Sizes::of(&config).unwrap();
        let total: u64 = sizes.parts(&config).iter().map(|(_, count)| count).sum();
        for ranks in [1, 2, 7, 64] {
            let shares = sizes.shares(&config, ranks);
            assert_eq!((shares.total(), shares.parameter_groups.len(), shares.all_muons), (total, 5, 0));
            assert!(shares.largest - shares.smallest <= 5 && shares.largest >= total / ranks as u64);
        }
        config.train.hsdp_shard_size = 2;
        let shares = sizes.shares(&config, 6);
        assert_eq!((shares.world_size, shares.ranks), (6, 2));
        assert!(shares.largest >= total / 2);
        config.train.matrix_optimizer = MatrixOptimizer::Muon;
        let shares = sizes.shares(&config, 2);
        assert_eq!((shares.all_muons, shares.largest_muon), (3 * 12 * 12 * 12, 4 * 12 * 12));
        assert!(shares.muons > 0 && shares.muons < shares.all_muons);
    }

    #[test]
    fn a_tokenizer_s_segments_make_up_all_of_it() {
        let config = Config { task: Task::ImageTokenizer, ..Config::default() };
        let sizes = Sizes::of(&config).unwrap();
        let total: u64 = sizes.parts(&config).iter().map(|(_, count)| count).sum();
        assert_eq!(sizes.shares(&config, 3).total(), total);
        assert!(sizes.micro_batches(&config, 3).is_empty());
    }
}
