//! `vilg completions`

use crate::{error::Result, report};

/// Print a shell completion script
#[derive(clap::Args)]
#[command(after_help = "Example: vilg completions bash > ~/.local/share/bash-completion/completions/vilg")]
pub struct Args {
    /// Shell to write the script for
    shell: clap_complete::Shell,
}

pub fn run(args: Args, _json: bool) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::command(), "vilg", &mut script);
    report::bytes(&script);
    Ok(())
}
