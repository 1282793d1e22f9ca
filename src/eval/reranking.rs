//! What re-ranking gains (paper §2.4): the retrieval accuracy of the best of K candidates, for several K and for each
//! ranking, from one generation of all candidates; and the weight that combines the two scores best.

use super::retrieval::{Queries, Settings};
use crate::{
    error::{Context, Result, anyhow, ensure, failed},
    generate::{Models, Ranking, Scores},
    random::Random,
    report,
};
use plotters::prelude::*;
use rayon::prelude::*;
use serde::Serialize;
use std::path::Path;

/// Prompts whose candidates are generated in one call.
const PROMPTS: usize = 16;

/// Draws of the bootstrap over prompts.
const DRAWS: u64 = 1000;

/// The weights of the cosine that are tried.
const WEIGHTS: [f64; 10] = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0];

/// The result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reranking {
    /// Prompts that are measured: one half of all; the weight is fitted on the other half.
    pub prompts: usize,
    /// Images to search among.
    pub candidates: usize,
    /// The weight of the matcher's cosine with which the sum of both scores did best on the other half.
    pub matcher_weight: f64,
    /// One row for each K.
    pub rows: Vec<Row>,
}

/// Top-1 accuracy of the best of K candidates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub best_of: usize,
    /// Ranked by the generator's own score.
    pub own: Accuracy,
    /// Ranked by the matcher's cosine.
    pub matcher: Accuracy,
    /// Ranked by the own score plus the weighted cosine.
    pub both: Accuracy,
    /// Upper bound of any ranking: any of the K candidates is right.
    pub any: Accuracy,
}

/// The mean over prompts of the share of disjoint groups of K candidates whose best is right.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Accuracy {
    pub rate: f64,
    /// Bounds of the 95 % bootstrap interval over prompts.
    pub interval: [f64; 2],
}

/// A candidate of a prompt.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    own: f64,
    cosine: f64,
    /// The prompt's real image is the nearest of all.
    hit: bool,
}

/// What a group of candidates is ranked by.
#[derive(Debug, Clone, Copy)]
enum By {
    Own,
    Matcher,
    Both(f64),
    Any,
}

/// Generates `settings.best_of.count` candidates of each prompt, ranked by both scores, and measures the best of 1, 4,
/// 16 and so on, up to all.
///
/// # Errors
/// The ranking is not by both scores, there are fewer than two prompts, or as [`super::retrieval::run`].
pub fn run(models: &Models, settings: &Settings) -> Result<Reranking> {
    ensure!(matches!(settings.best_of.ranking, Ranking::Both { .. }), "candidates must have both scores");
    let queries = Queries::read(settings, models.image_tokenizer.image_size())?;
    let hint = "take more with --samples: one half is measured, the weight is fitted on the other half";
    ensure!(queries.len() >= 2, failed(format_args!("{} prompts are too few", queries.len()), hint));
    let count = settings.best_of.count.max(1);
    let bar = report::bar((queries.len() * count) as u64, "generating candidates");
    let mut prompts: Vec<Vec<Candidate>> = vec![Vec::with_capacity(count); queries.len()];
    for start in (0..queries.len()).step_by(PROMPTS) {
        let requests = queries.requests(start..(start + PROMPTS).min(queries.len()), settings.seed);
        let tokens = requests.iter().map(|request| models.text.encode(&request.prompt, models.generator.max_text()));
        let tokens = tokens.collect::<Result<Vec<_>>>()?;
        let found = |request: usize, codes: Vec<u32>, scores: Scores| {
            let image = models.images(&[&tokens[request]], &[codes])?.pop().context("the decoder returned no image")?;
            let hit = queries.rank(start + request, &image) == 1;
            let (own, cosine) = (scores.own.context("no own score")?, scores.cosine.context("no cosine")?);
            prompts[start + request].push(Candidate { own, cosine, hit });
            bar.inc(1);
            Ok(())
        };
        models.each_candidate(&requests, &settings.sampling, &settings.best_of, |_| {}, found)?;
    }
    bar.finish_and_clear();
    // The prompts are in random order.
    let (fitted, measured) = prompts.split_at(prompts.len() / 2);
    let counts = counts(count);
    let matcher_weight = fit(fitted, &counts);
    let row = |&best_of: &usize| {
        let accuracy = |by| accuracy(measured, best_of, by, settings.seed);
        let both = accuracy(By::Both(matcher_weight));
        Row { best_of, own: accuracy(By::Own), matcher: accuracy(By::Matcher), both, any: accuracy(By::Any) }
    };
    let rows = counts.iter().map(row).collect();
    Ok(Reranking { prompts: measured.len(), candidates: settings.candidates, matcher_weight, rows })
}

