//! The manual pages and completions say all that the definitions of the command line hold.

#[path = "../examples/manual/pages.rs"]
mod pages;

use clap::{Arg, Command};

fn visible(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| !arg.is_hide_set())
}

/// roff writes a dash of the text as `\-`.
fn plain(text: &[u8]) -> String {
    String::from_utf8_lossy(text).replace('\\', "")
}

#[test]
fn every_command_and_flag_has_help_and_is_on_its_page() {
    let files = pages::manual().unwrap();
    let text = |name: &str| {
        let found = files.iter().find(|(path, _)| path.to_str() == Some(name));
        plain(&found.unwrap_or_else(|| panic!("no page {name}")).1)
    };
    let definitions = pages::definitions();
    let whole = text("coracle.8");
    let commands = definitions
        .get_subcommands()
        .filter(|command| !command.is_hide_set());
    let mut pages = vec![("coracle".to_owned(), &definitions, whole.clone())];
    for command in commands {
        let name = format!("coracle-{}", command.get_name());
        assert!(whole.contains(&format!("{name}(8)")), "{name}");
        let page = text(&format!("{name}.8"));
        pages.push((name, command, page));
    }
    assert_eq!(pages.len(), files.len());
    assert!(pages.len() > 17, "runc 1.5 has 17 commands");
    for (name, command, page) in pages {
        assert!(command.get_about().is_some(), "{name}");
        assert!(
            page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"),
            "{name}"
        );
        for arg in visible(command) {
            let id = arg.get_id();
            let help = arg
                .get_help()
                .unwrap_or_else(|| panic!("{name}: {id} has no help"));
            assert!(!help.to_string().trim().is_empty(), "{name}: {id}");
            let shown = match arg.get_long() {
                Some(long) => format!("--{long}"),
                None => arg.get_value_names().unwrap()[0].to_string(),
            };
            assert!(page.contains(&shown), "{name}: {shown} in\n{page}");
        }
    }
}

#[test]
fn completions_know_every_command_and_flag() {
    let definitions = pages::definitions();
    let files = pages::completions().unwrap();
    assert_eq!(files.len(), 3);
    for (path, text) in files {
        let text = String::from_utf8(text).unwrap();
        let path = path.display();
        let fish = path.to_string().ends_with(".fish");
        for command in definitions
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
        {
            let name = command.get_name();
            assert!(text.contains(name), "{path}: {name}");
            for arg in visible(command) {
                let Some(long) = arg.get_long() else { continue };
                let flag = if fish {
                    format!("-l {long}")
                } else {
                    format!("--{long}")
                };
                assert!(text.contains(&flag), "{path}: {name} {flag}");
            }
        }
    }
}
