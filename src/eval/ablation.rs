//! The ablation of end-to-end training (paper, table 7): images of both generators, and of the codes of real images, through
//! both reconstructors, compared with the real images by the Fréchet distance of their features.
//!
//! Features are written chunk by chunk, so that an interrupted measurement goes on where it was.

use super::{
    features::Features,
    fid::{Gaussian, Moments},
    read_chosen, resume,
};
use crate::{
    bundle::Bundle,
    data::{Kind, Record, image_file, output::Lock},
    error::{Context, Result, ensure, failed},
    generate::{Models, Reconstructor, Request, Sampling},
    ops::packed::Format,
    random::Random,
    report,
};
use candle_core::{Device, Tensor};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

/// Captions of a chunk.
const CHUNK: usize = 64;
/// Prompts on a sheet.
const SHOWN: usize = 12;
const SETTINGS: &str = "ablation.json";
const REAL: &str = "real";

/// What is compared. A measurement only goes on with the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Model folders of two-stage generators, and of the end-to-end generators that they are compared with, one by one.
    pub two_stage: Vec<String>,
    pub end_to_end: Vec<String>,
    pub data: String,
    /// Number of captions; 0: all.
    pub samples: usize,
    pub seed: u64,
    /// The name of the features.
    pub features: String,
    pub sampling: Sampling,
}

/// What made codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codes {
    TwoStage,
    EndToEnd,
    /// The image tokenizer, of the real images.
    Gold,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Row {
    pub codes: Codes,
    pub reconstructor: Reconstructor,
}

use Reconstructor::{EndToEnd, TwoStage};

const CODES: [Codes; 3] = [Codes::TwoStage, Codes::EndToEnd, Codes::Gold];

/// All rows, in the order of the paper's table.
fn rows() -> impl Iterator<Item = Row> {
    CODES.into_iter().flat_map(|codes| [TwoStage, EndToEnd].map(|reconstructor| Row { codes, reconstructor }))
}

impl Row {
    fn name(self) -> String {
        format!("{:?} {:?}", self.codes, self.reconstructor)
    }

    /// The row that two-stage training alone would give.
    fn reference(self) -> Self {
        let codes = if self.codes == Codes::Gold { Codes::Gold } else { Codes::TwoStage };
        Self { codes, reconstructor: TwoStage }
    }
}

/// The distances of a row.
#[derive(Debug, Clone, Serialize)]
pub struct Distances {
    #[serde(flatten)]
    pub row: Row,
    /// Of each pair of models.
    pub distances: Vec<f64>,
    pub mean: f64,
    /// Bounds of the mean's 95 % bootstrap interval over the images.
    pub interval: Option<[f64; 2]>,
    /// The mean minus that of two-stage training on the same images, and its interval.
    pub difference: f64,
    pub difference_interval: Option<[f64; 2]>,
}

/// Measures all rows, with a folder that keeps what was measured.
///
/// # Errors
/// The folder is of another measurement, models and data do not fit, or the data cannot be read.
pub fn run(settings: &Settings, features: &Features, bootstrap: usize, folder: &Path) -> Result<Vec<Distances>> {
    let hint = "name as many two-stage models as end-to-end ones, in the same order";
    ensure!(settings.two_stage.len() == settings.end_to_end.len(), failed("models without a partner", hint));
    resume::begin(folder, SETTINGS, &(settings.clone(), digests(settings)?))?;
    let _lock = Lock::take(folder)?;
    let mut all = Vec::new();
    for (i, (two_stage, end_to_end)) in settings.two_stage.iter().zip(&settings.end_to_end).enumerate() {
        let bundles = [Bundle::open(two_stage)?, Bundle::open(end_to_end)?];
        let same = bundles[0].makes_codes_of(&bundles[1].digest()?)?;
        let what = format!("{two_stage} and {end_to_end} generate different codes");
        ensure!(same, failed(what, "compare generators that were trained over one image tokenizer"));
        let pair = Pair {
            two_stage: Models::load(&bundles[0], Format::F32)?,
            end_to_end: Models::load(&bundles[1], Format::F32)?.with_reconstructor(EndToEnd)?,
            features,
            settings,
            sheet: folder.join(format!("sheet-{}.png", i + 1)),
        };
        all.push(pair.measure(&folder.join(format!("features-{}", i + 1)))?);
    }
    let drawn = (0..bootstrap as u64).into_par_iter().map(|draw| distances(&all, Some((settings.seed, draw))));
    table(&distances(&all, None)?, &drawn.collect::<Result<Vec<_>>>()?)
}

