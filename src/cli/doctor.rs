//! `vilg doctor`

use crate::{
    bundle::{Bundle, DEMO_NAME},
    error::Result,
    report, runtime,
};

/// Show what this machine offers and what this build contains
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args, json: bool) -> Result<()> {
    let mut facts = runtime::facts();
    let demo = if Bundle::open(DEMO_NAME).is_ok() { "in the program" } else { "not in this build" };
    facts.push(("demo model", demo.to_owned()));
    if json {
        let object: serde_json::Map<_, _> = facts.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        report::json(&object);
    } else {
        let rows: Vec<Vec<String>> = facts.into_iter().map(|(k, v)| vec![k.to_owned(), v]).collect();
        report::table(&[], &rows);
    }
    Ok(())
}
