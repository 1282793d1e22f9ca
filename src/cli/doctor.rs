//! `vilg doctor`

use crate::{bundle::DEMO_NAME, dist, error::Result, report, runtime};

/// Show what this machine offers and what this build contains
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args, json: bool) -> Result<()> {
    let mut facts = runtime::facts();
    facts.push(("mpi", dist::MPI_STATE.to_owned()));
    facts.push(("demo model", format!("in the program: --model {DEMO_NAME}")));
    if json {
        let object: serde_json::Map<_, _> = facts.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        report::json(&object);
    } else {
        let rows: Vec<Vec<String>> = facts.into_iter().map(|(k, v)| vec![k.to_owned(), v]).collect();
        report::table(&[], &rows);
    }
    Ok(())
}
