//! A translation run: one input after the other, each in chunks of rows.

use super::{
    Settings,
    cache::Cache,
    report::Report,
    translator::{Translated, Translator},
    write::{Captions, write_sample},
};
use crate::{
    bounded_read,
    data::{
        bad::{Bad, Cause},
        filter::input::{Input, InputKind},
        output::{Lock, remove_leftovers, write_whole},
        record::Kind,
        table::{Rows, Table},
    },
    error::{Context, Hint, Result, ensure, failed},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
};
use tar::Builder;

/// Samples whose captions are translated together.
const CHUNK: usize = 1024;

/// A run of `vilg data translate`.
pub struct Translation {
    pub settings: Settings,
    pub inputs: Vec<Input>,
    /// Folder of the outputs, or the output itself if `is_file`.
    pub output: PathBuf,
    /// Whether the only input becomes the file `output`.
    pub is_file: bool,
    /// File of known translations. By default it is beside the records in the output folder.
    pub cache: Option<PathBuf>,
    pub rank: usize,
    pub world_size: usize,
}

/// What a run did.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Counts over all inputs of this rank, those of earlier runs included.
    #[serde(flatten)]
    pub report: Report,
    pub inputs: usize,
    /// Different captions that the translator translated in this run.
    pub asked: u64,
    /// Different captions that were known before this run asked for them.
    pub known: u64,
    /// Outputs that an earlier run finished.
    pub finished_before: u64,
}

/// The record of an output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Done {
    /// Absolute path of the input.
    input: PathBuf,
    made_from: String,
    /// `None` until the output is finished.
    report: Option<Report>,
}

/// The translators with the cache.
struct Desk<'a> {
    translators: &'a mut [Translator],
    cache: Mutex<Cache>,
    batch: usize,
    asked: u64,
    known: u64,
}

impl Translation {
    /// Translates all inputs of this rank; `progress` is called with numbers of rows.
    ///
    /// # Errors
    /// An input cannot be read, an output is not one of ours or cannot be written, another process writes to it, or the
    /// translator does not answer.
    pub fn run(&self, translators: &mut [Translator], progress: &impl Fn(u64)) -> Result<Outcome> {
        let state = self.state();
        let of_rank = state.join(format!("rank{}", self.rank));
        let cannot = || format!("cannot create {}", state.display());
        fs::create_dir_all(&of_rank).hint(cannot(), "choose another output with -o")?;
        let _lock = Lock::take(&of_rank)?;
        let own = || self.inputs.iter().enumerate().filter(|(index, _)| index % self.world_size == self.rank);
        own().try_for_each(|(_, input)| self.check_output(input))?;
        let path = self.cache.clone().unwrap_or_else(|| state.join("cache.jsonl"));
        let path = if self.rank == 0 { path } else { with_suffix(&path, &format!(".rank{}", self.rank)) };
        let cache = Mutex::new(Cache::open(&path)?);
        let mut desk = Desk { translators, cache, batch: self.settings.batch, asked: 0, known: 0 };
        let mut outcome = Outcome { report: Report::default(), inputs: 0, asked: 0, known: 0, finished_before: 0 };
        for (_, input) in own() {
            let (report, finished_before) = self.translate(input, &mut desk, progress)?;
            outcome.report.merge(report);
            outcome.inputs += 1;
            outcome.finished_before += u64::from(finished_before);
        }
        (outcome.asked, outcome.known) = (desk.asked, desk.known);
        Ok(outcome)
    }

    /// Where records and the cache are stored: beside the output, under a name that no source reads.
    fn state(&self) -> PathBuf {
        if !self.is_file {
            return self.output.join(".translate");
        }
        let name = self.output.file_name().unwrap_or_default().to_string_lossy();
        self.output.with_file_name(format!(".{name}.translate"))
    }

    fn record_of(&self, input: &Input) -> PathBuf {
        with_suffix(&self.state().join(&input.name), ".done")
    }

    fn output_of(&self, input: &Input) -> PathBuf {
        if self.is_file { self.output.clone() } else { self.output.join(&input.name) }
    }

