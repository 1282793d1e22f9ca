//! The options that choose the best of several candidates.

use super::sampling::from_0_to_100;
use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::Result,
    generate::{BestOf, Matching, Ranking},
};
use clap::ValueEnum;

/// How many candidates are generated for each image, and what ranks them.
#[derive(clap::Args)]
pub struct RankingOptions {
    /// Generate K candidates for each image and keep the one that matches the prompt best; takes K times as long
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024),
        allow_negative_numbers = true)]
    pub best_of: u32,
    /// What ranks the candidates [default: matcher with --matcher, else own]
    #[arg(long, value_enum, value_name = "BY")]
    rank: Option<Rank>,
    /// Model folder of the image–text matcher, folder of its training run, or `demo` for the built-in matcher [default:
    /// demo, where --rank needs one]
    #[arg(long, value_name = "DIR|NAME")]
    matcher: Option<String>,
    /// With --rank both: weight of the matcher's cosine against the generator's score
    #[arg(long, value_name = "W", default_value_t = 2.0, value_parser = from_0_to_100, allow_negative_numbers = true)]
    matcher_weight: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rank {
    /// The generator: mean log probability of a prompt token, given the image
    Own,
    /// The matcher: cosine of image and prompt
    Matcher,
    /// The generator's score plus the matcher's cosine, weighted
    Both,
}

/// The matcher of the options, loaded.
pub struct Ranker {
    count: usize,
    rank: Rank,
    weight: f64,
    matching: Option<Matching>,
}

impl RankingOptions {
    /// The matcher's name, if one is needed.
    pub fn matcher_name(&self) -> &str {
        self.matcher.as_deref().unwrap_or(DEMO_NAME)
    }

    /// Loads the matcher, if one ranks.
    ///
    /// # Errors
    /// The matcher is missing or cannot be loaded.
    pub fn load(&self) -> Result<Ranker> {
        let rank = self.rank.unwrap_or(if self.matcher.is_some() { Rank::Matcher } else { Rank::Own });
        let matching = match rank {
            Rank::Own => None,
            Rank::Matcher | Rank::Both => Some(Matching::open(&Bundle::open(self.matcher_name())?.matcher_folder()?)?),
        };
        Ok(Ranker { count: self.best_of as usize, rank, weight: self.matcher_weight, matching })
    }
}

impl Ranker {
    /// The value of `--rank`.
    pub fn name(&self) -> String {
        self.rank.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
    }

    /// The value of `--rank`, with the weight if there is one.
    pub fn description(&self) -> String {
        match self.rank {
            Rank::Both => format!("{}, weight {}", self.name(), self.weight),
            Rank::Own | Rank::Matcher => self.name(),
        }
    }

    /// How the candidates are ranked.
    pub fn best_of(&self) -> BestOf<'_> {
        let ranking = match (&self.matching, self.rank) {
            (Some(matching), Rank::Matcher) => Ranking::Matcher(matching),
            (Some(matching), Rank::Both) => Ranking::Both { matching, weight: self.weight },
            _ => Ranking::Own,
        };
        BestOf { count: self.count, ranking }
    }
}