/// Digests of the weights of all models.
fn digests(settings: &Settings) -> Result<Vec<String>> {
    let models = settings.two_stage.iter().chain(&settings.end_to_end);
    models.map(|model| Bundle::open(model)?.weights_digest()).collect()
}

/// Two generators over the same image tokenizer.
struct Pair<'a> {
    two_stage: Models,
    end_to_end: Models,
    features: &'a Features,
    settings: &'a Settings,
    /// The sheet of its first prompts.
    sheet: PathBuf,
}

/// Features by row ([`Row::name`]) or [`REAL`], one image a line.
type Table = BTreeMap<String, Vec<Vec<f32>>>;

impl Pair<'_> {
    /// The features of all rows; `folder` keeps them.
    fn measure(&self, folder: &Path) -> Result<Table> {
        fs::create_dir_all(folder)?;
        let records = self.records()?;
        let bar = report::bar(records.len() as u64, "measuring");
        let mut all = Table::new();
        let names: Vec<String> = rows().map(Row::name).chain([REAL.to_owned()]).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        for (i, chunk) in records.chunks(CHUNK).enumerate() {
            let file = folder.join(format!("{i:05}.safetensors"));
            if !file.exists() {
                resume::write_part(&file, &self.chunk(i * CHUNK, chunk)?)?;
            }
            let mut stored = resume::read_part(&file, &names)?;
            for name in &names {
                let tensor = stored.remove(*name).context("a tensor was read twice")?;
                all.entry((*name).to_owned()).or_default().extend(tensor.to_vec2::<f32>()?);
            }
            bar.inc(chunk.len() as u64);
        }
        bar.finish_and_clear();
        Ok(all)
    }

    /// The chosen images with their captions.
    fn records(&self) -> Result<Vec<Record>> {
        let Settings { data, samples, seed, .. } = self.settings;
        let side = self.end_to_end.image_tokenizer.image_size();
        let records = read_chosen(data, Kind::Pairs(u32::try_from(side)?), *samples, *seed, "eval pairs")?;
        ensure!(records.len() > 1, failed("a covariance needs at least two images", "raise --samples"));
        Ok(records)
    }

    /// The features of the samples that start at `first`.
    fn chunk(&self, first: usize, records: &[Record]) -> Result<HashMap<String, Tensor>> {
        let real: Vec<RgbImage> = records.iter().filter_map(|record| record.image.clone()).collect();
        let texts: Vec<&str> = records.iter().map(|record| record.caption.as_str()).collect();
        let mut found = HashMap::from([(REAL.to_owned(), self.features.of(&real)?)]);
        let mut shown = Vec::new();
        for made in CODES {
            let codes = match made {
                Codes::TwoStage => generate(&self.two_stage, &texts, first, self.settings)?,
                Codes::EndToEnd => generate(&self.end_to_end, &texts, first, self.settings)?,
                Codes::Gold => self.end_to_end.encode(&real)?,
            };
            for row in rows().filter(|row| row.codes == made) {
                let images = self.reconstruct(row.reconstructor, &texts, &codes)?;
                found.insert(row.name(), self.features.of(&images)?);
                shown.extend(images.into_iter().take(SHOWN));
            }
        }
        if first == 0 {
            let columns = SHOWN.min(records.len());
            shown.extend(real.into_iter().take(SHOWN));
            image_file::write_png(&self.sheet, &image_file::grid(&shown, columns))?;
        }
        Ok(found)
    }

    /// Images of codes: by the image tokenizer's decoder, or by the end-to-end generator.
    fn reconstruct(&self, by: Reconstructor, texts: &[&str], codes: &[Vec<u32>]) -> Result<Vec<RgbImage>> {
        let models = &self.end_to_end;
        let prompts = texts.iter().map(|text| models.text.encode(text, models.generator.max_text()));
        let prompts = prompts.collect::<Result<Vec<_>>>()?;
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        models.images_by(by, &prompts, codes)
    }
}

