//! The report of a study: means with intervals, agreement, pass rates, aspects, and differences of systems.

use super::{
    agreement::alpha,
    kind::{Kind, PERSON, Question},
    statistics::Mean,
    study::{Item, Output, Rating, Study},
};
use crate::{error::Result, eval::Rate};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// How intervals are computed, for the reader of a report.
pub const INTERVALS: &str =
    "95 % t-intervals over items, each item by the mean of its ratings; the raters are taken as given";

/// What raters said about the systems of a study.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub title: String,
    pub kind: Kind,
    pub seed: u64,
    pub systems: Vec<String>,
    pub items: usize,
    /// Answers to single questions.
    pub ratings: usize,
    pub intervals: &'static str,
    pub raters: Vec<Progress>,
    pub questions: Vec<OfQuestion>,
    /// The mean of all questions but the Turing question, by system; captions only, as the paper gives it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub overall: Vec<OfSystem>,
    /// How often answers pass for those of people.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pass_rates: Vec<PassRate>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aspects: Vec<Aspect>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub differences: Vec<Difference>,
}

/// Pages that a rater has finished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Progress {
    pub rater: i64,
    pub rated: usize,
    pub pages: usize,
}

/// The answers to a question.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OfQuestion {
    pub question: &'static str,
    /// Lowest and highest answer.
    pub scale: [i64; 2],
    /// Krippendorff's alpha with the ordinal metric over the outputs of all systems; `None` where it is undefined.
    pub alpha: Option<f64>,
    /// Outputs with at least two ratings, which alpha is about.
    pub alpha_outputs: usize,
    pub systems: Vec<OfSystem>,
}

/// A mean of one system.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OfSystem {
    pub system: String,
    #[serde(flatten)]
    pub mean: Mean,
}

/// How often the answers of a system were taken for those of a person.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PassRate {
    pub system: String,
    /// The share of ratings.
    pub share: Mean,
    /// The share of answers that more than half of their raters took for a person's, with its Wilson interval.
    pub majority: Rate,
}

/// The means of the items of one aspect.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Aspect {
    pub aspect: String,
    pub items: usize,
    pub questions: Vec<AspectQuestion>,
}

/// The means of a question within an aspect.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AspectQuestion {
    pub question: &'static str,
    pub systems: Vec<OfSystem>,
}

/// Paired differences of two systems, `a` minus `b`, over the items that both have ratings for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    pub question: &'static str,
    pub a: String,
    pub b: String,
    #[serde(flatten)]
    pub mean: Mean,
    /// Items in which `a` is better, equal, and worse.
    pub wins: usize,
    pub ties: usize,
    pub losses: usize,
}

/// The ratings of a question: by system (from 0 on), then item.
type Values = BTreeMap<usize, BTreeMap<i64, Vec<i64>>>;

/// Summarizes the ratings of a study, finished or not.
///
/// # Errors
/// The study cannot be read, or holds impossible ratings.
pub fn summarize(study: &Study) -> Result<Summary> {
    let (items, outputs, ratings) = (study.items()?, study.outputs()?, study.ratings()?);
    let names: Vec<String> = study.systems.iter().map(|system| system.name.clone()).collect();
    let values: Vec<(&Question, Values)> =
        study.kind.questions().iter().map(|question| (question, values(question, &ratings, &outputs))).collect();
    Ok(Summary {
        title: study.title.clone(),
        kind: study.kind,
        seed: study.seed,
        items: items.len(),
        ratings: ratings.len(),
        intervals: INTERVALS,
        raters: study.raters.iter().map(|rater| progress(study, rater.number)).collect::<Result<_>>()?,
        questions: values.iter().map(|(question, values)| of_question(question, values, &names)).collect(),
        overall: if study.kind == Kind::Captions { overall(&values, &names) } else { Vec::new() },
        pass_rates: values
            .iter()
            .filter(|(question, _)| question.name == PERSON)
            .flat_map(|(_, values)| pass_rates(values, &names))
            .collect(),
        aspects: aspects(&items, &values, &names),
        differences: values.iter().flat_map(|(question, values)| differences(question, values, &names)).collect(),
        systems: names,
    })
}

/// The finished pages of a rater.
///
/// # Errors
/// The study cannot be read.
pub fn progress(study: &Study, rater: i64) -> Result<Progress> {
    let (pages, rated) = (study.pages(rater), study.rated(rater)?);
    let finished = pages.iter().filter(|page| page.outputs.iter().all(|output| rated.contains(output)));
    Ok(Progress { rater, rated: finished.count(), pages: pages.len() })
}

fn values(question: &Question, ratings: &[Rating], outputs: &BTreeMap<i64, Output>) -> Values {
    let mut values = Values::new();
    for rating in ratings.iter().filter(|rating| rating.question == question.name) {
        if let Some(output) = outputs.get(&rating.output) {
            let system = usize::try_from(output.system - 1).unwrap_or_default();
            values.entry(system).or_default().entry(output.item).or_default().push(rating.value);
        }
    }
    values
}

