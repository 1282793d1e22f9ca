//! `vilg completions`

use crate::{error::Result, report};

/// Print the completion script of a shell
#[derive(clap::Args)]
pub struct Args {
    /// The shell
    shell: clap_complete::Shell,
}

pub fn run(args: Args, _json: bool) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::command(), "vilg", &mut script);
    report::bytes(&script);
    Ok(())
}
