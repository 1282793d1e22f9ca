//! Encodes shards of images as shards of image codes. Codes are computed once and used by many training runs.

use super::{
    bad::{Bad, BadCounts},
    codes::{CODES_FILE, CodesInfo, npy},
    dataset::Source,
    image::to_pixels,
    index,
    members::Members,
    output::{Lock, MadeFrom, Recipe, Standing, append, remove_leftovers, write_whole},
    record::{Kind, Record, image_and_extension},
    shard::Shard,
};
use crate::{
    error::{Context, Hint, Result, anyhow, ensure, failed},
    tokenizer::ImageTokenizer,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufWriter, Write},
    path::PathBuf,
    sync::mpsc::{Receiver, sync_channel},
    thread,
};
use tar::Builder;

/// The result of an encoding run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Number of shards that an earlier run finished and whose source is unchanged.
    pub skipped_shards: u64,
    /// Number of shards written.
    pub shards: u64,
    /// Number of source shards without a usable sample; nothing was written for them.
    pub unusable_shards: u64,
    /// Number of samples written.
    pub samples: u64,
    /// Samples and shards that were left out.
    pub bad: BadCounts,
    /// Damaged JSON of samples that were written, and files that belong to no sample.
    pub ignored: BadCounts,
}

/// Encodes shards into a folder. A shard is finished if its record names the same samples and the same tokenizer; it is
/// encoded again if its source has changed.
pub struct Encoder<'a> {
    pub tokenizer: &'a ImageTokenizer,
    pub info: CodesInfo,
    pub output: PathBuf,
    /// Whether the images are written beside their codes, as they are (end-to-end training).
    pub keep_images: bool,
    /// Batch size in images.
    pub batch_size: usize,
    /// Maximum share of bad samples; above it the run ends with an error.
    pub max_bad_ratio: f64,
    /// Rank of this process: it encodes every `world_size`-th shard.
    pub rank: usize,
    pub world_size: usize,
}

/// How a shard of codes is made: by the image tokenizer and its grid of codes, with or without the images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Encoding {
    codes: CodesInfo,
    #[serde(default)]
    images: bool,
}

impl Recipe for Encoding {
    const MEMBER: &'static str = "encoded-from";
    const VERB: &'static str = "encoded";
}

/// A decoded image, with the members that are stored next to its codes.
struct Ready {
    record: Record,
    members: Members,
}

type Batch = Vec<Result<Ready, Bad>>;