/// 1, 4, 16 and so on, and `all`.
fn counts(all: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(1), |k: &usize| k.checked_mul(4));
    powers.take_while(|&k| k < all).chain([all]).collect()
}

/// The weight with the highest accuracy, averaged over K; the smallest of equals.
fn fit(prompts: &[Vec<Candidate>], counts: &[usize]) -> f64 {
    let mean = |weight| -> f64 {
        let rate = |&best_of| shares(prompts, best_of, By::Both(weight)).iter().sum::<f64>();
        counts.iter().map(rate).sum()
    };
    WEIGHTS
        .into_iter()
        .map(|weight| (weight, mean(weight)))
        .fold((0.0, f64::MIN), |a, b| if b.1 > a.1 { b } else { a })
        .0
}

/// For each prompt: the share of its disjoint groups of `best_of` candidates whose best is right.
fn shares(prompts: &[Vec<Candidate>], best_of: usize, by: By) -> Vec<f64> {
    let right = |group: &[Candidate]| {
        let score = |candidate: &Candidate| match by {
            By::Own => candidate.own,
            By::Matcher => candidate.cosine,
            By::Both(weight) => candidate.own + weight * candidate.cosine,
            By::Any => f64::from(u8::from(candidate.hit)),
        };
        // The first of equals, as in generation.
        let best = group.iter().reduce(|best, next| if score(next) > score(best) { next } else { best });
        best.is_some_and(|best| best.hit)
    };
    let share = |candidates: &Vec<Candidate>| {
        let groups = candidates.chunks_exact(best_of);
        let all = groups.len().max(1) as f64;
        groups.filter(|group| right(group)).count() as f64 / all
    };
    prompts.iter().map(share).collect()
}

fn accuracy(prompts: &[Vec<Candidate>], best_of: usize, by: By, seed: u64) -> Accuracy {
    let shares = shares(prompts, best_of, by);
    let count = shares.len().max(1);
    let draw = |draw: u64| {
        let mut random = Random::keyed(seed, "re-ranking bootstrap", draw, 0);
        let drawn = (0..count).filter_map(|_| shares.get(random.below(count as u64) as usize));
        drawn.sum::<f64>() / count as f64
    };
    let mut drawn: Vec<f64> = (0..DRAWS).into_par_iter().map(draw).collect();
    drawn.sort_by(f64::total_cmp);
    let quantile = |q: f64| drawn[((drawn.len() - 1) as f64 * q).round() as usize];
    Accuracy { rate: shares.iter().sum::<f64>() / count as f64, interval: [quantile(0.025), quantile(0.975)] }
}

