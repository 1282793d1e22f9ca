//! How shards are built: part of each shard's record, so that shards of different settings are never mixed.

use crate::data::output::Recipe;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The format of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Images with .txt or .json files beside them, or tar shards
    Folder,
    /// JSON with `images` and `annotations`
    Coco,
    /// JSON list of `image_id` and `caption`, as in the AI Challenger
    AicIcc,
    /// Lines `ID#N CAPTION`, as in COCO-CN and Flickr8k-CN
    CocoCn,
    /// JSON lists of `image_id`, `Question` and `Answer`
    Fmiqa,
    /// `X_imgs.tsv` (id, base64) and `X_texts.jsonl`
    ChineseClip,
    /// Tar shards with a parquet file beside each
    Img2dataset,
    /// CSV, TSV, JSON lines or parquet
    Table,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// The keys of the samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Keys {
    /// The number of the row, with nine digits as img2dataset writes it
    #[default]
    Number,
    /// The id in the source, with dots replaced by `_`
    Id,
}

/// The columns of a table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    pub image: Option<String>,
    /// Whether the image column holds base64 text.
    pub base64: bool,
    pub captions: Vec<String>,
    pub key: Option<String>,
}

/// All that decides the content of a shard, beside the source itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub format: Format,
    /// Number of rows of a shard.
    pub samples: u64,
    pub keys: Keys,
    pub split: Option<String>,
    pub columns: Columns,
    /// Digest of the shard's separate image files: names, sizes and modification times.
    pub images: String,
}

impl Recipe for Settings {
    const MEMBER: &'static str = "built-from";
    const VERB: &'static str = "built";
}
