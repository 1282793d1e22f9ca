//! An open study: its pages, and the ratings.

use super::{
    database,
    draft::System,
    kind::Kind,
    order::{self, Page, Place},
};
use crate::error::{Context, Hint, Result, ensure, failed};
use rusqlite::{Connection, OptionalExtension, params};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::SystemTime,
};

/// A study file that is open.
pub struct Study {
    path: PathBuf,
    connection: Connection,
    pub kind: Kind,
    pub title: String,
    pub seed: u64,
    /// By number, from 1 on.
    pub systems: Vec<System>,
    pub raters: Vec<Rater>,
    places: Vec<Place>,
}

/// A person who rates.
#[derive(Debug, Clone)]
pub struct Rater {
    /// From 1 on.
    pub number: i64,
    /// The secret part of the rater's link.
    pub token: String,
}

/// What an output belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub key: String,
    pub aspect: String,
    pub prompt: String,
    /// The number of its image.
    pub image: Option<i64>,
}

/// What a system made: a text, or the number of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    pub item: i64,
    /// From 1 on.
    pub system: i64,
    pub text: Option<String>,
    pub image: Option<i64>,
}

/// The answer of a rater to a question about an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rating {
    pub rater: i64,
    pub output: i64,
    pub question: String,
    pub value: i64,
    /// When, in seconds since 1970.
    pub at: i64,
}

/// The present time in seconds since 1970.
pub fn now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed())
}

impl Study {
    /// Opens a study file.
    ///
    /// # Errors
    /// The file is not a study, has another version, or is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let connection = database::open(path)?;
        let row = connection
            .query_row("SELECT kind, title, seed FROM study", [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .optional()
            .with_context(|| format!("cannot read {}", path.display()))?;
        let message = format!("{} is damaged: it does not say what it is about", path.display());
        let (kind, title, seed): (String, String, i64) = row.hint(&message, "restore the file from a backup")?;
        let kind =
            Kind::ALL.into_iter().find(|known| known.name() == kind).hint(message, "restore the file from a backup")?;
        let mut study = Self {
            path: path.to_owned(),
            connection,
            kind,
            title,
            seed: seed.cast_unsigned(),
            systems: Vec::new(),
            raters: Vec::new(),
            places: Vec::new(),
        };
        study.systems = study.rows("SELECT name, is_human FROM system ORDER BY id", |row| {
            Ok(System { name: row.get(0)?, is_human: row.get(1)? })
        })?;
        study.raters = study.rows("SELECT id, token FROM rater ORDER BY id", |row| {
            Ok(Rater { number: row.get(0)?, token: row.get(1)? })
        })?;
        study.places = study.rows("SELECT item, id FROM output ORDER BY item, system", |row| {
            Ok(Place { item: row.get(0)?, output: row.get(1)? })
        })?;
        Ok(study)
    }

    /// Lets reports read while ratings are written (SQLite's write-ahead log). [`Study::end_serving`] ends it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin_serving(&self) -> Result<()> {
        let message = || format!("cannot write {}", self.path.display());
        ensure!(!self.connection.is_readonly("main")?, failed(message(), "ratings are stored in this file"));
        self.connection.pragma_update(None, "journal_mode", "WAL").hint(message(), "ratings are stored in this file")
    }

    /// Brings the file back to a single one, without a log beside it.
    pub fn end_serving(&self) {
        // Not while another process reads: the log then stays, which is as safe.
        let _ = self.connection.pragma_update(None, "journal_mode", "DELETE");
    }

    /// The pages of a rater in their order.
    pub fn pages(&self, rater: i64) -> Vec<Page> {
        order::pages(self.kind, self.seed, rater, &self.places)
    }

