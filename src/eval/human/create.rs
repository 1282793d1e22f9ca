//! Writes a new study file.

use super::{
    database,
    draft::{Draft, Item, Output},
    study::now,
};
use crate::{
    data::{image::open_image, image_file::png},
    error::{Hint, Result, ensure, failed},
};
use rusqlite::{Connection, params};
use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    io::ErrorKind,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Maximum side of an image in pixels.
const MAX_SIDE: u32 = 4096;

/// Writes a study. Nothing is left if that fails.
///
/// # Errors
/// The file exists, an image cannot be read, or the file cannot be written.
pub fn create(path: &Path, draft: &Draft, mut progress: impl FnMut()) -> Result<()> {
    draft.check()?;
    let name = path.display();
    // Creating the file is what claims the name: of two commands at a time, one fails. Whoever can read it has the links.
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Err(failed(format_args!("{name} exists, and a study is never replaced"), "choose another name"));
        }
        Err(error) => return Err(error).hint(format_args!("cannot write {name}"), "choose another file"),
    }
    let written = write(path, draft, &mut progress);
    if written.is_err() {
        // An error of the removal would hide the one that stopped the writing.
        let _ = fs::remove_file(path);
    }
    written
}

fn write(path: &Path, draft: &Draft, progress: &mut impl FnMut()) -> Result<()> {
    let mut connection = database::connect(path)?;
    // One transaction: a process that is killed leaves an empty file, which is no study.
    let writing = connection.transaction()?;
    database::create_tables(&writing)?;
    let (kind, seed) = (draft.kind.name(), draft.seed.cast_signed());
    let sql = "INSERT INTO study (id, kind, title, seed, created) VALUES (1, ?1, ?2, ?3, ?4)";
    writing.execute(sql, params![kind, draft.title, seed, now()])?;
    for rater in 1..=draft.raters {
        writing.execute("INSERT INTO rater (id, token) VALUES (?1, ?2)", params![rater, token()?])?;
    }
    for (number, system) in (1_i64..).zip(&draft.systems) {
        let sql = "INSERT INTO system (id, name, is_human) VALUES (?1, ?2, ?3)";
        writing.execute(sql, params![number, system.name, system.is_human])?;
    }
    let mut images = HashMap::new();
    for (number, item) in (1_i64..).zip(&draft.items) {
        write_item(&writing, number, item, &mut images)?;
        progress();
    }
    Ok(writing.commit()?)
}

fn write_item(connection: &Connection, number: i64, item: &Item, images: &mut HashMap<PathBuf, i64>) -> Result<()> {
    let image = item.image.as_ref().map(|path| store(connection, path, images)).transpose()?;
    let sql = "INSERT INTO item (id, key, aspect, prompt, image) VALUES (?1, ?2, ?3, ?4, ?5)";
    connection.execute(sql, params![number, item.key, item.aspect, item.prompt, image])?;
    for (system, output) in (1_i64..).zip(&item.outputs) {
        let (text, image) = match output {
            Output::Text(text) => (Some(text), None),
            Output::Image(path) => (None, Some(store(connection, path, images)?)),
        };
        let sql = "INSERT INTO output (item, system, text, image) VALUES (?1, ?2, ?3, ?4)";
        connection.execute(sql, params![number, system, text, image])?;
    }
    Ok(())
}

/// Stores an image once and returns its number. It is decoded and encoded again: the metadata of a file could name the
/// system that made it.
fn store(connection: &Connection, path: &Path, images: &mut HashMap<PathBuf, i64>) -> Result<i64> {
    if let Some(number) = images.get(path) {
        return Ok(*number);
    }
    let image = open_image(path)?;
    let (width, height) = image.dimensions();
    let message = format!("{} has {width} × {height} pixels", path.display());
    let hint = format!("images have at most {MAX_SIDE} × {MAX_SIDE} pixels: make it smaller");
    ensure!(width.max(height) <= MAX_SIDE, failed(message, hint));
    connection.execute("INSERT INTO image (png) VALUES (?1)", params![png(&image)?])?;
    let number = connection.last_insert_rowid();
    images.insert(path.to_owned(), number);
    Ok(number)
}

/// 128 random bits of the system in hexadecimal digits.
fn token() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).hint("the system gives no random numbers", "try again")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
