//! From shards of pictures to shards of image codes, computed once and trained from many times.

use super::{
    bad::{Bad, BadCounts},
    codes::{CODES_FILE, CodesInfo, npy},
    dataset::{Shard, Source},
    image::to_pixels,
    record::{Kind, Record},
    tar::Members,
};
use crate::{
    error::{Context, Hint, Result, anyhow, ensure, failed},
    tokenizer::ImageTokenizer,
};
use rayon::prelude::*;
use serde::Serialize;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, sync_channel},
    thread,
};
use tar::{Builder, Header};

/// What an encoding run did.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Shards that were finished before.
    pub skipped_shards: u64,
    pub shards: u64,
    pub samples: u64,
    pub bad: BadCounts,
}

/// Encodes shards into a folder; shards that stand there already are left as they are.
pub struct Encoder<'a> {
    pub tokenizer: &'a ImageTokenizer,
    pub info: CodesInfo,
    pub output: PathBuf,
    /// Pictures that are encoded at once.
    pub batch_size: usize,
    pub max_bad_ratio: f64,
}

/// A picture ready to be encoded, with the members that are kept beside its codes.
struct Ready {
    record: Record,
    members: Members,
}

type Batch = Vec<Result<Ready, Bad>>;

impl Encoder<'_> {
    /// Encodes all shards of all sources; `progress` hears of samples as they are done.
    pub fn run(&self, sources: &[Source], progress: impl Fn(u64)) -> Result<Report> {
        let shards: Vec<&Shard> = sources.iter().flat_map(|source| &source.shards).collect();
        let mut names = BTreeSet::new();
        for shard in &shards {
            let hint = "encode these sources into folders of their own";
            let twice = || failed(format_args!("two shards would be written as {}", shard.name.display()), hint);
            ensure!(names.insert(&shard.name), twice());
        }
        self.describe(&shards)?;
        let mut report = Report::default();
        for shard in shards {
            report.bad.merge(shard.bad.clone());
            if self.output.join(&shard.name).exists() {
                report.skipped_shards += 1;
                progress(shard.len());
            } else {
                self.encode_shard(shard, &mut report, &progress)?;
            }
        }
        Ok(report)
    }

    /// Writes `codes.json` into every folder of the output; refuses one that belongs to another tokenizer.
    fn describe(&self, shards: &[&Shard]) -> Result<()> {
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
            write_whole(&path, |file| Ok(file.write_all(&text)?)).with_context(cannot)?;
        }
        Ok(())
    }

    fn encode_shard(&self, shard: &Shard, report: &mut Report, progress: &impl Fn(u64)) -> Result<()> {
        let path = self.output.join(&shard.name);
        let kind = Kind::Pictures(u32::try_from(self.tokenizer.image_size())?);
        let write = |file: &mut BufWriter<File>| {
            thread::scope(|scope| {
                // One batch is read and decoded while the one before is encoded.
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
                self.write_batches(receiver, file, report, progress)
            })
        };
        write_whole(&path, write).with_context(|| format!("cannot write {}", path.display()))?;
        report.shards += 1;
        Ok(())
    }

    fn write_batches(
        &self,
        batches: Receiver<Batch>,
        file: &mut BufWriter<File>,
        report: &mut Report,
        progress: &impl Fn(u64),
    ) -> Result<()> {
        let mut tar = Builder::new(file);
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
                append(&mut tar, &sample.record.key, "npy", &npy(self.info.grid, &codes))?;
                for extension in ["txt", "json"] {
                    if let Some(content) = sample.members.get(extension) {
                        append(&mut tar, &sample.record.key, extension, content)?;
                    }
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
        let narrow = |code: u32| u16::try_from(code).map_err(|_| anyhow!("code {code} does not fit 16 bits"));
        codes.into_iter().map(|codes| codes.into_iter().map(narrow).collect()).collect()
    }
}

fn read(shard: &Shard, index: usize, kind: Kind) -> Result<Ready, Bad> {
    let (key, members) = shard.members(index)?;
    let record = Record::parse(&key, &members, kind, None).map_err(|bad| shard.locate(&key, bad))?;
    Ok(Ready { record, members })
}

/// Writes a file under a temporary name and gives it its own only when it is whole and on the disk.
fn write_whole(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = PathBuf::from(name);
    let mut file = BufWriter::new(File::create(&temporary)?);
    let written = write(&mut file).and_then(|()| Ok(file.into_inner()?.sync_all()?));
    if let Err(error) = written {
        // What stopped the writing is worth telling; that it cannot be cleared away is not.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    fs::rename(&temporary, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    // Makes the new name itself durable; not every file system can.
    let _ = File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all());
    Ok(())
}

fn append(tar: &mut Builder<&mut BufWriter<File>>, key: &str, extension: &str, content: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, format!("{key}.{extension}"), content)?;
    Ok(())
}
