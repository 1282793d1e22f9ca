//! Section `[data]`.

use serde::{Deserialize, Serialize};

/// Section `[data]`: where samples come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// Data sources that are mixed. Default: none.
    pub sources: Vec<Source>,
    /// Samples that are not trained on, in the forms of a source's `path`: their losses are measured every
    /// `train.validate_every` steps. Empty (default): none.
    pub validation: String,
    /// Number of batches to read ahead. Default 4.
    pub prefetch: usize,
    /// Number of reader threads. Default 1.
    pub workers: usize,
    /// How samples are ordered. 0 (default): at random over all shards, each read by itself. N: shards are read from their
    /// start to their end, in `train.batch_size` streams, and N consecutive samples of a stream are shuffled in memory; for
    /// data on network storage or hard disks.
    pub shuffle_buffer: usize,
    /// JSON fields whose texts are the captions of a sample, each a text or a list of texts; `txt` stands for the text file.
    /// Default: `captions` of the JSON, or else `caption`, or else the lines of the text file.
    pub caption_keys: Vec<String>,
    /// Maximum share of bad samples among the samples read so far, from 0 to 1; above it the run ends with an error.
    /// Default 0.05.
    pub max_bad_ratio: f64,
    /// Folder of the local cache of remote shards; ranks and runs may share it. Empty (default): `vilg/shards` in
    /// `$XDG_CACHE_HOME` or `~/.cache`.
    pub cache_dir: String,
    /// Maximum size of the shards in `cache_dir`, in GB. Default 100.
    pub cache_gb: f64,
}

impl Data {
    /// Keys that a resumed run may change: the order of the samples does not depend on them.
    pub(super) const FREE_AT_RESUME: &[&str] =
        &["validation", "prefetch", "workers", "max_bad_ratio", "cache_dir", "cache_gb"];
}

/// One source of samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Tar shards (`dir/{00000..00012}.tar`, `dir/*.tar`), a folder of shards, or a folder of image + `.txt` pairs. Remote
    /// shards: `s3://BUCKET/PATH`, `oss://`, `hf://datasets/OWNER/NAME/PATH`, `https://` or `pipe:COMMAND`.
    pub path: String,
    /// Passes over this source per epoch, above 0. Default 1. With 0.25, each epoch uses a different quarter of its
    /// samples.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

impl Default for Data {
    fn default() -> Self {
        Self {
            sources: Vec::new(),
            validation: String::new(),
            prefetch: 4,
            workers: 1,
            shuffle_buffer: 0,
            caption_keys: Vec::new(),
            max_bad_ratio: 0.05,
            cache_dir: String::new(),
            cache_gb: 100.0,
        }
    }
}