fn mean(values: &[i64]) -> f64 {
    values.iter().sum::<i64>() as f64 / values.len().max(1) as f64
}

/// The mean of each rated item of a system.
fn item_means(values: &Values, system: usize) -> BTreeMap<i64, f64> {
    values.get(&system).into_iter().flatten().map(|(item, values)| (*item, mean(values))).collect()
}

/// The mean of a system over the items for which `take` is true.
fn of_system(
    question: &Question,
    values: &Values,
    names: &[String],
    take: impl Fn(i64) -> bool + Copy,
) -> Vec<OfSystem> {
    let one = |(system, name): (usize, &String)| {
        let means = item_means(values, system).into_iter().filter(|(item, _)| take(*item));
        let mean = Mean::of(&means.map(|(_, mean)| mean).collect::<Vec<_>>())?;
        Some(OfSystem { system: name.clone(), mean: mean.within(question.low as f64, question.high as f64) })
    };
    names.iter().enumerate().filter_map(one).collect()
}

fn of_question(question: &Question, values: &Values, names: &[String]) -> OfQuestion {
    let outputs: Vec<Vec<i64>> = values.values().flat_map(|items| items.values().cloned()).collect();
    OfQuestion {
        question: question.name,
        scale: [question.low, question.high],
        alpha: alpha(&outputs),
        alpha_outputs: outputs.iter().filter(|values| values.len() > 1).count(),
        systems: of_system(question, values, names, |_| true),
    }
}

/// All questions about captions have one scale.
fn overall(values: &[(&Question, Values)], names: &[String]) -> Vec<OfSystem> {
    let one = |(system, name): (usize, &String)| {
        let mut items: BTreeMap<i64, Vec<f64>> = BTreeMap::new();
        for (_, values) in values {
            item_means(values, system).into_iter().for_each(|(item, mean)| items.entry(item).or_default().push(mean));
        }
        let means: Vec<f64> = items.values().map(|means| means.iter().sum::<f64>() / means.len() as f64).collect();
        let (question, _) = values.first()?;
        let mean = Mean::of(&means)?.within(question.low as f64, question.high as f64);
        Some(OfSystem { system: name.clone(), mean })
    };
    names.iter().enumerate().filter_map(one).collect()
}

fn pass_rates(values: &Values, names: &[String]) -> Vec<PassRate> {
    let one = |(system, name): (usize, &String)| {
        let means: Vec<f64> = item_means(values, system).into_values().collect();
        let passed = means.iter().filter(|share| **share > 0.5).count();
        let share = Mean::of(&means)?.within(0.0, 1.0);
        Some(PassRate { system: name.clone(), share, majority: Rate::new(passed, means.len()) })
    };
    names.iter().enumerate().filter_map(one).collect()
}

/// In the order in which the items first have them.
fn aspects(items: &BTreeMap<i64, Item>, values: &[(&Question, Values)], names: &[String]) -> Vec<Aspect> {
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    for item in items.values().filter(|item| !item.aspect.is_empty()) {
        if seen.insert(&item.aspect) {
            order.push(&item.aspect);
        }
    }
    let of = |item: i64, aspect: &String| items.get(&item).is_some_and(|item| item.aspect == *aspect);
    let one = |aspect: &String| Aspect {
        aspect: aspect.clone(),
        items: items.values().filter(|item| item.aspect == *aspect).count(),
        questions: values
            .iter()
            .map(|(question, values)| AspectQuestion {
                question: question.name,
                systems: of_system(question, values, names, |item| of(item, aspect)),
            })
            .collect(),
    };
    order.into_iter().map(one).collect()
}

/// All pairs of systems.
fn differences(question: &Question, values: &Values, names: &[String]) -> Vec<Difference> {
    let pairs = (0..names.len()).flat_map(|a| (a + 1..names.len()).map(move |b| (a, b)));
    let one = |(a, b): (usize, usize)| {
        let (first, second) = (item_means(values, a), item_means(values, b));
        let paired = first.iter().filter_map(|(item, mean)| Some(mean - second.get(item)?));
        let paired: Vec<f64> = paired.collect();
        let count = |test: fn(f64) -> bool| paired.iter().filter(|difference| test(**difference)).count();
        Some(Difference {
            question: question.name,
            a: names.get(a)?.clone(),
            b: names.get(b)?.clone(),
            mean: Mean::of(&paired)?,
            wins: count(|difference| difference > TIE),
            ties: count(|difference| difference.abs() <= TIE),
            losses: count(|difference| difference < -TIE),
        })
    };
    pairs.filter_map(one).collect()
}

/// Means of whole numbers that are equal may differ by their rounding.
const TIE: f64 = 1e-9;
