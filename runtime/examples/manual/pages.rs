//! The pages and completions as bytes, by the names that they are installed under. Pure.

use std::path::PathBuf;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

type Files = Vec<(PathBuf, Vec<u8>)>;

/// System administration commands, where runc's pages are.
const SECTION: &str = "8";

/// The definitions as users see them: whole, and without what engines alone call.
pub fn definitions() -> Command {
    let mut definitions = coracle::cli::definitions().disable_help_subcommand(true);
    let hidden: Vec<String> = definitions
        .get_subcommands()
        .filter(|command| command.is_hide_set())
        .map(|command| command.get_name().to_owned())
        .collect();
    assert_eq!(hidden, ["pod-init"], "hidden commands have no page");
    definitions.build();
    definitions
}

/// One page for the program and one for each command.
pub fn manual() -> std::io::Result<Files> {
    let definitions = definitions();
    let mut files = vec![page("coracle".to_owned(), definitions.clone())?];
    for command in definitions.get_subcommands().filter(|c| !c.is_hide_set()) {
        let name = format!("coracle-{}", command.get_name());
        files.push(page(name, command.clone())?);
    }
    Ok(files)
}

fn page(name: String, command: Command) -> std::io::Result<(PathBuf, Vec<u8>)> {
    let mut text = Vec::new();
    Man::new(command)
        .title(name.to_uppercase())
        .section(SECTION)
        .manual("coracle")
        .render(&mut text)?;
    Ok((PathBuf::from(format!("{name}.{SECTION}")), text))
}

/// What bash, zsh and fish know of the command line.
pub fn completions() -> std::io::Result<Files> {
    let shells = [
        (Shell::Bash, "bash/coracle"),
        (Shell::Zsh, "zsh/_coracle"),
        (Shell::Fish, "fish/coracle.fish"),
    ];
    let files = shells.map(|(shell, path)| {
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut definitions(), "coracle", &mut text);
        (PathBuf::from(path), text)
    });
    Ok(files.into())
}
