//! The study file: an SQLite database with an application id, a schema version and exactly the tables of [`SCHEMA`].

use crate::error::{Context, Error, Hint, Result, ensure, failed};
use rusqlite::{Connection, ErrorCode, OpenFlags, config::DbConfig, limits::Limit};
use std::{path::Path, time::Duration};

/// `vilg` in ASCII: marks a database as a study (SQLite's `application_id`).
const APPLICATION: i32 = 0x7669_6c67;
/// The version of [`SCHEMA`] (SQLite's `user_version`).
const VERSION: i32 = 1;
/// How long a write waits for that of another process.
const PATIENCE: Duration = Duration::from_secs(10);

/// Images are stored, not their paths: raters see what was there when the study was made, and the server reads no other
/// files.
const SCHEMA: &str = "
CREATE TABLE study (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    kind TEXT NOT NULL CHECK (kind IN ('images', 'captions', 'answers')),
    title TEXT NOT NULL,
    seed INTEGER NOT NULL,
    created INTEGER NOT NULL
) STRICT;
CREATE TABLE rater (id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE system (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, is_human INTEGER NOT NULL) STRICT;
CREATE TABLE image (id INTEGER PRIMARY KEY, png BLOB NOT NULL) STRICT;
CREATE TABLE item (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    aspect TEXT NOT NULL,
    prompt TEXT NOT NULL,
    image INTEGER REFERENCES image
) STRICT;
CREATE TABLE output (
    id INTEGER PRIMARY KEY,
    item INTEGER NOT NULL REFERENCES item,
    system INTEGER NOT NULL REFERENCES system,
    text TEXT,
    image INTEGER REFERENCES image,
    UNIQUE (item, system)
) STRICT;
CREATE TABLE rating (
    rater INTEGER NOT NULL REFERENCES rater,
    output INTEGER NOT NULL REFERENCES output,
    question TEXT NOT NULL,
    value INTEGER NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (rater, output, question)
) STRICT, WITHOUT ROWID;
";

/// Prepares an empty database, inside of a transaction of the caller.
///
/// # Errors
/// The file cannot be written.
pub fn create_tables(connection: &Connection) -> Result<()> {
    connection.pragma_update(None, "application_id", APPLICATION)?;
    connection.pragma_update(None, "user_version", VERSION)?;
    Ok(connection.execute_batch(SCHEMA)?)
}

/// Connects to an existing file, without looking into it.
///
/// # Errors
/// It is not a file, or it cannot be opened.
pub fn connect(path: &Path) -> Result<Connection> {
    let name = path.display();
    // Not opened here: closing a second handle would drop the locks that SQLite holds on the file in this process.
    let meta = std::fs::metadata(path).hint(format_args!("cannot open {name}"), MADE)?;
    ensure!(meta.is_file(), failed(format_args!("{name} is not a file"), "name a study file"));
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).with_context(|| format!("cannot open {name}"))?;
    connection.busy_timeout(PATIENCE)?;
    // Nothing in the file is run, whoever wrote it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
    connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, 128 << 20)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

/// Connects to a study and checks that it is one.
///
/// # Errors
/// The file is no SQLite database, belongs to another program, has another version, or is damaged.
pub fn open(path: &Path) -> Result<Connection> {
    let connection = connect(path)?;
    check(&connection, path).map_err(|error| explain(error, path))?;
    Ok(connection)
}

fn check(connection: &Connection, path: &Path) -> Result<()> {
    let number = |pragma: &str| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let (name, hint) = (path.display(), MADE);
    let application = number("application_id")?;
    let message = format!("{name} is not a study: it is empty or the database of another program");
    ensure!(application == i64::from(APPLICATION), failed(message, hint));
    let version = number("user_version")?;
    let message = format!("{name} is a study of version {version}, and this vilg reads version {VERSION}");
    ensure!(version == i64::from(VERSION), failed(message, "use the version of vilg that made it"));
    let fresh = Connection::open_in_memory()?;
    fresh.execute_batch(SCHEMA)?;
    let message = format!("{name} has other tables than a study");
    ensure!(tables(connection)? == tables(&fresh)?, failed(message, hint));
    let damage: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    ensure!(damage == "ok", failed(format_args!("{name} is damaged: {damage}"), DAMAGED));
    let orphans: i64 = connection.query_row("SELECT count(*) FROM pragma_foreign_key_check", [], |row| row.get(0))?;
    let message = format!("{name} is damaged: {orphans} rows refer to others that are missing");
    ensure!(orphans == 0, failed(message, DAMAGED));
    Ok(())
}

const MADE: &str = "`vilg eval human new` makes studies";
const DAMAGED: &str = "restore the file from a backup";

/// The definitions of all tables, indexes, triggers and views.
fn tables(connection: &Connection) -> Result<Vec<(String, String, Option<String>)>> {
    let mut query = connection.prepare("SELECT type, name, sql FROM sqlite_schema ORDER BY type, name")?;
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Says in plain words what SQLite says in its own.
fn explain(error: Error, path: &Path) -> Error {
    let code = error.downcast_ref::<rusqlite::Error>().and_then(rusqlite::Error::sqlite_error_code);
    let name = path.display();
    match code {
        Some(ErrorCode::NotADatabase) => {
            failed(format_args!("{name} is not a study: it is not an SQLite database"), "name a study file")
        }
        Some(ErrorCode::DatabaseCorrupt) => failed(format_args!("{name} is damaged: {error}"), DAMAGED),
        Some(ErrorCode::DatabaseBusy) => {
            failed(format_args!("another process is writing to {name}"), "wait until it is done")
        }
        Some(_) => error.context(format!("cannot read {name}")),
        None => error,
    }
}