impl Encoder<'_> {
    /// Encodes this rank's shards of all sources; `progress` is called with the number of samples of each finished batch.
    ///
    /// # Errors
    /// The output folder is locked by another process, belongs to another tokenizer or holds shards of another source;
    /// too many samples are bad; a file cannot be written.
    pub fn run(&self, sources: &[Source], progress: impl Fn(u64)) -> Result<Report> {
        let shards: Vec<&Shard> = sources.iter().flat_map(|source| &source.shards).collect();
        let mut names = BTreeSet::new();
        for shard in &shards {
            let hint = "encode these sources into separate folders";
            let twice = || failed(format_args!("two shards would be written as {}", shard.name.display()), hint);
            ensure!(names.insert(&shard.name), twice());
        }
        let cannot = || format!("cannot create {}", self.output.display());
        fs::create_dir_all(&self.output).hint(cannot(), "choose another folder with -o")?;
        let lock = self.lock()?;
        self.report_sources(&shards)?;
        // All shards are compared before the first one is encoded, so that a refusal comes at once.
        let mut work = Vec::new();
        for shard in self.own(&shards) {
            let made_from = self.made_from(shard)?;
            work.push((shard, Standing::of(&self.output.join(&shard.name), &made_from)?, made_from));
        }
        let mut report = Report::default();
        let mut skipped = 0;
        // Of the shards that are not finished, the next one is downloaded in the background.
        let unfinished = work.iter().filter(|(_, standing, _)| *standing != Standing::Finished);
        let unfinished: Vec<&Shard> = unfinished.map(|(shard, ..)| *shard).collect();
        let mut next = unfinished.iter().skip(1);
        for (shard, standing, made_from) in work {
            report.bad.merge(shard.bad.clone());
            if lock.is_held() {
                remove_leftovers(&self.output.join(&shard.name));
            }
            if standing == Standing::Finished {
                report.skipped_shards += 1;
                skipped += shard.len();
                progress(shard.len());
            } else {
                let _held = shard.hold_before(next.next().copied())?;
                self.encode_shard(shard, &made_from, &mut report, &progress)?;
            }
        }
        // Counted at the end: the unusable files of a large folder would otherwise count against its first batch.
        for source in sources {
            report.bad.merge(source.bad.clone());
            report.ignored.merge(source.ignored.clone());
        }
        report.bad.check(skipped + report.samples + report.bad.total(), self.max_bad_ratio)?;
        self.index(&shards)?;
        Ok(report)
    }

    /// The shards that this rank encodes.
    pub fn own<'s>(&self, shards: &[&'s Shard]) -> impl Iterator<Item = &'s Shard> {
        shards.iter().skip(self.rank).step_by(self.world_size).copied()
    }

    /// Locks the output folder against other runs; ranks of one run have a lock each.
    fn lock(&self) -> Result<Lock> {
        match self.world_size {
            1 => Lock::take(&self.output),
            _ => Lock::take_for_rank(&self.output, self.rank),
        }
    }

    /// Stores the index of the shards that are written.
    fn index(&self, shards: &[&Shard]) -> Result<()> {
        let mut folders: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
        for path in shards.iter().map(|shard| self.output.join(&shard.name)) {
            folders.entry(path.parent().map(Into::into).unwrap_or_default()).or_default().push(path);
        }
        folders.iter().try_for_each(|(folder, shards)| index::update(folder, shards).map(drop))
    }

    fn made_from(&self, shard: &Shard) -> Result<MadeFrom<Encoding>> {
        let path = shard.origin()?;
        let digest = shard.digest(true)?.to_hex().to_string();
        Ok(MadeFrom { path, digest, recipe: Encoding { codes: self.info.clone(), images: self.keep_images } })
    }

    /// Writes `codes.json` to every folder of the output.
    ///
    /// # Errors
    /// A folder holds codes of another tokenizer, or a file cannot be written.
    fn report_sources(&self, shards: &[&Shard]) -> Result<()> {
        let folders: BTreeSet<PathBuf> =
            shards.iter().filter_map(|shard| Some(self.output.join(&shard.name).parent()?.to_path_buf())).collect();
        for folder in folders {
            let path = folder.join(CODES_FILE);
            if path.exists() {
                let hint = "choose another folder with -o, or delete this one";
                let message = format!("{} holds codes of another tokenizer", folder.display());
                ensure!(CodesInfo::read(&folder)? == self.info, failed(message, hint));
                continue;
            }
            let cannot = || format!("cannot write {}", path.display());
            fs::create_dir_all(&folder).hint(cannot(), "choose another folder with -o")?;
            let text = serde_json::to_vec_pretty(&self.info)?;
            let write = |file: &mut BufWriter<File>| Ok(file.write_all(&text).map(|()| true)?);
            write_whole(&path, write).with_context(cannot)?;
        }
        Ok(())
    }

    /// Writes the codes of a shard. A shard without a usable sample writes nothing, so that the next run tries it
    /// again.
    fn encode_shard(
        &self,
        shard: &Shard,
        made_from: &MadeFrom<Encoding>,
        report: &mut Report,
        progress: &impl Fn(u64),
    ) -> Result<()> {
        let path = self.output.join(&shard.name);
        let kind = Kind::Images(u32::try_from(self.tokenizer.image_size())?);
        let before = report.samples;
        let write = |file: &mut BufWriter<File>| -> Result<bool> {
            thread::scope(|scope| {
                // The next batch is read and decoded while the current one is encoded.
                let (sender, receiver) = sync_channel(1);
                let batch_size = self.batch_size.max(1);
                scope.spawn(move || {
                    let all: Vec<usize> = (0..shard.len() as usize).collect();
                    for chunk in all.chunks(batch_size) {
                        let batch: Batch = chunk.par_iter().map(|index| read(shard, *index, kind)).collect();
                        // The encoder stopped with an error.
                        if sender.send(batch).is_err() {
                            return;
                        }
                    }
                });
                self.write_batches(made_from, receiver, file, report, progress)
            })?;
            Ok(report.samples > before)
        };
        write_whole(&path, write).with_context(|| format!("cannot write {}", path.display()))?;
        let written = if report.samples > before { &mut report.shards } else { &mut report.unusable_shards };
        *written += 1;
        Ok(())
    }

    fn write_batches(
        &self,
        made_from: &MadeFrom<Encoding>,
        batches: Receiver<Batch>,
        file: &mut BufWriter<File>,
        report: &mut Report,
        progress: &impl Fn(u64),
    ) -> Result<()> {
        let mut tar = Builder::new(file);
        made_from.write(&mut tar)?;
        for batch in batches {
            progress(batch.len() as u64);
            let mut good = Vec::new();
            for sample in batch {
                match sample {
                    Ok(sample) => good.push(sample),
                    Err(bad) => report.bad.add(bad),
                }
            }
            report.samples += good.len() as u64;
            report.bad.check(report.samples + report.bad.total(), self.max_bad_ratio)?;
            for (sample, codes) in good.iter().zip(self.encode(&good)?) {
                let name = |extension| format!("{}.{extension}", sample.record.key);
                append(&mut tar, &name("npy"), &npy(self.info.grid, &codes))?;
                if let Some((extension, content)) = image_and_extension(&sample.members).filter(|_| self.keep_images) {
                    append(&mut tar, &name(extension), content)?;
                }
                for extension in ["txt", "json"] {
                    if let Some(content) = sample.members.get(extension) {
                        append(&mut tar, &name(extension), content)?;
                    }
                }
                if let Some(bad) = &sample.record.ignored {
                    report.ignored.add(bad.clone());
                }
            }
        }
        Ok(tar.finish()?)
    }

    fn encode(&self, samples: &[Ready]) -> Result<Vec<Vec<u16>>> {
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        let pixels = to_pixels(samples.iter().filter_map(|sample| sample.record.image.as_ref()))?;
        let codes = self.tokenizer.encode(&pixels)?.to_vec2::<u32>()?;
        let narrow = |code: u32| u16::try_from(code).map_err(|_| anyhow!("code {code} does not fit into 16 bits"));
        codes.into_iter().map(|codes| codes.into_iter().map(narrow).collect()).collect()
    }
}

fn read(shard: &Shard, index: usize, kind: Kind) -> Result<Ready, Bad> {
    let (key, members) = shard.members(index, Some(kind))?;
    let record = shard.parse(&key, &members, kind, None, &[])?;
    Ok(Ready { record, members })
}