    /// Refuses to replace a file that an earlier run did not make from the same input.
    fn check_output(&self, input: &Input) -> Result<()> {
        let path = self.output_of(input);
        if path.symlink_metadata().is_err() {
            return Ok(());
        }
        let same = read_done(&self.record_of(input)).is_some_and(|done| Some(done.input) == input.origin().ok());
        let message = format!("{} exists and was not made from {}", path.display(), input.path.display());
        ensure!(same, failed(message, "choose another output with -o"));
        Ok(())
    }

    /// Translates one input; the counts, and whether an earlier run finished it.
    fn translate(&self, input: &Input, desk: &mut Desk<'_>, progress: &impl Fn(u64)) -> Result<(Report, bool)> {
        let (path, record) = (self.output_of(input), self.record_of(input));
        let cannot = || format!("cannot translate {} to {}", input.path.display(), path.display());
        let made_from = format!("{}; settings {}", input.stamp()?, self.settings.digest());
        let source = input.origin()?;
        let earlier = read_done(&record).filter(|done| done.input == source && done.made_from == made_from);
        if let Some(report) = earlier.and_then(|done| done.report)
            && path.exists() == is_written(input, &report)
        {
            progress(report.rows);
            return Ok((report, true));
        }
        create_parent(&path)?;
        create_parent(&record)?;
        remove_leftovers(&path);
        let mut done = Done { input: source, made_from, report: None };
        // The record first: after an interruption it still says that the output is ours.
        write_done(&record, &done)?;
        let mut report = Report::default();
        write_whole(&path, |file| {
            match input.kind {
                InputKind::Table => self.translate_table(input, desk, &mut report, progress, file)?,
                InputKind::Tar | InputKind::Folder => self.translate_shard(input, desk, &mut report, progress, file)?,
            }
            Ok(is_written(input, &report))
        })
        .with_context(cannot)?;
        if !is_written(input, &report) && path.exists() {
            fs::remove_file(&path).with_context(cannot)?;
        }
        done.report = Some(report.clone());
        write_done(&record, &done)?;
        Ok((report, false))
    }

    fn translate_table(
        &self,
        input: &Input,
        desk: &mut Desk<'_>,
        report: &mut Report,
        progress: &impl Fn(u64),
        file: &mut BufWriter<File>,
    ) -> Result<()> {
        let mut table = Table::open(&input.path)?;
        let (column, original) = (&self.settings.caption_column, &self.settings.original_column);
        let mut writer = table.replacing_writer(&input.path, column, original, file)?;
        while let Some(rows) = table.next_batch()? {
            let captions: Vec<Vec<String>> = (0..rows.len())
                .map(|index| {
                    let caption = caption(&rows, index, column);
                    caption.map(|caption| vec![caption]).unwrap_or_else(|bad| {
                        report.bad.add(Bad::new(bad.cause, format_args!("{}: {}", input.path.display(), bad.place)));
                        Vec::new()
                    })
                })
                .collect();
            let texts = self.translate_rows(&captions, desk, report)?;
            let texts: Vec<Option<String>> = texts.into_iter().map(|texts| texts.into_iter().next()).collect();
            writer.write(&rows, &texts)?;
            progress(rows.len() as u64);
        }
        writer.finish()
    }

    fn translate_shard(
        &self,
        input: &Input,
        desk: &mut Desk<'_>,
        report: &mut Report,
        progress: &impl Fn(u64),
        file: &mut BufWriter<File>,
    ) -> Result<()> {
        let shard = input.shard()?;
        let _held = shard.hold_before(None)?;
        report.bad.merge(shard.bad.clone());
        let mut tar = Builder::new(file);
        let indices: Vec<usize> = (0..shard.len() as usize).collect();
        for chunk in indices.chunks(CHUNK) {
            let mut captions = Vec::with_capacity(chunk.len());
            for index in chunk {
                captions.push(shard.read(*index, Kind::Captions, None).map_or_else(
                    |bad| {
                        report.bad.add(bad);
                        Vec::new()
                    },
                    |record| record.captions,
                ));
            }
            let texts = self.translate_rows(&captions, desk, report)?;
            for ((index, original), translated) in chunk.iter().zip(&captions).zip(&texts) {
                if !translated.is_empty() {
                    let captions = Captions { original, translated };
                    write_sample(&shard, *index, &captions, &self.settings, &mut tar)
                        .map_err(|e| e.context(shard.path.display().to_string()))?;
                }
            }
            progress(chunk.len() as u64);
        }
        tar.finish()?;
        Ok(())
    }

