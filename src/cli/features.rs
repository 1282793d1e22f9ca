//! The options that choose the features whose distributions are compared.

use crate::{
    bundle::Bundle,
    error::Result,
    eval::{
        features::Features,
        fid::{Inception, Protocol},
    },
    generate::Matching,
    runtime,
};
use std::path::PathBuf;

/// Whose features are compared.
#[derive(clap::Args)]
pub struct FeatureOptions {
    /// Folder written by `vilg import inception`: the distance is then the FID. Without it, image embeddings of the
    /// matcher are compared
    #[arg(long, value_name = "DIR")]
    inception: Option<PathBuf>,
    /// With --inception: how images become features
    #[arg(long, value_enum, default_value_t = Protocol::PytorchFid)]
    protocol: Protocol,
}

impl FeatureOptions {
    /// Loads Inception, or else the matcher of the model folder `matcher`.
    ///
    /// # Errors
    /// The network is missing or cannot be loaded.
    pub fn load(&self, matcher: &str) -> Result<Features> {
        match &self.inception {
            Some(folder) => {
                let network = Inception::open(folder, self.protocol.weights(), &runtime::device()?)?;
                Ok(Features::Inception(Box::new(network), self.protocol))
            }
            None => {
                let bundle = Bundle::open(matcher)?.matcher_folder()?;
                Ok(Features::Matcher(Box::new(Matching::open(&bundle)?), bundle.matcher_digest()?))
            }
        }
    }
}
