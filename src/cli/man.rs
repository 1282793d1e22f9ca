//! `vilg man`

use crate::{error::Result, report};
use clap_mangen::Man;

/// Print the manual page (`vilg man | man -l -`)
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args, _json: bool) -> Result<()> {
    report::bytes(&page()?);
    Ok(())
}

/// One man page for the program and all its commands, as roff.
fn page() -> Result<Vec<u8>> {
    let mut root = super::command().disable_help_subcommand(true);
    root.build();
    let man = Man::new(root.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    for command in root.get_subcommands() {
        command_section(command, &mut page)?;
    }
    let mut exit = Vec::new();
    man.render_extra_section(&mut exit)?;
    page.extend(String::from_utf8_lossy(&exit).replace(".SH EXTRA", ".SH EXIT STATUS").bytes());
    Ok(page)
}

/// The section of a command, or the sections of its subcommands. Global options are explained once, at the top.
fn command_section(command: &clap::Command, page: &mut Vec<u8>) -> Result<()> {
    if command.has_subcommands() {
        return command.get_subcommands().try_for_each(|below| command_section(below, page));
    }
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let general = |arg: &clap::Arg| arg.is_global_set() || ["help", "version"].contains(&arg.get_id().as_str());
    let own = command.clone().mut_args(|arg| if general(&arg) { arg.hide(true) } else { arg });
    let (man, mut section) = (Man::new(own), Vec::new());
    man.render_synopsis_section(&mut section)?;
    man.render_description_section(&mut section)?;
    man.render_options_section(&mut section)?;
    let section = String::from_utf8_lossy(&section).replace(".SH ", ".SS ");
    page.extend(format!(".SH \"{}\"\n{section}", name.to_uppercase()).bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_command_has_its_section() {
        let page = String::from_utf8(super::page().unwrap()).unwrap();
        for command in ["VILG DOCTOR", "VILG CONFIG SHOW", "VILG MAN"] {
            assert_eq!(page.matches(&format!(".SH \"{command}\"\n")).count(), 1, "{command}");
        }
        assert_eq!(page.matches(".TH").count(), 1);
    }
}