impl Reranking {
    /// Draws accuracy against K as SVG, one line for each ranking.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn plot(&self, path: &Path) -> Result<()> {
        // plotters' errors borrow the backend.
        self.draw(path).map_err(|e| anyhow!("cannot draw {}: {e}", path.display()))
    }

    fn draw(&self, path: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
        let last = self.rows.last().map_or(1, |row| row.best_of) as f64;
        let ticks: Vec<f64> = self.rows.iter().map(|row| row.best_of as f64).collect();
        let x = (0.8..last.max(2.0) * 1.25).log_scale().with_key_points(ticks);
        let root = SVGBackend::new(path, (560, 400)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(format!("top-1 of {}, best of K candidates", self.candidates), ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(56)
            .build_cartesian_2d(x, 0.0..100.0)?;
        let mesh = &mut chart.configure_mesh();
        let mesh = mesh.x_desc("candidates K").y_desc("top-1 accuracy, %").light_line_style(TRANSPARENT);
        mesh.x_label_formatter(&f64::to_string).draw()?;
        let lines = [
            ("any of the K (upper bound)", RGBColor(140, 140, 140)),
            ("ranked by both", BLACK),
            ("ranked by the matcher", RGBColor(200, 60, 40)),
            ("ranked by the generator", RGBColor(50, 90, 170)),
        ];
        for (place, (name, colour)) in lines.into_iter().enumerate() {
            let of = |row: &Row| [row.any, row.both, row.matcher, row.own][place];
            // Side by side, so that the intervals do not hide each other.
            let at = |row: &Row| row.best_of as f64 * (1.0 + 0.03 * (place as f64 - 1.5));
            let points: Vec<(f64, f64)> = self.rows.iter().map(|row| (at(row), 100.0 * of(row).rate)).collect();
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
            chart.draw_series(self.rows.iter().map(|row| {
                let [low, high] = of(row).interval;
                PathElement::new([(at(row), 100.0 * low), (at(row), 100.0 * high)], colour)
            }))?;
            let line = chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
            line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        let labels = &mut chart.configure_series_labels();
        labels.position(SeriesLabelPosition::LowerRight).background_style(WHITE).border_style(BLACK).draw()?;
        root.present()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(own: f64, cosine: f64, hit: bool) -> Candidate {
        Candidate { own, cosine, hit }
    }

    /// Two prompts of four candidates: the generator prefers the first right one, the matcher the second.
    fn prompts() -> Vec<Vec<Candidate>> {
        vec![
            vec![
                candidate(-1.0, 0.1, true),
                candidate(-2.0, 0.2, false),
                candidate(-3.0, 0.3, false),
                candidate(-4.0, 0.4, false),
            ],
            vec![
                candidate(-4.0, 0.9, true),
                candidate(-1.0, 0.2, false),
                candidate(-3.0, 0.1, true),
                candidate(-2.0, 0.3, false),
            ],
        ]
    }

    #[test]
    fn groups_are_disjoint_and_averaged_within_a_prompt() {
        let prompts = prompts();
        assert_eq!(shares(&prompts, 1, By::Own), [0.25, 0.5]);
        assert_eq!(shares(&prompts, 1, By::Any), [0.25, 0.5]);
        assert_eq!(shares(&prompts, 2, By::Own), [0.5, 0.0]);
        assert_eq!(shares(&prompts, 2, By::Matcher), [0.0, 0.5]);
        assert_eq!(shares(&prompts, 2, By::Any), [0.5, 1.0]);
        assert_eq!(shares(&prompts, 3, By::Matcher), [0.0, 1.0], "an incomplete group is left out");
        assert_eq!(shares(&prompts, 4, By::Own), [1.0, 0.0]);
        assert_eq!(shares(&prompts, 4, By::Both(0.0)), shares(&prompts, 4, By::Own));
        assert_eq!(shares(&prompts, 4, By::Both(100.0)), shares(&prompts, 4, By::Matcher));
        // own + 5 cosine: -0.5, -1, -1.5, -2 and 0.5, 0, -2.5, -0.5.
        assert_eq!(shares(&prompts, 4, By::Both(5.0)), [1.0, 1.0]);
        assert_eq!(fit(&prompts, &[4]), 5.0);
    }

    #[test]
    fn intervals_hold_the_rate_and_shrink_with_the_prompts() {
        let few = accuracy(&prompts(), 1, By::Own, 3);
        assert_eq!((few.rate, few.interval), (0.375, [0.25, 0.5]));
        let many: Vec<_> = (0..100).flat_map(|_| prompts()).collect();
        let many = accuracy(&many, 1, By::Own, 3);
        let [low, high] = many.interval;
        assert!(many.rate == 0.375 && low < 0.375 && high > 0.375 && high - low < 0.06, "{many:?}");
    }

    #[test]
    fn counts_are_powers_of_four_up_to_all() {
        assert_eq!((counts(1), counts(4), counts(60)), (vec![1], vec![1, 4], vec![1, 4, 16, 60]));
    }

    #[test]
    fn the_plot_has_a_line_for_each_ranking() {
        let at = |rate| Accuracy { rate, interval: [rate - 0.1, rate + 0.1] };
        let row = |best_of| Row { best_of, own: at(0.3), matcher: at(0.4), both: at(0.5), any: at(0.8) };
        let found = Reranking { prompts: 9, candidates: 100, matcher_weight: 2.0, rows: vec![row(1), row(4)] };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plot.svg");
        found.plot(&path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.matches("<circle").count() == 8 && svg.contains("ranked by both"), "{svg}");
    }
}