/// The codes that a generator draws for the captions of samples from `first` on.
fn generate(models: &Models, texts: &[&str], first: usize, settings: &Settings) -> Result<Vec<Vec<u32>>> {
    let request = |(i, text): (usize, &&str)| Request::new(*text, settings.seed.wrapping_add((first + i) as u64));
    let requests: Vec<Request> = texts.iter().enumerate().map(request).collect();
    models.generate_codes(&requests, &settings.sampling, |_| {})
}

/// The distances of all rows by pair of models; with `draw`, of images drawn with replacement, the same for all rows.
fn distances(tables: &[Table], draw: Option<(u64, u64)>) -> Result<Vec<Vec<f64>>> {
    let of_pair = |(i, table): (usize, &Table)| {
        let of = |name: &str| table.get(name).with_context(|| format!("no features of {name}"));
        let real = of(REAL)?;
        let chosen: Vec<usize> = match draw {
            None => (0..real.len()).collect(),
            Some((seed, draw)) => {
                let mut random = Random::keyed(seed, "bootstrap", draw, i as u64);
                real.iter().map(|_| random.below(real.len() as u64) as usize).collect()
            }
        };
        let gaussian = |name: &str| -> Result<Gaussian> {
            let all = of(name)?;
            let dim = all.first().map_or(0, Vec::len);
            let values: Vec<f32> = chosen.iter().filter_map(|&i| all.get(i)).flatten().copied().collect();
            Moments::of(&Tensor::from_vec(values, (chosen.len(), dim), &Device::Cpu)?)?.gaussian()
        };
        let real = gaussian(REAL)?;
        rows().map(|row| gaussian(&row.name())?.distance(&real)).collect::<Result<Vec<f64>>>()
    };
    tables.iter().enumerate().map(of_pair).collect()
}

/// The table of distances (pair of models, row) and of those of bootstrap draws.
fn table(distances: &[Vec<f64>], drawn: &[Vec<Vec<f64>>]) -> Result<Vec<Distances>> {
    let mean = |distances: &[Vec<f64>], row: usize| {
        distances.iter().map(|of_pair| of_pair[row]).sum::<f64>() / distances.len().max(1) as f64
    };
    let measured = |(i, row): (usize, Row)| {
        let reference = rows().position(|other| other == row.reference()).context("a row without a reference")?;
        let difference = |distances: &[Vec<f64>]| mean(distances, i) - mean(distances, reference);
        Ok(Distances {
            row,
            distances: distances.iter().map(|of_pair| of_pair[i]).collect(),
            mean: mean(distances, i),
            interval: interval(mean(distances, i), drawn.iter().map(|drawn| mean(drawn, i))),
            difference: difference(distances),
            difference_interval: interval(difference(distances), drawn.iter().map(|drawn| difference(drawn))),
        })
    };
    rows().enumerate().map(measured).collect()
}

/// The 95 % interval of `value`: the quantiles of the draws, centred. Draws repeat images, which makes all distances larger:
/// the quantiles themselves would be too high.
fn interval(value: f64, drawn: impl Iterator<Item = f64>) -> Option<[f64; 2]> {
    let mut sorted: Vec<f64> = drawn.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = *sorted.get(sorted.len() / 2)?;
    let at = |share: f64| sorted.get(((sorted.len() as f64 - 1.0) * share).round() as usize).copied();
    Some([value + at(0.025)? - middle, value + at(0.975)? - middle])
}