    /// The captions to write for each row, given those that it has; empty if the row is left out.
    fn translate_rows(
        &self,
        rows: &[Vec<String>],
        desk: &mut Desk<'_>,
        report: &mut Report,
    ) -> Result<Vec<Vec<String>>> {
        let translations = desk.translate(rows.iter().flatten().map(String::as_str).collect())?;
        let mut written = Vec::with_capacity(rows.len());
        for captions in rows {
            report.rows += 1;
            let found = captions.iter().filter_map(|caption| translations.get(caption.as_str()));
            let mut texts: Vec<String> = found.clone().filter_map(|text| text.as_ref().ok()).cloned().collect();
            if !texts.is_empty() {
                report.translated += 1;
            } else if let Some(failure) = found.filter_map(|text| text.as_ref().err()).next() {
                report.add_failure(failure);
                if self.settings.keep_untranslated {
                    texts.clone_from(captions);
                }
            }
            report.written += u64::from(!texts.is_empty());
            written.push(texts);
        }
        Ok(written)
    }
}

impl Desk<'_> {
    /// The translations of texts: those of the cache, and the others by the translators, which share the batches.
    fn translate<'t>(&mut self, texts: BTreeSet<&'t str>) -> Result<HashMap<&'t str, Translated>> {
        let mut all = HashMap::with_capacity(texts.len());
        let mut unknown = Vec::new();
        let cache = self.cache.get_mut().unwrap_or_else(PoisonError::into_inner);
        for text in texts {
            match cache.get(text)? {
                Some(translation) => drop(all.insert(text, Ok(translation))),
                None => unknown.push(text),
            }
        }
        self.known += all.len() as u64;
        let batches = Mutex::new(unknown.chunks(self.batch.max(1)));
        let (cache, next) = (&self.cache, || batches.lock().unwrap_or_else(PoisonError::into_inner).next());
        let work = |translator: &mut Translator| -> Result<Vec<(&'t str, Translated)>> {
            let mut pairs = Vec::new();
            while let Some(batch) = next() {
                let answers = translator.translate(batch);
                if answers.is_err() {
                    // The others need not go on.
                    while next().is_some() {}
                }
                let answers: Vec<_> = batch.iter().copied().zip(answers?).collect();
                let good = answers.iter().filter_map(|(text, answer)| Some((*text, answer.as_deref().ok()?)));
                cache.lock().unwrap_or_else(PoisonError::into_inner).add(good)?;
                pairs.extend(answers);
            }
            Ok(pairs)
        };
        let results = thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> =
                self.translators.iter_mut().map(|translator| scope.spawn(move || work(translator))).collect();
            let lost = |_| Err(failed("a thread of the translator was lost", "run the command again to resume"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(lost)).collect::<Vec<_>>()
        });
        for pairs in results {
            let pairs = pairs?;
            self.asked += pairs.iter().filter(|(_, answer)| answer.is_ok()).count() as u64;
            all.extend(pairs);
        }
        Ok(all)
    }
}

/// A table is written even if no row is left; it then has its header.
fn is_written(input: &Input, report: &Report) -> bool {
    input.kind == InputKind::Table || report.written > 0
}

fn caption(rows: &Rows, index: usize, column: &str) -> Result<String, Bad> {
    let row = rows.get(index)?;
    let text = row.text(column).map_err(|bad| rows.locate(index, bad))?.filter(|text| !text.trim().is_empty());
    text.map(|text| text.into_owned()).ok_or_else(|| rows.locate(index, Bad::new(Cause::NoCaption, column)))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn read_done(path: &Path) -> Option<Done> {
    serde_json::from_slice(&bounded_read::read(path, bounded_read::TEXT).ok()?).ok()
}

fn write_done(path: &Path, done: &Done) -> Result<()> {
    let text = serde_json::to_vec(done)?;
    write_whole(path, |file| Ok(file.write_all(&text).map(|()| true)?))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn create_parent(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}
