//! Writes the manual pages and the shells' completions of `coracle`, from the definitions that it
//! parses with. No part of the product: `make man` and `make completions` run it.
//!
//! ```text
//! manual man DIR             coracle.8, coracle-run.8, ...
//! manual completions DIR     bash/coracle, zsh/_coracle, fish/coracle.fish
//! ```

mod pages;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let [what, directory] = words.as_slice() else {
        eprintln!("usage: manual man|completions DIR");
        return ExitCode::from(2);
    };
    let files = match what.to_str() {
        Some("man") => pages::manual(),
        Some("completions") => pages::completions(),
        _ => {
            eprintln!("neither \"man\" nor \"completions\": {what:?}");
            return ExitCode::from(2);
        }
    };
    match files.and_then(|files| write(Path::new(directory), &files)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", Path::new(directory).display());
            ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path, files: &[(PathBuf, Vec<u8>)]) -> std::io::Result<()> {
    for (name, text) in files {
        let path = directory.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(path, text)?;
    }
    Ok(())
}
