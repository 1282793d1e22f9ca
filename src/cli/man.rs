//! `vilg man`

use crate::{error::Result, report};

/// Print the manual page (`vilg man | man -l -`)
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args, _json: bool) -> Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(super::command()).render(&mut page)?;
    report::bytes(&page);
    Ok(())
}
