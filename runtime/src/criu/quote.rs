//! CRIU's log as part of our own: the lines with its errors and what comes right before them.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use crate::cli::GlobalArgs;
use crate::error::Error;
use crate::log;

/// Lines before one with an error.
const BEFORE: usize = 5;

/// Warns with the errors of the log, and gives the error with the log's place.
pub fn explain(global: &GlobalArgs, error: Error, file: &Path) -> Error {
    let Ok(open) = std::fs::File::open(file) else {
        // CRIU did not get that far, or a configuration file says to log elsewhere.
        return error;
    };
    let lines = BufReader::new(open).split(b'\n').map_while(Result::ok);
    let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
    let errors = errors(lines);
    if !errors.is_empty() {
        log::warning(
            global,
            &format!("--- Quoting {:?}", file.display().to_string()),
        );
        for line in errors {
            log::warning(global, &line);
        }
        log::warning(global, "---");
    }
    Error::new(
        error.kind(),
        format!("{error:#} (see {})", file.display()),
        "",
    )
}

/// As `grep -n -B5 Error` prints them.
fn errors(lines: impl Iterator<Item = String>) -> Vec<String> {
    let mut out = Vec::new();
    let mut before: VecDeque<(usize, String)> = VecDeque::with_capacity(BEFORE + 1);
    let mut last = 0;
    for (index, line) in lines.enumerate() {
        let found = line.contains("Error");
        before.push_back((index + 1, line));
        if found {
            if last != 0 && before.front().is_some_and(|(number, _)| *number > last + 1) {
                out.push("...".to_owned());
            }
            for (number, line) in before.drain(..) {
                out.push(format!("{number}:{line}"));
                last = number;
            }
        }
        if before.len() > BEFORE {
            before.pop_front();
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_with_the_lines_before_them() {
        let text = "1 2 3 4 5 6 7 Error8 9 Error10 11 12 13 14 15 16 17 Error18 19";
        let quoted = errors(text.split(' ').map(str::to_owned));
        assert_eq!(
            quoted.join(" "),
            "3:3 4:4 5:5 6:6 7:7 8:Error8 9:9 10:Error10 ... 13:13 14:14 15:15 16:16 17:17 18:Error18"
        );
        assert!(errors(["fine".to_owned()].into_iter()).is_empty());
    }
}