    /// The outputs about which a rater has answered all questions.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn rated(&self, rater: i64) -> Result<BTreeSet<i64>> {
        let sql = "SELECT output FROM rating WHERE rater = ?1 GROUP BY output HAVING count(*) >= ?2";
        let mut query = self.connection.prepare(sql)?;
        let rows = query.query_map(params![rater, i64::try_from(self.kind.questions().len())?], |row| row.get(0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// The answers of a rater about an output, by question.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn answers(&self, rater: i64, output: i64) -> Result<BTreeMap<String, i64>> {
        let mut query =
            self.connection.prepare("SELECT question, value FROM rating WHERE rater = ?1 AND output = ?2")?;
        let rows = query.query_map([rater, output], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Stores answers of a rater: (output, question, value). Later answers replace earlier ones, so that sending a page twice
    /// counts once. All of them are stored, or none.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn rate(&mut self, rater: i64, answers: &[(i64, &str, i64)]) -> Result<()> {
        let writing = self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        for (output, question, value) in answers {
            let sql = "INSERT INTO rating (rater, output, question, value, at) VALUES (?1, ?2, ?3, ?4, ?5) \
                ON CONFLICT (rater, output, question) DO UPDATE SET value = excluded.value, at = excluded.at";
            writing.execute(sql, params![rater, output, question, value, now()])?;
        }
        Ok(writing.commit()?)
    }

    /// An item by its number.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn item(&self, number: i64) -> Result<Item> {
        let sql = "SELECT key, aspect, prompt, image FROM item WHERE id = ?1";
        Ok(self.connection.query_row(sql, [number], item)?)
    }

    /// An output by its number.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn output(&self, number: i64) -> Result<Output> {
        Ok(self.connection.query_row("SELECT item, system, text, image FROM output WHERE id = ?1", [number], output)?)
    }

    /// An image as PNG.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn image(&self, number: i64) -> Result<Vec<u8>> {
        Ok(self.connection.query_row("SELECT png FROM image WHERE id = ?1", [number], |row| row.get(0))?)
    }

    /// All items by number.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn items(&self) -> Result<BTreeMap<i64, Item>> {
        let read = |row: &rusqlite::Row| Ok((row.get(4)?, item(row)?));
        Ok(self.rows("SELECT key, aspect, prompt, image, id FROM item", read)?.into_iter().collect())
    }

    /// All outputs by number.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn outputs(&self) -> Result<BTreeMap<i64, Output>> {
        let read = |row: &rusqlite::Row| Ok((row.get(4)?, output(row)?));
        Ok(self.rows("SELECT item, system, text, image, id FROM output", read)?.into_iter().collect())
    }

    /// All ratings, by rater and output.
    ///
    /// # Errors
    /// The file cannot be read, or a rating is not one that a page can give.
    pub fn ratings(&self) -> Result<Vec<Rating>> {
        let sql = "SELECT rater, output, question, value, at FROM rating ORDER BY rater, output, question";
        let ratings = self.rows(sql, |row| {
            Ok(Rating {
                rater: row.get(0)?,
                output: row.get(1)?,
                question: row.get(2)?,
                value: row.get(3)?,
                at: row.get(4)?,
            })
        })?;
        for Rating { rater, output, question, value, .. } in &ratings {
            let possible = self.kind.question(question).is_some_and(|known| (known.low..=known.high).contains(value));
            let (name, hint) = (self.path.display(), "the file was changed by another program");
            let message = format!("{name}: rater {rater} cannot have rated {question} of output {output} with {value}");
            ensure!(possible, failed(message, hint));
        }
        Ok(ratings)
    }

    fn rows<T>(&self, sql: &str, read: impl FnMut(&rusqlite::Row) -> rusqlite::Result<T>) -> Result<Vec<T>> {
        let rows = || {
            let mut query = self.connection.prepare(sql)?;
            query.query_map([], read)?.collect::<rusqlite::Result<Vec<T>>>()
        };
        rows().with_context(|| format!("cannot read {}", self.path.display()))
    }
}

fn item(row: &rusqlite::Row) -> rusqlite::Result<Item> {
    Ok(Item { key: row.get(0)?, aspect: row.get(1)?, prompt: row.get(2)?, image: row.get(3)? })
}

fn output(row: &rusqlite::Row) -> rusqlite::Result<Output> {
    Ok(Output { item: row.get(0)?, system: row.get(1)?, text: row.get(2)?, image: row.get(3)? })
}
