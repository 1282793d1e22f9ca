//! The options of commands that read remote shards.

use crate::config;

/// Where remote shards are kept: `data.cache_dir` and `data.cache_gb` of a configuration.
#[derive(Debug, clap::Args)]
pub struct CacheOptions {
    /// Folder of the local cache of remote shards; default: `vilg/shards` in `$XDG_CACHE_HOME` or `~/.cache`
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<String>,
    /// Maximum size of this cache, in GB
    #[arg(long, default_value_t = config::Data::default().cache_gb, value_name = "GB")]
    cache_gb: f64,
}

impl CacheOptions {
    /// Settings with this cache.
    pub fn data(&self) -> config::Data {
        let cache_dir = self.cache_dir.clone().unwrap_or_default();
        config::Data { cache_dir, cache_gb: self.cache_gb, ..Default::default() }
    }
}
